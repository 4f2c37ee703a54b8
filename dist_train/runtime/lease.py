"""One run, one owner: a lease in the run's directory keeps two jobs from training the same run.

To take the lease, a process creates ``.lease/<number>.json`` exclusively, with the next number and a nonce; the highest
number owns the run and renews its file. Number and nonce are checked again before anything is published, so that an owner
that slept through the loss of its lease, or whose directory was deleted or moved, publishes nothing. No clock is compared
with another machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from dist_train.files import StorageError
from dist_train.runtime.storage import NotAFileError, Storage
from dist_train.watch.processes import machine, process_state, started

_MISSED = 3  # renewals, after which an owner on another machine counts as dead
_LOOK = 1.0  # seconds between two checks of this job's lease on a disk
_MOST = 1 << 16  # bytes of a lease; a longer file isn't one


class LeaseHeldError(Exception):
    """Another process trains this run; the message names its host, process and age."""


class LeaseLostError(Exception):
    """This process owned the run, and another one does by now."""


class LeaseRecord(BaseModel):
    """Content of a lease's file. The defaults are those of a file that can't be read, whose owner may be alive.

    `started` is the process's start time as the kernel counts it: a later process of the same pid has another one.
    """

    model_config = ConfigDict(strict=True)

    host: str = "an unknown host (its lease can't be read)"
    machine: str | None = None
    pid: int = 0
    started: str = ""
    interval: Annotated[float, Field(gt=0, le=3600)] = 10.0
    renewals: int = 0
    released: bool = False
    nonce: str = ""
    acquired_at: AwareDatetime | None = None
    renewed_at: AwareDatetime | None = None

    def encode(self) -> bytes:
        """The file's bytes."""
        return json.dumps(self.model_dump(mode="json")).encode()

    def is_here(self) -> bool:
        """Whether the owner runs, or ran, on this machine."""
        return self.machine == machine()

    def is_alive(self) -> bool:
        """Whether the owner's process exists on this machine, and isn't a later one of the same pid."""
        return process_state(self.pid) != "gone" and started(self.pid) in ("", self.started)

    def __str__(self) -> str:
        since = self.acquired_at or datetime.now(UTC)
        age = max((datetime.now(UTC) - since).total_seconds(), 0)
        return f"process {self.pid} on {self.host}, for {age:.0f} s (since {since.isoformat(timespec='milliseconds')})"


class Lease:
    """The ownership of a run, from :meth:`acquire` to :meth:`release`; its number and nonce identify it."""

    def __init__(self, storage: Storage, number: int, record: LeaseRecord) -> None:
        self.number, self.nonce = number, record.nonce
        self.lost = False  # whether the last renewal or check found another owner
        self._storage, self._record = storage, record
        self._checked = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def acquire(cls, storage: Storage, *, interval: float = 10.0, log: Callable[[str], None] = print) -> Lease:
        """Take the lease of the run whose directory ``storage`` is, and renew it every ``interval`` seconds.

        An owner that died on this machine is succeeded at once. One on another machine is watched: if it renews its
        lease it is alive, if it misses three renewals it is dead. Raises LeaseHeldError if the owner is alive.
        """
        storage = storage.sub(".lease")
        storage.makedirs()
        record = LeaseRecord(host=socket.gethostname(), machine=machine(), pid=os.getpid(), interval=interval)
        record.started, record.nonce = started(os.getpid()), secrets.token_hex(8)  # no two owners write the same
        while True:
            numbers = _numbers(storage)
            if numbers:
                _wait_for_end(storage, numbers[-1], log)
            number = numbers[-1] + 1 if numbers else 1
            record.acquired_at = datetime.now(UTC)
            if not storage.create_exclusive(_name(number), record.encode()):
                continue  # another one that waited was faster
            if (_numbers(storage) or [0])[-1] > number:
                storage.delete(_name(number))  # this one slept while others came and went
                continue
            for old in numbers:
                storage.delete(_name(old))
            lease = cls(storage, number, record)
            lease._thread.start()
            return lease

    @classmethod
    def known(cls, storage: Storage, number: int, nonce: str) -> Lease:
        """The lease that another process of this job holds and renews, to check whether the job still owns the run."""
        lease = cls(storage.sub(".lease"), number, LeaseRecord(nonce=nonce))
        lease._over.set()
        return lease

    def check(self, patience: float | None = None) -> int:
        """The number of this lease, if its file is still there, with its nonce, and the last one.

        Raises LeaseLostError if another process owns the run by now, or its directory was deleted. A failing storage is
        retried for `patience` seconds, by default as long as when the lease was acquired.
        """
        storage = self._storage if patience is None else self._storage.sub("", patience=patience)
        last, mine = (_numbers(storage) or [0])[-1], _read(storage, self.number)
        if self.lost or last > self.number or mine is None or mine.nonce != self.nonce:
            self.lost = True
            why = f"{storage.location.removesuffix('/.lease')} (or the lease in it) was deleted or moved"
            if last:
                why = f"the run has had another owner since ({_read(storage, last) or 'gone again'})"
            raise LeaseLostError(f"{why}: this process must stop, writing nothing")
        self._checked = time.monotonic()
        return self.number

    def assure(self) -> None:
        """As :meth:`check`, but only if a renewal is overdue, as after a sleep: cheap enough for every record."""
        if self.lost or time.monotonic() - self._checked > 2 * self._record.interval:
            self.check()

    def release(self) -> None:
        """Let the next start take the run at once. May be called twice; a failing store is ignored."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(timeout=2.0)  # it may be retrying to reach a store
        self._storage.patience = min(self._storage.patience, 5.0)
        self._record.released = True
        with contextlib.suppress(StorageError, LeaseLostError, OSError):
            self.check()
            self._write()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        interval, renewed = self._record.interval, time.monotonic()
        # On a disk it is checked more often than renewed: once a run is deleted, little more should be written.
        pause = min(interval, _LOOK) if self._storage.is_local else interval
        while not self.lost and not self._over.wait(pause):
            # An outage loses nothing: a process that takes the run over meanwhile is found by its number.
            with contextlib.suppress(StorageError, LeaseLostError, OSError):
                self.check()
                if time.monotonic() - renewed >= interval - pause / 2:
                    self._record.renewals += 1
                    self._record.renewed_at = datetime.now(UTC)
                    self._write()
                    renewed = time.monotonic()

    def _write(self) -> None:
        self._storage.write_atomic(_name(self.number), self._record.encode())


def look_at_owner(storage: Storage) -> tuple[bool, str | None]:
    """For display: whether the owner of the run in ``storage`` seems alive, and its last renewal (ISO 8601).

    On this machine its process decides; elsewhere the age of its last renewal does, as far as both clocks agree.
    """
    storage = storage.sub(".lease")
    numbers = _numbers(storage)
    record = _read(storage, numbers[-1]) if numbers else None
    if record is None:
        return False, None
    seen = record.renewed_at or record.acquired_at
    recent = seen is None or (datetime.now(UTC) - seen).total_seconds() < 2 * _MISSED * record.interval
    alive = not record.released and (record.is_alive() if record.is_here() else recent)
    return alive, seen.isoformat() if seen else None


def _wait_for_end(storage: Storage, number: int, log: Callable[[str], None]) -> None:
    """Return when the lease of that number is over. Raises LeaseHeldError if its owner is alive."""
    seen, since = None, time.monotonic()
    while True:
        record = _read(storage, number)
        if record is None or record.released or (record.is_here() and not record.is_alive()):
            return
        held = f"{storage.location.removesuffix('/.lease')} is being trained by {record}"
        patience = _MISSED * record.interval
        if record.is_here() or (seen is not None and record != seen):
            renewed = "" if record.is_here() else ", which has just renewed its lease"
            raise LeaseHeldError(f"{held}{renewed}; stop that job first, or give this one another run.name")
        if time.monotonic() - since > patience:
            log(f"took the run over from {record}: no heartbeat for {patience:g} s")
            return
        if seen is None:
            log(f"{held}: waiting up to {patience:g} s for a heartbeat")
        seen = record
        time.sleep(min(1.0, record.interval / 4))


def _numbers(storage: Storage) -> list[int]:
    return sorted(int(name[:-5]) for name in storage.list() if name.endswith(".json") and name[:-5].isdecimal())


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _read(storage: Storage, number: int) -> LeaseRecord | None:
    """A lease's record; None if there is none. One that can't be read gets the usual time to be renewed."""
    try:
        return LeaseRecord.model_validate_json(storage.read_bytes(_name(number), most=_MOST))
    except FileNotFoundError:
        return None
    except (ValidationError, NotAFileError):
        return LeaseRecord()
