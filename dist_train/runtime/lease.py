"""One run, one owner: a lease in the run's directory keeps two jobs from training one run.

Each taking of the lease creates ``.lease/<number>.json`` exclusively, with the next number; the highest one owns the
run and renews its file. The number is looked up again before anything is published, so that an owner that slept
through the loss of its lease publishes nothing. No clock is compared with another machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from dist_train.runtime.storage import Storage, StorageError

_MISSED = 3  # renewals, after which an owner on another machine counts as dead


class LeaseHeldError(Exception):
    """Another process trains this run; the message names its host, process and age."""


class LeaseLostError(Exception):
    """This process owned the run, and another one does by now."""


class Lease:
    """The ownership of a run, from :meth:`acquire` to :meth:`release`."""

    def __init__(self, storage: Storage, number: int, record: dict[str, Any]) -> None:
        self.number = number
        self._storage = storage
        self._record = record
        self._lost = False
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
        while True:
            numbers = _numbers(storage)
            last = numbers[-1] if numbers else 0
            if last:
                _wait_for_end(storage, last, log)
            number = last + 1
            record = {**_identity(), "acquired_at": _now(), "interval": interval, "renewals": 0, "released": False}
            if not storage.create_exclusive(_name(number), _encode(record)):
                continue  # another one that waited was faster
            if _numbers(storage)[-1] > number:
                storage.delete(_name(number))  # this one slept while others came and went
                continue
            for old in numbers:
                storage.delete(_name(old))
            lease = cls(storage, number, record)
            lease._thread.start()
            return lease

    def check(self) -> int:
        """The number of this lease.

        Raises:
            LeaseLostError: another process owns the run by now.
        """
        numbers = _numbers(self._storage)
        if self._lost or (numbers and numbers[-1] > self.number):
            self._lost = True
            owner = "gone again"
            with contextlib.suppress(FileNotFoundError, StorageError):
                owner = _describe(_decode(self._storage.read_bytes(_name(numbers[-1]))))
            raise LeaseLostError(f"the run has had another owner since ({owner}): this process must stop")
        self._looked = time.monotonic()
        return self.number

    def assure(self) -> None:
        """As :meth:`check`, but looks only where a renewal is overdue, as after a sleep: cheap, for every record.

        Raises:
            LeaseLostError: another process owns the run by now.
        """
        if self._lost or time.monotonic() - self._looked > 2 * self._record["interval"]:
            self.check()

    @property
    def lost(self) -> bool:
        """Whether the last renewal or check found another owner. Looks at nothing itself."""
        return self._lost

    def release(self) -> None:
        """Let the next start take the run at once. May be called twice; a store that fails now is no matter."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(timeout=2.0)  # it may be trying again to reach a store that is away
        if not self._lost:
            self._storage.patience = min(self._storage.patience, 5.0)
            with contextlib.suppress(StorageError):
                self._storage.write_atomic(_name(self.number), _encode({**self._record, "released": True}))

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        while not self._over.wait(self._record["interval"]):
            # An outage is no loss: whoever takes the run over meanwhile is found by its number.
            with contextlib.suppress(StorageError, LeaseLostError):
                self.check()
                self._record["renewals"] += 1
                self._storage.write_atomic(_name(self.number), _encode(self._record))
            if self._lost:
                return


def _wait_for_end(storage: Storage, number: int, log: Callable[[str], None]) -> None:
    """Return when the lease of that number is over.

    Raises:
        LeaseHeldError: its owner is alive.
    """
    seen, since, told = None, time.monotonic(), False
    while True:
        try:
            raw = storage.read_bytes(_name(number))
        except FileNotFoundError:
            return
        record = _decode(raw)
        held = f"{storage.location.removesuffix('/.lease')} is being trained by {_describe(record)}"
        cure = "stop that job first, or give this one another run.name"
        if record["released"]:
            return
        if record["machine"] == _identity()["machine"]:
            if not _is_alive(record["pid"], record["started"]):
                return
            raise LeaseHeldError(f"{held}; {cure}")
        if seen is not None and raw != seen:
            raise LeaseHeldError(f"{held}, which has just renewed its lease; {cure}")
        seen = raw
        patience = _MISSED * record["interval"]
        if time.monotonic() - since > patience:
            log(f"took the run over from {_describe(record)}: no sign of life for {patience:g} s")
            return
        if not told:
            log(f"{held}: waiting up to {patience:g} s for a sign of life")
            told = True
        time.sleep(min(1.0, record["interval"] / 4))


def _numbers(storage: Storage) -> list[int]:
    return sorted(int(name[:-5]) for name in storage.list() if name.endswith(".json") and name[:-5].isdigit())


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()


def _decode(raw: bytes) -> dict[str, Any]:
    """A lease's record. One that can't be read has an owner that may be alive, and gets the usual time to show it."""
    unknown = {"host": "an unknown host", "machine": None, "pid": 0, "started": "", "acquired_at": _now()}
    try:
        return {**unknown, "interval": 10.0, "released": False, **json.loads(raw)}
    except (ValueError, TypeError):
        return {**unknown, "interval": 10.0, "released": False}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _describe(record: dict[str, Any]) -> str:
    age = (datetime.now(UTC) - datetime.fromisoformat(record["acquired_at"])).total_seconds()
    return f"process {record['pid']} on {record['host']}, for {max(age, 0):.0f} s (since {record['acquired_at']})"


def _identity() -> dict[str, Any]:
    """Who this process is. ``machine`` is where its pid means something: a boot of a kernel and a pid namespace."""
    host = socket.gethostname()
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            machine = f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        machine = host
    return {"host": host, "machine": machine, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str:
    """State and start time (in clock ticks after the boot) of a process; empty if they can't be read."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def _is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, and there
    now = _started(pid)
    return not now or now == started
