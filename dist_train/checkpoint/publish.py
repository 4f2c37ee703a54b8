"""Operations on checkpoints reserved for the run's owner: publish, replace, delete, quarantine, sweep.

On a local disk a checkpoint is assembled in ``.tmp-*`` and renamed to ``step-00000200``; it is deleted by renaming it
to ``.trash-*`` first. Under a URL the data are below ``step-00000200/<attempt>/``, where ``<attempt>`` is drawn for
each save, and the single PUT of ``step-00000200/manifest.json`` publishes them. Nothing published is ever written to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from dist_train.checkpoint.manifest import MANIFEST, CheckpointError, CorruptedError, FileEntry, Manifest
from dist_train.checkpoint.store import CheckpointStore, Found, step_name
from dist_train.files import StorageError, utc_now
from dist_train.runtime.lease import Lease, LeaseLostError
from dist_train.runtime.storage import LocalStorage, Storage


class Writing:
    """A checkpoint that is being written; nobody sees it before :meth:`OwnedStore.publish`."""

    def __init__(self, storage: Storage, step: int) -> None:
        self.attempt, self.step = secrets.token_hex(8), step
        self.sent = (
            False  # whether an object store may have the manifest, whatever it answered: the data stay until a sweep
        )
        self.files: dict[str, FileEntry] = {}
        self._storage = storage
        self._prefix = "" if storage.is_local else f"{self.attempt}/"
        self.directory = f".tmp-{step_name(step)}-{self.attempt}" if storage.is_local else step_name(step)
        storage.makedirs(self.directory)

    def add(self, name: str, produce: Callable[[BinaryIO], object]) -> None:
        """Write one file durably, hashing it on the way. Raises CheckpointError with the file and the cause."""
        key = self._prefix + name
        try:
            length, digest = self._storage.write_stream(f"{self.directory}/{key}", produce)
        except Exception as error:
            raise CheckpointError(f"{name}: {error}") from error
        if length == 0:
            raise CheckpointError(f"{name}: no bytes were written, and no file of a checkpoint is empty")
        self.files[name] = FileEntry(length, digest, key)

    def discard(self) -> None:
        """Delete what was written, as far as possible; the sweep at the next start deletes the rest."""
        with contextlib.suppress(Exception):
            if not self.sent:
                self._storage.delete(f"{self.directory}/{self._prefix}".rstrip("/"))


class OwnedStore(CheckpointStore):
    """The checkpoints of a run, for the process that trains it; `lease` is checked before any is published or deleted."""

    def __init__(self, storage: Storage, log: Callable[[str], None] = print, lease: Lease | None = None) -> None:
        super().__init__(storage, log)
        self._lease = lease

    def check(self) -> int | None:
        """The number of the lease; raises LeaseLostError if the run has another owner by now."""
        return self._lease.check() if self._lease is not None else None

    def publish(self, writing: Writing, metrics: Mapping[str, float], meta: dict[str, Any]) -> None:
        """Make what was written visible, all at once. Raises LeaseLostError if another process owns the run."""
        facts = dict(metrics), meta, utc_now(), self.check()
        body = Manifest(writing.step, writing.files, writing.attempt, *facts).to_bytes()
        if isinstance(self.storage, LocalStorage):
            self._publish_directory(self.storage, writing, body)
        else:
            self._publish_object(writing, body)

    def remove(self, found: Found) -> None:
        """Delete a published one: first what publishes it, so that a kill leaves nothing half visible."""
        if isinstance(self.storage, LocalStorage):
            trash = f".trash-{found.name}-{secrets.token_hex(4)}"
            self.storage.rename(found.name, trash)
            self.storage.delete(trash)
        else:
            self.storage.delete(f"{found.name}/{MANIFEST}")
            self.storage.delete(f"{found.name}/{found.manifest.attempt}")

    def sweep(self) -> None:
        """Delete what killed saves and deletions left behind, before the first save of a start."""
        self.check()
        self.storage.makedirs()
        if isinstance(self.storage, LocalStorage):
            self._sweep_directory(self.storage)
        else:
            self._sweep_objects()

    def _quarantine(self, step: int, reason: str) -> str:
        """Take a corrupted checkpoint out of the way for good, with all its bytes; returns the new name."""
        taken = {name.removesuffix(".json") for name in self.quarantined()}
        stem = f"damaged-{step_name(step)}"
        name = next(f"{stem}-{k}" for k in range(1, len(taken) + 2) if f"{stem}-{k}" not in taken)
        if isinstance(self.storage, LocalStorage):
            self.storage.rename(step_name(step), name)
            return name
        raw = self.storage.read_bytes(f"{step_name(step)}/{MANIFEST}")
        record = {"step": step, "reason": reason, "attempts": self._attempts(step)}
        record |= {"manifest_sha256": hashlib.sha256(raw).hexdigest(), "manifest": raw.decode("utf-8", "replace")}
        self.storage.write_atomic(f"{name}.json", json.dumps(record, indent=1).encode())
        return f"{name}.json"

    def _on_corruption(self, step: int, error: CorruptedError) -> None:
        name = self._quarantine(step, str(error))
        self.log(f"checkpoint {step_name(step)} is corrupted ({error}): quarantined as {name}")

    def _to_replace(self, step: int) -> Found | None:
        """The published checkpoint of this step; a corrupted one is quarantined."""
        try:
            return self.open(step)
        except CorruptedError as error:
            self._on_corruption(step, error)
            return None

    def _has_manifest(self, name: str, body: bytes) -> bool:
        try:
            return self.storage.read_bytes(f"{name}/{MANIFEST}") == body
        except FileNotFoundError:
            return False

    # Local disks
    def _publish_directory(self, storage: LocalStorage, writing: Writing, body: bytes) -> None:
        name, aside = step_name(writing.step), f".replaced-{step_name(writing.step)}-{writing.attempt}"
        storage.write_stream(f"{writing.directory}/{MANIFEST}", lambda file: file.write(body))
        storage.fsync(writing.directory)
        self.check()
        # A directory can't be replaced atomically; `sweep` puts the old one back after a kill between the two renames.
        replaced = self._to_replace(writing.step)
        if replaced:
            storage.rename(name, aside)
        try:
            storage.rename(writing.directory, name)
        except Exception as error:
            if not isinstance(error, FileNotFoundError) or not self._has_manifest(name, body):
                if replaced:
                    storage.rename(aside, name)
                raise
            storage.fsync()  # NFS did it, lost its response, and found nothing to rename when it was asked again
        if replaced:
            with contextlib.suppress(StorageError):
                storage.delete(aside)

    def _sweep_directory(self, storage: LocalStorage) -> None:
        for name in storage.list():
            kind, _, rest = name.partition("-")
            if kind == ".replaced" and not storage.exists(step := rest.rpartition("-")[0]):
                storage.rename(name, step)
            elif kind == ".tmp":
                # Renamed first: a process that still writes there can't publish it any more.
                with contextlib.suppress(FileNotFoundError):
                    storage.rename(name, f".trash-{rest}")
                storage.delete(f".trash-{rest}")
            elif kind in (".replaced", ".trash"):
                storage.delete(name)

    # URLs
    def _publish_object(self, writing: Writing, body: bytes) -> None:
        name, replaced = step_name(writing.step), None
        self.check()
        writing.sent = True
        if not self.storage.create_exclusive(f"{name}/{MANIFEST}", body):
            replaced = self._to_replace(writing.step)
            self.check()
            self.storage.write_atomic(f"{name}/{MANIFEST}", body)
        try:
            self.check()
        except LeaseLostError:
            # It slept between the check and the PUT, and a successor may have swept its data.
            if self._has_manifest(name, body):
                self.storage.delete(f"{name}/{MANIFEST}")
            raise
        if replaced:
            with contextlib.suppress(StorageError):
                self.storage.delete(f"{name}/{replaced.manifest.attempt}")

    def _sweep_objects(self) -> None:
        self.storage.abort_uploads()
        for step in self.steps():
            kept = {attempt for record in self.records(step) for attempt in record["attempts"]}
            try:
                found = self.open(step)
            except CheckpointError:
                continue  # corrupted or newer: it isn't known what belongs to it
            if found is not None:
                kept.add(found.manifest.attempt)
            for attempt in set(self._attempts(step)) - kept:
                self.storage.delete(f"{step_name(step)}/{attempt}")

    def _attempts(self, step: int) -> list[str]:
        return [name for name in self.storage.list(step_name(step)) if name != MANIFEST]
