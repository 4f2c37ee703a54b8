"""Saving while training continues, keeping the newest and the best, and finding the checkpoint to resume from."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.publish import OwnedStore, Writing
from dist_train.checkpoint.staging import HostCopy
from dist_train.checkpoint.store import CheckpointStore, Found
from dist_train.runtime.lease import Lease, LeaseLostError
from dist_train.runtime.storage import Storage

LOG = logging.getLogger("dist_train")  # routine lines go to the log file, not to the terminal


@dataclass(frozen=True)
class SavePolicy:
    """How checkpoints are saved and which are kept."""

    keep_last: int = 3
    keep_best: tuple[str, str] | None = None
    """A metric and ``min`` or ``max``: the best checkpoint by it is kept beside the newest."""
    asynchronous: bool = True
    """Write in a thread; else in :meth:`CheckpointManager.save` itself, which then keeps no buffer."""
    on_error: Literal["fail", "warn"] = "fail"
    """``warn`` logs a failed save where ``fail`` raises, unless the run has another owner by now."""


class CheckpointManager:
    """The checkpoints, in their directory `storage`, of the run that this process trains. One process of a run has one (rank 0).

    The blocking part of an asynchronous save is a copy to host memory; a thread writes and publishes. At most one save
    is in flight: the next one waits for it. Leftovers of killed saves are swept before anything else is done. The lease is
    checked right before anything is published or deleted; `log` takes one line, from any thread.

    Attributes:
        published: step of the last checkpoint that this process published, or found to resume from.
        tolerated: the failure of the last save, if it was only logged.
    """

    def __init__(
        self,
        storage: Storage,
        policy: SavePolicy | None = None,
        *,
        log: Callable[[str], None] = print,
        lease: Lease | None = None,
    ) -> None:
        self._log, self._lease = log, lease
        self._store = OwnedStore(storage, log, lease)
        self._policy = policy or SavePolicy()
        self._copier = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._swept = False
        self.published: int | None = None
        self.tolerated: CheckpointError | None = None

    def assure_owner(self) -> None:
        """Before a record that a successor writes too: raises LeaseLostError if the run has another owner by now.

        With a URL nothing is checked here: records are written locally, and uploaded after a check.
        """
        if self._lease is not None and self._store.storage.is_local:
            self._lease.assure()

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        meta: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        before_publish: Callable[[], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Save the state after ``step`` optimizer steps; an existing checkpoint of that step is replaced.

        Args:
            parts: name to state tree (tensors, numbers, strings, dicts, lists, tuples); ``<name>.pt`` each.
            meta: JSON, into the manifest.
            metrics: measured at this step.
            before_publish: called when all files are written, in the writing thread; if it raises, the save fails.
            wait: return when it is published.

        Raises:
            TypeError, ValueError: a part or ``meta`` that can't be saved so that loading runs no code.
            CheckpointError: an earlier save failed; or this one did and was waited for.
        """
        started = time.monotonic()
        self.poll()
        if self._thread is not None:
            self.wait()
            waited = time.monotonic() - started
            (self._log if waited >= 1 else LOG.info)(f"step {step}: waited {waited:.1f} s for the previous save")
        # JSON has no NaN, and the caller may change its dictionaries while the thread writes.
        frozen = json.loads(json.dumps(meta, allow_nan=False))
        state = self._copier.take(dict(parts))
        write = partial(self._write, step, state, frozen, dict(metrics or {}), before_publish, started)
        if self._policy.asynchronous and not wait:
            self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()
            if not self._policy.asynchronous:
                self._copier.release()
        self.poll()

    def poll(self) -> None:
        """Raise what the writing thread or the renewal of the lease has found; cheap, for every step.

        Raises:
            CheckpointError: the save in flight failed; names step, file and cause. The manager can still be used.
            LeaseLostError: another process owns the run by now, or its directory was deleted.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            if self._policy.on_error == "fail" or isinstance(error.__cause__, LeaseLostError):
                raise error
            self.tolerated = error
            LOG.warning("%s; training continues, as checkpoint.on_error says", error)
        elif self._lease is not None and self._lease.lost:
            self._lease.check()

    def wait(self) -> None:
        """Wait until no save is in flight. Raises as :meth:`poll`."""
        if self._thread is not None:
            self._thread.join()
        self.poll()

    def close(self) -> None:
        """Wait, and free the host buffer. Raises as :meth:`poll`."""
        try:
            self.wait()
        finally:
            self._copier.release()

    def newest(self) -> Found | None:
        """As :meth:`CheckpointStore.newest`; corrupted ones are quarantined with a line each."""
        self._sweep_once()
        found = self._store.newest()
        self.published = found.step if found else None
        return found

    def best(self) -> Found | None:
        """The best by ``keep_best``, as :meth:`CheckpointStore.best`; corrupted ones are quarantined."""
        return self._store.best(*self._policy.keep_best) if self._policy.keep_best else None

    def find(self, name: str) -> Found:
        """As :meth:`CheckpointStore.find`. Read-only, so that any process may call it."""
        return CheckpointStore(self._store.storage, self._log).find(name)

    def _sweep_once(self) -> None:
        if not self._swept:
            self._store.sweep()
            self._swept = True

    def _write(
        self,
        step: int,
        state: dict[str, Any],
        meta: dict[str, Any],
        metrics: dict[str, float],
        before_publish: Callable[[], None] | None,
        started: float,
    ) -> None:
        writing = None
        try:
            self._sweep_once()
            writing = Writing(self._store.storage, step)
            for name, part in state.items():
                writing.add(f"{name}.pt", partial(torch.save, part))
            if before_publish is not None:
                self._store.check()
                before_publish()
            self._store.publish(writing, metrics, meta)
        except BaseException as error:
            if writing is not None:
                writing.discard()
            before = "nothing was published before" if self.published is None else f"step {self.published} is untouched"
            failure = CheckpointError(f"saving step {step} in {self._store.storage.location} failed: {error}; {before}")
            failure.__cause__ = error
            self._error = failure
            return
        self.published, self.tolerated = step, None
        size = sum(entry.bytes for entry in writing.files.values()) / 1e6
        LOG.info("step %d: saved %.1f MB in %.1f s", step, size, time.monotonic() - started)
        try:
            self._retain(step)
        except Exception as error:
            # The new checkpoint is published. What couldn't be deleted is tried again after the next save.
            self._log(f"an older checkpoint could not be deleted: {error}")

    def _retain(self, step: int) -> None:
        found = list(self._store.published())
        keep = {one.step for one in found[: self._policy.keep_last]}
        if self._policy.keep_best is not None:
            keep |= set(self._store.ranked(*self._policy.keep_best)[:1])
        self._store.check()
        for one in found:
            if one.step < step and one.step not in keep:
                self._store.remove(one)
