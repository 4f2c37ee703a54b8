"""Checkpoints in a directory or under a URL: publishing, finding, checking, setting aside, deleting.

On a local disk a checkpoint is assembled in ``.tmp-*`` and renamed to ``step-00000200``; it is deleted by renaming it
to ``.trash-*`` first. So a ``step-*`` without a valid manifest is damage, and is renamed to ``damaged-step-*``. On an
object store the data lie below ``step-00000200/<attempt>/``, where ``<attempt>`` is drawn for each save, and the single
PUT of ``step-00000200/manifest.json`` publishes them; a prefix without a manifest is a leftover, and what is set aside
is recorded in ``damaged-step-*.json``. Nothing is ever written into what is published.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

import torch

from dist_train.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    DamagedError,
    FileEntry,
    Manifest,
    NewerFormatError,
)
from dist_train.runtime.objectstore import ObjectStorage
from dist_train.runtime.storage import LocalStorage, Storage

_STEP = re.compile(r"step-(\d{8,})$")
_ASIDE = re.compile(r"(damaged|superseded)-step-(\d{8,})-(\d+)(\.json)?$")


def step_name(step: int) -> str:
    """Name of the directory of a step: ``step-00000200``."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Row:
    """One line of ``verify``: ``state`` is ``good``, ``damaged``, ``newer`` or ``set aside``; ``reason`` says why."""

    step: int
    name: str
    state: str
    reason: str = ""


class Found:
    """A published checkpoint."""

    def __init__(self, storage: Storage, name: str, manifest: Manifest) -> None:
        self._storage = storage
        self.name = name
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Found({self.location!r})"

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest.step

    @property
    def meta(self) -> dict[str, Any]:
        """What the engine saved beside the parts."""
        return self.manifest.meta

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics that were measured at this step."""
        return self.manifest.metrics

    @property
    def parts(self) -> list[str]:
        """Names that :meth:`load` takes."""
        return [name.removesuffix(".pt") for name in self.manifest.files if name.endswith(".pt")]

    @property
    def location(self) -> str:
        """Path or URL of its directory."""
        return self._storage.join(self.name)

    def load(self, part: str, map_location: Any = "cpu") -> Any:
        """The state tree of a part, from bytes that were checked just before. Runs no code from the file.

        Raises:
            CheckpointError: there is no such part, or it holds more than plain values.
            DamagedError: its bytes aren't those that were published.
            StorageError: it can't be read now.
        """
        entry = self.manifest.files.get(f"{part}.pt")
        if entry is None:
            raise CheckpointError(f"{self.location} has no part {part!r}; it has {', '.join(self.parts)}")
        try:
            raw = self._storage.read_bytes(f"{self.name}/{entry.key}")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise DamagedError(f"{part}.pt", "missing") from None
        _compare(f"{part}.pt", entry, len(raw), hashlib.sha256(raw).hexdigest())
        try:
            return torch.load(io.BytesIO(raw), map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.location}/{part}.pt is refused: it holds objects that only running code could rebuild "
                f"({str(error).splitlines()[0]})"
            ) from None

    def verify(self) -> None:
        """Read and check every file.

        Raises:
            DamagedError: naming the first file that isn't as it was published.
        """
        for name, entry in self.manifest.files.items():
            try:
                length, digest = self._storage.digest(f"{self.name}/{entry.key}")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise DamagedError(name, "missing") from None
            _compare(name, entry, length, digest)


def _compare(name: str, entry: FileEntry, length: int, digest: str) -> None:
    if length != entry.bytes:
        raise DamagedError(name, f"{length} bytes, but {entry.bytes} were published")
    if digest != entry.sha256:
        raise DamagedError(name, f"its sha256 is {digest[:12]}..., but {entry.sha256[:12]}... was published")


class Writing:
    """A checkpoint being written; invisible until :meth:`CheckpointStore.publish`."""

    def __init__(self, storage: Storage, step: int) -> None:
        self.attempt = secrets.token_hex(8)
        self.step = step
        self.files: dict[str, FileEntry] = {}
        self._storage = storage
        if storage.is_local:
            self.directory, self._prefix = f".tmp-{step_name(step)}-{self.attempt}", ""
            storage.makedirs(self.directory)
        else:
            self.directory, self._prefix = step_name(step), f"{self.attempt}/"

    def add(self, name: str, produce: Callable[[BinaryIO], object]) -> None:
        """Write one file, hashing it on the way.

        Raises:
            CheckpointError: naming the file and the cause.
        """
        key = self._prefix + name
        try:
            length, digest = self._storage.write_stream(f"{self.directory}/{key}", produce)
        except Exception as error:
            raise CheckpointError(f"{name}: {error}") from error
        if length == 0:
            raise CheckpointError(f"{name}: no bytes were written, and no file of a checkpoint is empty")
        self.files[name] = FileEntry(length, digest, key)

    def discard(self) -> None:
        """Delete what was written, as far as possible; the next start's sweep does the rest."""
        with contextlib.suppress(Exception):
            if self._storage.is_local:
                self._storage.delete(self.directory)
            else:
                self._storage.delete(f"{self.directory}/{self.attempt}")


class CheckpointStore:
    """The checkpoints of a run. Finding and checking change nothing; the rest is for the run's one owner.

    Args:
        storage: their directory (a run's ``checkpoints``).
        log: takes one line.
    """

    def __init__(self, storage: Storage, log: Callable[[str], None] = print) -> None:
        self.storage = storage
        self.log = log

    # Reading
    def steps(self) -> list[int]:
        """Steps that have a directory or prefix, in order; on a store that doesn't mean that it is published."""
        return sorted(int(match[1]) for name in self.storage.list() if (match := _STEP.match(name)))

    def open(self, step: int) -> Found | None:
        """The published checkpoint of a step with its manifest checked, its other files not.

        Returns ``None`` if there is none (or, on a store, if it was set aside).

        Raises:
            DamagedError, NewerFormatError, StorageError.
        """
        raw = self._raw_manifest(step_name(step))
        if raw is None or self._is_recorded(step, raw):
            return None
        manifest = Manifest.from_bytes(raw)
        if manifest.step != step:
            raise DamagedError(MANIFEST, f"is that of step {manifest.step}")
        return Found(self.storage, step_name(step), manifest)

    def published(self) -> Iterator[Found]:
        """Those whose manifest is whole, the newest first."""
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedError):
                if found := self.open(step):
                    yield found

    def newest(self, repair: bool = False) -> Found | None:
        """The newest whose every file is as it was published; ``None`` if no checkpoint was ever published.

        Args:
            repair: set damaged ones aside (for the run's owner); otherwise they are just passed over.

        Raises:
            CheckpointError: there were some, and none is whole.
            NewerFormatError, StorageError.
        """
        found, damaged = self._first_whole(list(reversed(self.steps())), repair)
        damaged += [name for name in self._asides() if name.startswith("damaged-")]
        if found is None and damaged:
            raise CheckpointError(
                f"no whole checkpoint is left in {self.storage.location} ({', '.join(sorted(set(damaged)))}): put one "
                "back from a copy, start afresh with checkpoint.resume=never, or give the run another run.name"
            )
        return found

    def best(self, metric: str, mode: str, repair: bool = False) -> Found | None:
        """The whole one with the best value of ``metric`` (``mode`` is ``min`` or ``max``; the first of equal ones)."""
        sign = {"min": 1.0, "max": -1.0}[mode]
        ranked = sorted((sign * f.metrics[metric], f.step) for f in self.published() if metric in f.metrics)
        return self._first_whole([step for _, step in ranked], repair)[0]

    def find(self, name: str) -> Found:
        """``last`` or ``step-200`` (zeros don't matter), verified.

        Raises:
            CheckpointError: there is no such one, with those that are there, or it is damaged.
        """
        found = None
        if name == "last":
            found = self.newest()
        elif match := re.fullmatch(r"(?:step-)?(\d+)", name):
            found = self.open(int(match[1]))
            if found:
                found.verify()
        if found is None:
            there = ", ".join(f.name for f in self.published()) or "none"
            raise CheckpointError(f"no checkpoint {name!r} in {self.storage.location}; there: {there}")
        return found

    def verify_all(self) -> list[Row]:
        """Check every file of every checkpoint, the oldest first, then list what was set aside."""
        rows = []
        for step in self.steps():
            state, reason = "good", ""
            try:
                found = self.open(step)
                if found is None:
                    continue
                found.verify()
            except DamagedError as error:
                state, reason = "damaged", str(error)
            except NewerFormatError as error:
                state, reason = "newer", str(error)
            rows.append(Row(step, step_name(step), state, reason))
        for name in self._asides():
            match = _ASIDE.fullmatch(name)
            assert match
            rows.append(Row(int(match[2]), name, "set aside", match[1]))
        return rows

    # Writing
    def publish(
        self,
        writing: Writing,
        metrics: Mapping[str, float],
        meta: dict[str, Any],
        *,
        check: Callable[[], int | None] = lambda: None,
        replaces: Callable[[Found], bool] = lambda found: False,
    ) -> Manifest:
        """Make what was written visible, all at once.

        Args:
            check: raises if this process doesn't own the run any more, else returns the number of its lease.
            replaces: whether a checkpoint of the same step that is there already may give way.

        Raises:
            CheckpointError: another process published this step.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        manifest = Manifest(writing.step, writing.files, writing.attempt, dict(metrics), meta, now, check())
        if isinstance(self.storage, LocalStorage):
            self._publish_directory(self.storage, writing, manifest, check, replaces)
        else:
            self._publish_object(writing, manifest, check, replaces)
        return manifest

    def remove(self, found: Found) -> None:
        """Delete a published one: what publishes it first, so that a kill leaves no half of it to be seen."""
        if isinstance(self.storage, LocalStorage):
            trash = f".trash-{found.name}-{secrets.token_hex(4)}"
            self.storage.rename(found.name, trash)
            self.storage.delete(trash)
        else:
            self.storage.delete(f"{found.name}/{MANIFEST}")
            self.storage.delete(f"{found.name}/{found.manifest.attempt}")

    def set_aside(self, step: int, kind: str, file: str, reason: str) -> str:
        """Take a checkpoint out of the way for good, with all its bytes (``kind``: damaged, superseded)."""
        taken = {name.removesuffix(".json") for name in self._asides()}
        stem = f"{kind}-{step_name(step)}"
        name = next(f"{stem}-{k}" for k in range(1, len(taken) + 2) if f"{stem}-{k}" not in taken)
        if isinstance(self.storage, LocalStorage):
            self.storage.rename(step_name(step), name)
            return name
        raw = self.storage.read_bytes(f"{step_name(step)}/{MANIFEST}")
        record = {"step": step, "manifest_sha256": hashlib.sha256(raw).hexdigest(), "attempts": self._attempts(step)}
        record |= {"file": file, "reason": reason, "manifest": raw.decode("utf-8", "replace")}
        self.storage.write_atomic(f"{name}.json", json.dumps(record, indent=1).encode())
        return f"{name}.json"

    def supersede(self, after: int) -> None:
        """Set aside what lies after the step that a run goes on from, when it was told to go on from an older one."""
        for step in self.steps():
            if step > after and self._is_there(step):
                name = self.set_aside(step, "superseded", MANIFEST, f"the run goes on from step {after}")
                self.log(f"{step_name(step)} lies after step {after}, from which the run goes on: kept as {name}")

    def sweep(self) -> None:
        """Delete what killed saves and deletions left behind; only the owner of the run may, before it saves."""
        if isinstance(self.storage, LocalStorage):
            self._sweep_directory(self.storage)
        else:
            self._sweep_objects()

    # Local disks
    def _publish_directory(
        self,
        storage: LocalStorage,
        writing: Writing,
        manifest: Manifest,
        check: Callable[[], int | None],
        replaces: Callable[[Found], bool],
    ) -> None:
        name = step_name(writing.step)
        body = manifest.to_bytes()
        storage.write_stream(f"{writing.directory}/{MANIFEST}", lambda file: file.write(body))
        storage.fsync(writing.directory)
        check()
        aside = f".replaced-{name}-{writing.attempt}"
        replaced = self._give_way(writing.step, replaces)
        if replaced:
            storage.rename(name, aside)
        try:
            storage.rename(writing.directory, name)
        except Exception:
            if replaced:
                storage.rename(aside, name)
            raise
        if replaced:
            storage.delete(aside)

    def _sweep_directory(self, storage: LocalStorage) -> None:
        for name in storage.list():
            if name.startswith(".replaced-"):
                step = name.removeprefix(".replaced-").rsplit("-", 1)[0]
                if not storage.exists(step):  # killed between two renames: the old one is the whole one
                    storage.rename(name, step)
                    continue
            elif name.startswith(".tmp-"):
                # Renamed first: a process that still writes there can't publish it any more.
                trash = f".trash-{name.removeprefix('.tmp-')}"
                with contextlib.suppress(FileNotFoundError):
                    storage.rename(name, trash)
                name = trash
            elif not name.startswith(".trash-"):
                continue
            storage.delete(name)

    # Object stores
    def _publish_object(
        self,
        writing: Writing,
        manifest: Manifest,
        check: Callable[[], int | None],
        replaces: Callable[[Found], bool],
    ) -> None:
        key, body = f"{step_name(writing.step)}/{MANIFEST}", manifest.to_bytes()
        check()
        replaced = None
        if not self.storage.create_exclusive(key, body):
            replaced = self._give_way(writing.step, replaces)
            check()
            self.storage.write_atomic(key, body)
        try:
            check()
        except Exception:
            # It slept between the check and the PUT, and a successor may have swept its data.
            with contextlib.suppress(FileNotFoundError):
                if self.storage.read_bytes(key) == body:
                    self.storage.delete(key)
            raise
        if replaced:
            self.storage.delete(f"{step_name(writing.step)}/{replaced.manifest.attempt}")

    def _sweep_objects(self) -> None:
        assert isinstance(self.storage, ObjectStorage)
        self.storage.abort_uploads()
        for step in self.steps():
            name, kept = step_name(step), self._kept_attempts(step)
            try:
                found = self.open(step)
            except CheckpointError:
                continue  # damaged or newer: what belongs to it can't be told
            if found is not None:
                kept.add(found.manifest.attempt)
            for attempt in set(self._attempts(step)) - kept:
                self.storage.delete(f"{name}/{attempt}")

    def _attempts(self, step: int) -> list[str]:
        return [name for name in self.storage.list(step_name(step)) if name != MANIFEST]

    def _kept_attempts(self, step: int) -> set[str]:
        """Attempts whose data belong to what was set aside."""
        return {attempt for record in self._records(step) for attempt in record["attempts"]}

    def _records(self, step: int) -> Iterator[dict[str, Any]]:
        for name in self._asides():
            if name.endswith(".json") and f"-{step_name(step)}-" in name:
                yield json.loads(self.storage.read_bytes(name))

    def _is_recorded(self, step: int, raw: bytes) -> bool:
        if self.storage.is_local:
            return False
        digest = hashlib.sha256(raw).hexdigest()
        return any(record["manifest_sha256"] == digest for record in self._records(step))

    # Both
    def _asides(self) -> list[str]:
        return [name for name in self.storage.list() if _ASIDE.fullmatch(name)]

    def _raw_manifest(self, name: str) -> bytes | None:
        for _ in range(2):  # it may be published, whole, between the first read and the look at its directory
            try:
                return self.storage.read_bytes(f"{name}/{MANIFEST}")
            except (IsADirectoryError, NotADirectoryError):
                raise DamagedError(MANIFEST, "not a file") from None
            except FileNotFoundError:
                if not self.storage.is_local or not self.storage.exists(name):
                    return None
        raise DamagedError(MANIFEST, "missing")

    def _is_there(self, step: int) -> bool:
        try:
            return self.open(step) is not None
        except CheckpointError:
            return True

    def _give_way(self, step: int, replaces: Callable[[Found], bool]) -> Found | None:
        """The one that is there already if it may be replaced; damage is set aside."""
        try:
            found = self.open(step)
        except DamagedError as error:
            self._report(step, error, repair=True)
            return None
        if found is not None and not replaces(found):
            raise CheckpointError(
                f"{found.location} was published by another process (lease {found.manifest.lease}, at "
                f"{found.manifest.created_at}): two jobs train this run; stop one"
            )
        return found

    def _first_whole(self, steps: list[int], repair: bool) -> tuple[Found | None, list[str]]:
        damaged: list[str] = []
        for step in steps:
            try:
                found = self.open(step)
                if found is not None:
                    found.verify()
                    return found, damaged
            except DamagedError as error:
                if self._is_there(step):  # else its owner deleted it while it was read
                    damaged.append(step_name(step))
                    self._report(step, error, repair)
        return None, damaged

    def _report(self, step: int, error: DamagedError, repair: bool) -> None:
        fate = "passed over"
        if repair:
            fate = "set aside as " + self.set_aside(step, "damaged", error.file, error.reason)
        self.log(f"checkpoint {step_name(step)} is damaged ({error}): {fate}")


def find_at(location: str, log: Callable[[str], None] = print, **options: Any) -> Found:
    """The checkpoint at a path or URL: of a checkpoint itself, of a ``checkpoints`` directory or of a run.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    parent, _, name = location.rstrip("/").rpartition("/")
    if _STEP.match(name):
        return CheckpointStore(Storage(parent or ".", **options), log).find(name)
    storage = Storage(location, **options)
    if not any(_STEP.match(entry) for entry in storage.list()):
        storage = storage.sub("checkpoints")
    return CheckpointStore(storage, log).find("last")
