"""One run, one owner: a lease in the run's directory keeps two jobs from training one run.

Each taking of the lease creates ``.lease/<number>.json`` exclusively, with the next number and a nonce of its own; the
highest one owns the run and renews its file. Both are looked up again before anything is published, so that an owner that
slept through the loss of its lease, or whose directory was deleted or moved, publishes nothing. No clock is compared with
another machine's.
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
from typing import Any

from dist_train.files import StorageError, utc_now
from dist_train.runtime.storage import Storage
from dist_train.watch.processes import machine, process_state, started

_MISSED = 3  # renewals, after which an owner on another machine counts as dead
_LOOK = 1.0  # seconds between two looks at one's own lease on a disk


_MOST = 1 << 16  # bytes of a lease; one that is longer isn't ours
_FORM: dict[str, Any] = {
    "host": str,
    "machine": str,
    "pid": int,
    "started": str,
    "interval": (int, float),
    "released": bool,
}
_FORM |= {"nonce": str, "acquired_at": str, "renewed_at": str, "renewals": int}


class LeaseHeldError(Exception):
    """Another process trains this run; the message names its host, process and age."""


class LeaseLostError(Exception):
    """This process owned the run, and another one does by now."""


class Lease:
    """The ownership of a run, from :meth:`acquire` to :meth:`release`.

    Attributes:
        lost: whether the last renewal or check found another owner.
    """

    def __init__(self, storage: Storage, number: int, record: dict[str, Any]) -> None:
        self.number, self.lost = number, False
        self._storage, self._record = storage, record
        self._looked = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def acquire(cls, storage: Storage, *, interval: float = 10.0, log: Callable[[str], None] = print) -> Lease:
        """Take the lease of the run whose directory ``storage`` is, and keep renewing it.

        An owner that died on this machine is succeeded at once. One on another machine is watched: if it renews its
        lease it is alive, if it misses three renewals it is dead.

        Args:
            interval: seconds between renewals.

        Raises:
            LeaseHeldError: the owner is alive.
            StorageError: the directory can't be read or written.
        """
        storage = storage.sub(".lease")
        storage.makedirs()
        record: dict[str, Any] = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
        record |= {"started": started(os.getpid()), "interval": interval, "renewals": 0, "released": False}
        record["nonce"] = secrets.token_hex(8)  # no two owners write the same
        while True:
            numbers = _numbers(storage)
            if numbers:
                _wait_for_end(storage, numbers[-1], log)
            number = numbers[-1] + 1 if numbers else 1
            record["acquired_at"] = utc_now()
            if not storage.create_exclusive(_name(number), json.dumps(record).encode()):
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
        """The lease that another process of this job holds and renews: for looking whether the job still owns the run."""
        lease = cls(storage.sub(".lease"), number, {"nonce": nonce, "interval": 10.0})
        lease._over.set()
        return lease

    @property
    def nonce(self) -> str:
        """What no other owner has."""
        return str(self._record["nonce"])

    def check(self, patience: float | None = None) -> int:
        """The number of this lease, whose own file, with its own nonce, is still the last one.

        Args:
            patience: seconds for which a storage that fails is tried again; by default as long as when it was acquired.

        Raises:
            LeaseLostError: another process owns the run by now, or its directory is gone.
            StorageError: it can't be looked up.
        """
        storage = self._storage
        if patience is not None:
            storage = storage.sub("", patience=patience)
        last, mine = (_numbers(storage) or [0])[-1], _read(storage, self.number)
        if self.lost or last > self.number or mine is None or mine.get("nonce") != self.nonce:
            self.lost = True
            if last == 0:
                place = storage.location.removesuffix("/.lease")
                raise LeaseLostError(
                    f"{place} (or the lease in it) was deleted or moved: this process must stop, writing nothing"
                )
            owner = _read(storage, last)
            told = _describe(owner) if owner is not None else "gone again"
            raise LeaseLostError(f"the run has had another owner since ({told}): this process must stop")
        self._looked = time.monotonic()
        return self.number

    def assure(self) -> None:
        """As :meth:`check`, but looks only where a renewal is overdue, as after a sleep: cheap, for every record.

        Raises:
            LeaseLostError: another process owns the run by now.
        """
        if self.lost or time.monotonic() - self._looked > 2 * self._record["interval"]:
            self.check()

    def release(self) -> None:
        """Let the next start take the run at once. May be called twice; a store that fails now is no matter."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(timeout=2.0)  # it may be trying again to reach a store that is away
        self._storage.patience = min(self._storage.patience, 5.0)
        self._record["released"] = True
        with contextlib.suppress(StorageError, LeaseLostError, OSError):
            self.check()
            self._write()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        interval, renewed = self._record["interval"], time.monotonic()
        # A disk is asked more often than the lease is renewed: where a run is deleted, little more is to be written.
        pause = min(interval, _LOOK) if self._storage.is_local else interval
        while not self.lost and not self._over.wait(pause):
            # An outage is no loss: whoever takes the run over meanwhile is found by its number.
            with contextlib.suppress(StorageError, LeaseLostError, OSError):
                self.check()
                if time.monotonic() - renewed >= interval - pause / 2:
                    self._record["renewals"] += 1
                    self._record["renewed_at"] = utc_now()
                    self._write()
                    renewed = time.monotonic()

    def _write(self) -> None:
        self._storage.write_atomic(_name(self.number), json.dumps(self._record).encode())


def look_at_owner(storage: Storage) -> tuple[bool, str | None]:
    """For people to see: whether the owner of the run in ``storage`` seems alive, and when it last said so (ISO 8601).

    On this machine its process tells; elsewhere the age of its last renewal does, as far as both clocks agree.
    """
    storage = storage.sub(".lease")
    numbers = _numbers(storage)
    record = _read(storage, numbers[-1]) if numbers else None
    if record is None:
        return False, None
    seen = record.get("renewed_at") or record.get("acquired_at")
    if record["released"]:
        return False, seen
    if record["machine"] == machine():
        return _is_alive(record["pid"], record["started"]), seen
    age = (datetime.now(UTC) - datetime.fromisoformat(seen)).total_seconds() if seen else 0.0
    return age < 2 * _MISSED * record["interval"], seen


def _wait_for_end(storage: Storage, number: int, log: Callable[[str], None]) -> None:
    """Return when the lease of that number is over.

    Raises:
        LeaseHeldError: its owner is alive.
    """
    seen, since = None, time.monotonic()
    while True:
        record = _read(storage, number)
        if record is None:
            return
        owner, near = _describe(record), record["machine"] == machine()
        held = f"{storage.location.removesuffix('/.lease')} is being trained by {owner}"
        patience = _MISSED * record["interval"]
        if record["released"] or (near and not _is_alive(record["pid"], record["started"])):
            return
        if near or (seen is not None and record != seen):
            renewed = "" if near else ", which has just renewed its lease"
            raise LeaseHeldError(f"{held}{renewed}; stop that job first, or give this one another run.name")
        if time.monotonic() - since > patience:
            log(f"took the run over from {owner}: no sign of life for {patience:g} s")
            return
        if seen is None:
            log(f"{held}: waiting up to {patience:g} s for a sign of life")
        seen = record
        time.sleep(min(1.0, record["interval"] / 4))


def _is_alive(pid: int, since: str) -> bool:
    """Whether that process is there, and no later one of its number."""
    return process_state(pid) != "gone" and started(pid) in ("", since)


def _numbers(storage: Storage) -> list[int]:
    return sorted(int(name[:-5]) for name in storage.list() if name.endswith(".json") and name[:-5].isdecimal())


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _read(storage: Storage, number: int) -> dict[str, Any] | None:
    """A lease's record; None if it isn't there.

    One that can't be read has an owner that may be alive, and gets the usual time to show it.
    """
    record: dict[str, Any] = {
        "host": "an unknown host (its lease can't be read)",
        "machine": None,
        "pid": 0,
        "started": "",
    }
    record |= {"interval": 10.0, "released": False}
    try:
        told = json.loads(storage.read_bytes(_name(number), most=_MOST))
        if all(isinstance(told[name], form) for name, form in _FORM.items() if name in told):
            for name in ("acquired_at", "renewed_at"):
                datetime.now(UTC) - datetime.fromisoformat(told.get(name, "2026-01-01T00:00:00Z"))  # or it raises
            if 0 < told.get("interval", 10.0) <= 3600:
                record.update(told)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError, IsADirectoryError):
        pass
    return record


def _describe(record: dict[str, Any]) -> str:
    now = datetime.now(UTC)
    since = record.get("acquired_at", now.isoformat())
    age = (now - datetime.fromisoformat(since)).total_seconds()
    return f"process {record['pid']} on {record['host']}, for {max(age, 0):.0f} s (since {since})"
