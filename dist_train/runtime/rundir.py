"""A run's directory: where it is, what state it is in, who started it when."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import ConfigError
from dist_train.config.fields import PLACEHOLDER
from dist_train.files import StorageError, utc_now
from dist_train.runtime.lease import Lease
from dist_train.runtime.mirror import COPIES, Mirror, Watch
from dist_train.runtime.sidefiles import SideFileError, read_mapping
from dist_train.runtime.storage import LocalStorage, Storage, open_storage
from dist_train.tracking.records import finite
from dist_train.watch.control import SAVE, STOP, Source, watch_file

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

log = logging.getLogger("dist_train")
MICRO_BATCHES = "micro_batches.json"  # what fits, once memory has run out
_APPENDED = ("metrics.jsonl", "attempts.jsonl")
FILES = ("config.yaml", "status.json", "result.json", "model.pt", MICRO_BATCHES, *_APPENDED)
FOLDERS = (".lease", "checkpoints", "logs", "trace")
_LONGEST = 100  # characters of a path inside a run's directory


def expand_name(template: str, config: Config, *, time: str, job: str) -> str:
    """Fill `{time}`, `{job}` and keys like `{optimizer.lr}` in; what isn't safe in a path becomes `-`.

    Other values give other names: a text that loses something by this gets a few digits of its hash behind it.

    Raises:
        KeyError: the config has no such key (`load_config` has refused such a name before).
    """

    def fill(match: re.Match[str]) -> str:
        key = match.group(1)
        value: Any = {"time": time, "job": job}.get(key)
        if value is None:
            value = config.get(key)
        if isinstance(value, str) and key not in ("time", "job") and key.endswith("_target_"):
            value = value.rpartition(".")[2]
        if value and isinstance(value, list) and all(type(item) in (int, float) for item in value):
            value = "-".join(map(str, value))
        text = str(value)
        safe = re.sub(r"[^\w.=+-]+", "-", text)
        safe = safe if text[:1] == "-" and text == safe else safe.strip("-.")
        if (safe and safe == text) or key in ("time", "job"):
            return safe or "none"
        return f"{safe or 'none'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

    return PLACEHOLDER.sub(fill, template)


def job_id() -> str | None:
    """The scheduler's or launcher's name for this job, the same after a requeue or restart; None for a plain process.

    A person's shell inside an allocation (salloc, srun --pty) is no job: nobody starts again what was started there.
    """
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    run_id = env.get("TORCHELASTIC_RUN_ID", "none")
    job = None if _in_a_shell(env) else env.get("SLURM_JOB_ID")
    return job or (run_id if run_id != "none" else None)


def _in_a_shell(env: Mapping[str, str]) -> bool:
    """Whether a person started this in an interactive shell under Slurm (sbatch sets ENVIRONMENT=BATCH for its script)."""
    if env.get("ENVIRONMENT") == "BATCH":
        return False
    interactive = "SLURM_PTY_PORT" in env or env.get("SLURM_JOB_NAME") in ("interactive", "bash", "sh", "zsh", "fish")
    return interactive or (sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty())


def run_location(config: Config) -> str:
    """Path or URL of the config's run. `{time}` and `{job}` in its name are those of the job's first start.

    They are remembered below `run.dir`, in `.jobs/`, so that restarts and requeues of one job find their run again, and two
    that start in the same second get two names.
    """
    template, place = config.run.name or "run", config.run.place
    job = job_id()
    memory, told = open_storage(place).sub(".jobs"), job or str(os.getpid())
    stamp = ""
    if "{time}" in template:
        check_place(place)
        with contextlib.suppress(FileNotFoundError):
            stamp = memory.read_bytes(job).decode() if job is not None else ""
        memory.makedirs()
        stamp = stamp or _new_stamp(memory, lambda time: expand_name(template, config, time=time, job=told))
        if job is not None:
            memory.create_exclusive(job, stamp.encode())
            stamp = memory.read_bytes(job).decode()
    return f"{place.rstrip('/')}/{expand_name(template, config, time=stamp, job=told)}"


def _new_stamp(memory: Storage, name: Callable[[str], str]) -> str:
    """The time now, with a number behind it where another start has taken that name already."""
    now, token = datetime.now().strftime("%Y%m%d-%H%M%S"), secrets.token_bytes(8)
    stamps = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(stamp for stamp in stamps if memory.create_exclusive("name-" + name(stamp).replace("/", "%"), token))


def check_place(location: str) -> None:
    """Find out, writing nothing, whether a run can live there.

    Raises:
        ConfigError: it can't; names what is in the way.
    """
    storage = open_storage(location)
    wrong = _obstacle(storage.path()) if isinstance(storage, LocalStorage) else ""
    if wrong:
        cure = "give run.dir a directory that this process can write to"
        raise ConfigError.single("run.dir", f"{location} can't hold a run: {wrong}; {cure}")


def _obstacle(root: Path) -> str:
    try:
        os.lstat(root)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a directory that can't be entered, links in a circle
        return f"{error.strerror} ({str(root)[:200]})"
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    longest = max(len(os.fsencode(part)) for part in root.parts)
    if longest > 255 or len(os.fsencode(root)) + _LONGEST > 4095:
        return f"the path is too long ({str(root)[:200]})"
    needed = [there, *(root / name for name in FOLDERS)]
    for path in needed:
        if os.path.lexists(path) and not path.is_dir():
            return f"{path} is {'a link to nothing' if not path.exists() else 'no directory'}"
    for path in (root / name for name in FILES):
        if os.path.lexists(path) and not path.is_file():
            return f"{path} is no file"
    for path in (*needed, *(root / name for name in _APPENDED)):
        if path.exists() and not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
            return f"{path} can't be written (its permissions, or a read-only file system)"
    return ""


class RunDir(Mirror):
    """One run's directory. Rank 0 writes status, results and the ledger; each rank its own log and trace.

    Under a URL, what grows is kept in a directory of this host (`runtime.mirror`); the rest goes to the store directly.

    Attributes:
        lease: this job's, while it trains. Then nothing is written or uploaded here once the run has another owner or is gone:
            :class:`LeaseLostError` is raised instead.
    """

    def __init__(self, location: str):
        super().__init__(location)
        self.shared = ()
        self.lease: Lease | None = None
        self._watch: Watch | None = None

    def own(self, log: Callable[[str], None]) -> Lease:
        """Make the directory, and become its owner until `close`.

        Raises:
            LeaseHeldError: another process trains this run.
        """
        self.make()
        self.lease = Lease.acquire(self.storage, log=log)
        return self.lease

    def make(self) -> None:
        """Make the directory.

        Raises:
            ConfigError: the system doesn't let one be made there, whatever the permissions say.
        """
        try:
            self.storage.makedirs()
        except OSError as error:
            cure = "give run.dir a directory that this process can write to"
            raise ConfigError.single("run.dir", f"{self.location} can't hold a run: {error.strerror}; {cure}") from None

    def assure_own(self) -> None:
        """To be called before anything is written.

        Raises:
            LeaseLostError: the run is another's by now, or gone. StorageError: that can't be found out.
        """
        if self.lease is not None:
            self.lease.check(self.storage.patience)

    def upload(self, only: Collection[str] | None = None) -> None:
        """As `Mirror.upload`, if the run is still one's own."""
        self.assure_own()
        super().upload(only)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    def records(self) -> Path:
        """A local directory with the records of the run: of copies, where it lives under a URL."""
        for name in ("metrics.jsonl", *COPIES):
            with contextlib.suppress(FileNotFoundError):
                self.fetch(name)
        return self.root

    def begin(self, world: World) -> None:
        """Under a URL: go on with the files that earlier starts uploaded, on whatever host they ran."""
        # Each host sends what its ranks write; only rank 0's has the records.
        if world.placement.local_rank == 0:
            self.shared = None if world.is_main else ("logs", "trace")
        records = ("metrics.jsonl", "wandb/run_id") if world.is_main else ()
        self.go_on_with(*records, f"logs/rank-{world.rank}.log")

    def wishes(self) -> list[Source]:
        """What asks for a stop or a save when somebody has put the file STOP or SAVE here; the file is taken away."""
        self._watch = watch = Watch(self.storage, ("STOP", "SAVE"))
        return [watch_file(watch.take, STOP, "STOP"), watch_file(watch.take, SAVE, "SAVE")]

    def close(self) -> None:
        """Stop watching for files, wait for an upload that is under way, and let the next start take the run."""
        if self._watch is not None:
            self._watch.close()
        super().close()
        if self.lease is not None:
            self.lease.release()

    def read_json(self, name: str, warn: Callable[[str], object] = log.warning) -> dict[str, Any] | None:
        """A JSON file's content; None if it isn't there, or can't be read as what it should be, which `warn` is told."""
        try:
            return read_mapping(self.storage, name)
        except SideFileError as error:
            warn(f"{error}: taken as missing")
            return None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file whole; a number that isn't finite is null."""
        self.assure_own()
        self.storage.write_atomic(name, (json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode())

    def write_status(self, state: str, *, step: int, epoch: int, world_size: int, error: str | None = None) -> None:
        """status.json: what this run is doing, for people and scripts.

        Raises:
            StorageError: it can't be written.
        """
        stand = {"state": state, "step": step, "epoch": epoch, "world_size": world_size}
        self.write_json("status.json", {**stand, "updated_at": utc_now(), "error": error})

    @contextlib.contextmanager
    def only_a_view(self) -> Iterator[None]:
        """What is written inside isn't worth waiting for a store, nor ending the run: a failure is only logged."""
        patience, self.storage.patience = self.storage.patience, 0.0
        try:
            yield
        except StorageError as error:
            log.warning("%s", error)
        finally:
            self.storage.patience = patience

    def record_attempt(self, event: str, **told: Any) -> None:
        """A line in attempts.jsonl."""
        self.assure_own()
        self.storage.append_line("attempts.jsonl", json.dumps({"time": utc_now(), "event": event, **told}))

    def claim_attempt(self) -> int:
        """The number of this start, from 0: the first that nobody has claimed, by exclusive creation."""
        claims = self.storage.sub("trace/.attempts")
        claims.makedirs()
        number = len(claims.list())
        mine = (
            f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}\n".encode()
        )  # containers share names and pids
        while not claims.create_exclusive(str(number), mine):
            number += 1
        return number


def check_shared(run: RunDir, world: World) -> None:
    """Rank 0 leaves a nonce in the run's directory and each node reads it back.

    Raises:
        ConfigError: a node doesn't see it: its directory of that name is another one, and would start afresh silently.
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
    blind = sorted({host for saw, host in answers if not saw})
    if blind:
        raise ConfigError.single(
            "run.dir",
            f"{run.location} is not the same directory on all nodes: {', '.join(blind)} can't see a file that "
            f"{answers[0][1]} (rank 0) wrote there; give run.dir a path on a shared file system",
        )
