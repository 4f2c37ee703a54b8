"""Saving while training goes on, keeping the newest and the best, finding what to go on from."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.publish import OwnedStore, Writing
from dist_train.checkpoint.staging import HostCopy
from dist_train.checkpoint.store import CheckpointStore, Found
from dist_train.runtime.lease import Lease, LeaseLostError
from dist_train.runtime.storage import Storage

LOG = logging.getLogger("dist_train")  # what is no news goes to the log file, not to the terminal


class CheckpointManager:
    """The checkpoints of the run that this process trains. One process of a run has one (rank 0).

    The blocking part of an asynchronous save is a copy to host memory; a thread writes and publishes. At most one save
    is in flight: another waits for it. Leftovers of killed saves are swept before anything else is done.

    Args:
        storage: the directory of the checkpoints.
        keep_last: how many of the newest to keep.
        keep_best: name of a metric and ``min`` or ``max``: the best by it is kept too.
        asynchronous: ``False`` writes in :meth:`save` itself, and keeps no buffer.
        log: takes one line, from any thread.
        lease: checked right before anything is published or deleted.
        on_error: ``warn`` logs that a save failed where ``fail`` raises, unless the run has another owner by now.
        before_publish: called with the step when all files are written, in the writing thread; may raise.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        keep_last: int = 3,
        keep_best: tuple[str, str] | None = None,
        asynchronous: bool = True,
        log: Callable[[str], None] = print,
        lease: Lease | None = None,
        on_error: str = "fail",
        before_publish: Callable[[int], None] | None = None,
    ) -> None:
        self._log = log
        self._store = OwnedStore(storage, log, lease)
        self._lease = lease
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._asynchronous = asynchronous
        self._before_publish = before_publish
        self._tolerant = on_error == "warn"
        self._copier = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self.tolerated: CheckpointError | None = None
        """The failure of the last save, if it was only logged."""
        self._swept = False
        self.published: int | None = None
        """Step of the last checkpoint that this process published or found to go on from."""

    def assure_owner(self) -> None:
        """To be called before something is written that a successor writes too: a zombie's records must not mix in.

        Under a URL nothing is looked up, since records grow on this host, and are uploaded after a check.

        Raises:
            LeaseLostError: another process owns the run by now.
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
        wait: bool = False,
    ) -> None:
        """Save the state after ``step`` optimizer steps; a checkpoint of that step that is there is replaced.

        Args:
            parts: name to state tree (tensors, numbers, strings, dicts, lists, tuples); ``<name>.pt`` each.
            meta: JSON, into the manifest.
            metrics: measured at this step.
            wait: return when it is published.

        Raises:
            TypeError, ValueError: a part or ``meta`` that can't be saved so that loading runs no code.
            CheckpointError: an earlier save failed; or this one did and was waited for.
        """
        started = time.monotonic()
        self.poll()
        if self._thread is not None:
            self.wait()
            self._log(f"step {step}: waited {time.monotonic() - started:.1f} s for the save before")
        # NaN has no place in JSON, and the caller may change its dictionaries while the thread writes.
        frozen = json.loads(json.dumps(meta, allow_nan=False))
        state = self._copier.take(dict(parts))
        arguments = (step, state, frozen, dict(metrics or {}), started)
        if self._asynchronous and not wait:
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(*arguments)
            if not self._asynchronous:
                self._copier.release()
        self.poll()

    def poll(self) -> None:
        """Report what the writing thread did, and whether the lease was found lost; cheap, for every step.

        Raises:
            CheckpointError: the save in flight failed; names step, file and cause. The manager can be used on.
            LeaseLostError: another process owns the run by now, or its directory is gone.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            if not self._tolerant or isinstance(error.__cause__, LeaseLostError):
                raise error
            self.tolerated = error
            LOG.warning("%s; going on, as checkpoint.on_error says", error)
        elif self._lease is not None and self._lease.lost:
            self._lease.check()

    def wait(self) -> None:
        """Wait until no save is in flight. Raises as :meth:`poll`."""
        if self._thread is not None:
            self._thread.join()
        self.poll()

    def close(self) -> None:
        """Wait, and give the host buffer back. Raises as :meth:`poll`."""
        try:
            self.wait()
        finally:
            self._copier.release()

    def newest(self) -> Found | None:
        """The newest that verifies; damaged ones are set aside with a line each. ``None`` if there never was one.

        Raises:
            CheckpointError: there were some and none is whole.
            NewerFormatError, StorageError.
        """
        self._sweep_once()
        found = self._store.newest()
        self.published = found.step if found else None
        return found

    def best(self) -> Found | None:
        """The best by ``keep_best`` that verifies; damaged ones are set aside. ``None`` if none has that metric."""
        return self._store.best(*self._keep_best) if self._keep_best else None

    def find(self, name: str) -> Found:
        """``last`` or ``step-N``, verified; raises as :meth:`CheckpointStore.find`. Any process may ask: it changes nothing."""
        return CheckpointStore(self._store.storage, self._log).find(name)

    def _sweep_once(self) -> None:
        if not self._swept:
            self._store.sweep()
            self._swept = True

    def _write(
        self, step: int, state: dict[str, Any], meta: dict[str, Any], metrics: dict[str, float], started: float
    ) -> None:
        writing = None
        try:
            self._sweep_once()
            writing = Writing(self._store.storage, step)
            for name, part in state.items():
                writing.add(f"{name}.pt", lambda file, part=part: torch.save(part, file))  # type: ignore[misc]
            if self._before_publish is not None:
                self._store.check()
                self._before_publish(step)
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
            # The checkpoint is there. What couldn't be deleted is tried again after the next save.
            self._log(f"an older checkpoint could not be deleted: {error}")

    def _retain(self, step: int) -> None:
        found = list(self._store.published())
        keep = {one.step for one in found[: self._keep_last]}
        if self._keep_best is not None:
            keep |= set(self._store.ranked(*self._keep_best)[:1])
        self._store.check()
        for one in found:
            if one.step < step and one.step not in keep:
                self._store.remove(one)
