"""A run's directory: its status, results and records, and the lease of the job that trains it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import ConfigError
from dist_train.files import StorageError, utc_now
from dist_train.runtime.lease import Lease
from dist_train.runtime.location import no_place
from dist_train.runtime.mirror import COPIES, Mirror, Watch
from dist_train.runtime.sharing import RANK_FOLDERS, find_sharing
from dist_train.runtime.sidefiles import SideFileError, read_mapping
from dist_train.tracking.records import finite
from dist_train.watch.control import SAVE, STOP, Source, watch_file

if TYPE_CHECKING:
    from dist_train.runtime.world import World

log = logging.getLogger("dist_train")


class RunDir(Mirror):
    """One run's directory. Rank 0 writes status, results and attempts; each rank its own log, trace and digests.

    Attributes:
        lease: this job's, while it trains. Once the run has another owner or was deleted, nothing is written or uploaded:
            :class:`LeaseLostError` is raised instead.
    """

    def __init__(self, location: str):
        super().__init__(location)
        self.uploaded = ()
        self.lease: Lease | None = None
        self._watch: Watch | None = None

    def acquire(self, log: Callable[[str], None]) -> Lease:
        """Create the directory, and own it until `close`. Raises LeaseHeldError if another process trains this run."""
        self.make()
        self.lease = Lease.acquire(self.storage, log=log)
        return self.lease

    def make(self) -> None:
        """Create the directory. Raises ConfigError if the system doesn't allow it, whatever the permissions say."""
        try:
            self.storage.makedirs()
        except OSError as error:
            raise no_place(self.location, str(error.strerror)) from None

    def join(self, number: int, nonce: str) -> None:
        """On the ranks beside the one that owns the run: check its lease, too."""
        self.lease = self.lease or Lease.known(self.storage, number, nonce)

    def check_owner(self) -> None:
        """Before anything is written: raises LeaseLostError if the run has another owner by now, or was deleted."""
        if self.lease is not None:
            self.lease.check(self.storage.patience)

    def upload(self, only: Collection[str] | None = None) -> None:
        """As `Mirror.upload`, if this job still owns the run."""
        self.check_owner()
        super().upload(only)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    def records(self) -> Path:
        """A local directory with the run's records; copies of them under a URL."""
        for name in ("metrics.jsonl", *COPIES):
            with contextlib.suppress(FileNotFoundError):
                self.fetch(name)
        return self.root

    def open_files(self, world: World) -> None:
        """Under a URL: find out whose files this rank uploads, and fetch those that earlier starts uploaded, on whatever host."""
        if not self.storage.is_local and self.lease is not None:
            self.sharing = find_sharing(self.root, world, self.lease.nonce)
            if self.sharing.leads:
                self.uploaded = None if world.is_main else RANK_FOLDERS  # only rank 0 has the records
        records = ("metrics.jsonl", "wandb/run_id") if world.is_main else ()
        self.resume_files(*records, f"logs/rank-{world.rank}.log")

    def requests(self) -> list[Source]:
        """Sources of a stop or a save, requested by creating the file STOP or SAVE here; the file is deleted."""
        self._watch = watch = Watch(self.storage, ("STOP", "SAVE"))
        return [watch_file(watch.take, STOP, "STOP"), watch_file(watch.take, SAVE, "SAVE")]

    def close(self) -> None:
        """Stop watching for files, wait for an upload in progress, and let the next start take the run."""
        if self._watch is not None:
            self._watch.close()
        super().close()
        if self.lease is not None:
            self.lease.release()

    def read_json(self, name: str, warn: Callable[[str], object] = log.warning) -> dict[str, Any] | None:
        """A JSON file's content; None if it doesn't exist, or isn't valid, which is passed to `warn`."""
        try:
            return read_mapping(self.storage, name)
        except SideFileError as error:
            warn(f"{error}: treated as missing")
            return None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file atomically; a number that isn't finite is null."""
        self.check_owner()
        self.storage.write_atomic(name, (json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode())

    def write_status(self, state: str, *, step: int, epoch: int, world_size: int, error: str | None = None) -> None:
        """status.json: the state of this run, for people and scripts."""
        content = {"state": state, "step": step, "epoch": epoch, "world_size": world_size}
        self.write_json("status.json", {**content, "updated_at": utc_now(), "error": error})

    @contextlib.contextmanager
    def best_effort(self) -> Iterator[None]:
        """For writes that aren't worth waiting for a store or failing the run: no retries, and a failure is logged."""
        patience, self.storage.patience = self.storage.patience, 0.0
        try:
            yield
        except StorageError as error:
            log.warning("%s", error)
        finally:
            self.storage.patience = patience

    def record_attempt(self, event: str, **fields: Any) -> None:
        """A line in attempts.jsonl."""
        self.check_owner()
        self.storage.append_line("attempts.jsonl", json.dumps({"time": utc_now(), "event": event, **fields}))

    def claim_attempt(self) -> int:
        """The number of this start, from 0: the first that is free, claimed by exclusive creation."""
        claims = self.storage.sub("trace/.attempts")
        claims.makedirs()
        number = len(claims.list())
        # Containers share names and pids.
        mine = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}\n".encode()
        while not claims.create_exclusive(str(number), mine):
            number += 1
        return number


def check_shared(run: RunDir, world: World) -> None:
    """Rank 0 writes a nonce into the run's directory and each node reads it back.

    Raises ConfigError if a node doesn't see it: its directory of that name is another one, where it would start over.
    """
    if world.size == 1:
        return
    nonce = world.broadcast(f".nonce-{secrets.token_hex(8)}")
    if world.is_main:
        run.make()
        run.storage.write_atomic(nonce, b"nonce")
    world.barrier()
    deadline = time.monotonic() + 10  # a network file system may show it late
    while not (seen := run.storage.exists(nonce)) and time.monotonic() < deadline:
        time.sleep(0.2)
    answers = world.all_gather([seen, socket.gethostname()])
    if world.is_main:
        run.storage.delete(nonce)
    if blind := sorted({host for saw, host in answers if not saw}):
        differs = f"{run.location} is not the same directory on all nodes"
        found = f"{', '.join(blind)} can't see a file that {answers[0][1]} (rank 0) wrote there"
        raise ConfigError.single("run.dir", f"{differs}: {found}; give run.dir a path on a shared file system")
