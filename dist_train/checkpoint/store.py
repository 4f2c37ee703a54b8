"""Checkpoints in a directory or under a URL: listing, selecting and verifying. Read-only.

A checkpoint is ``step-00000200/`` with ``manifest.json`` and the files that it names. On a local disk one without a
valid manifest is corrupted, since checkpoints come and go there by renames; under a URL it is the leftover of a save
that was killed, since there the manifest is what publishes. Quarantined ones (``damaged-step-*``: a directory, or under
a URL a record in a file) are skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dist_train.checkpoint.manifest import MANIFEST, CheckpointError, CorruptedError, Manifest, NewerFormatError
from dist_train.runtime.storage import Storage, open_storage

T = TypeVar("T")

_STEP = re.compile(r"step-(\d{8,})")
_QUARANTINED = re.compile(r"damaged-step-(\d{8,})-\d+(\.json)?")


def step_name(step: int) -> str:
    """Name of the directory of a step: ``step-00000200``."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Row:
    """One line of ``verify``: ``state`` is ``good``, ``corrupted``, ``newer`` or ``quarantined``; ``reason`` says why."""

    step: int
    name: str
    state: str
    reason: str = ""


class Found:
    """A published checkpoint: `name` and `location` (path or URL) are its directory's, `parts` the names :meth:`load` takes."""

    def __init__(self, storage: Storage, name: str, manifest: Manifest) -> None:
        self._storage = storage
        self.name, self.location, self.manifest = name, storage.join(name), manifest
        self.step, self.meta, self.metrics = manifest.step, manifest.meta, manifest.metrics
        self.parts = [file.removesuffix(".pt") for file in manifest.files if file.endswith(".pt")]

    def load(self, part: str, map_location: Any = "cpu") -> Any:
        """The state tree of a part, from bytes that were hashed just before. Runs no code from the file.

        Raises:
            CheckpointError: there is no such part, or it holds more than plain values.
            CorruptedError: its bytes aren't those that were published.
        """
        if part not in self.parts:
            raise CheckpointError(f"{self.location} has no part {part!r}; it has {', '.join(self.parts)}")
        raw = self._read(f"{part}.pt", self._storage.read_bytes)
        self._compare(f"{part}.pt", len(raw), hashlib.sha256(raw).hexdigest())
        import torch  # whether a run is completed is known without it

        try:
            return torch.load(io.BytesIO(raw), map_location=map_location, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # the bytes are as they were published, whoever published them
            code = isinstance(error, pickle.UnpicklingError)
            why = "it holds objects that only running code could rebuild" if code else "torch.save didn't write it"
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"{self.location}/{part}.pt is refused: {why} ({line})") from None

    def value(self, name: str, kind: Any) -> Any:
        """The value of that name in the manifest's ``meta``. Raises CorruptedError if it isn't of that type, or missing."""
        if not isinstance(self.meta.get(name), kind):
            raise CorruptedError(MANIFEST, f"meta.{name} is {self.meta.get(name)!r:.80}")
        return self.meta[name]

    def verify(self) -> None:
        """Read and hash every file. Raises CorruptedError with the first one that isn't as it was published."""
        for file in self.manifest.files:
            self._compare(file, *self._read(file, self._storage.digest))

    def _read(self, file: str, how: Callable[[str], T]) -> T:
        try:
            return how(f"{self.name}/{self.manifest.files[file].key}")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise CorruptedError(file, "missing") from None

    def _compare(self, file: str, length: int, digest: str) -> None:
        entry = self.manifest.files[file]
        if length != entry.bytes:
            raise CorruptedError(file, f"{length} bytes, but {entry.bytes} were published")
        if digest != entry.sha256:
            raise CorruptedError(file, f"its sha256 is {digest[:12]}..., but {entry.sha256[:12]}... was published")


def ranking_key(metrics: Mapping[str, float], metric: str, mode: str) -> tuple[float, float] | None:
    """The key to rank evaluations by, the best first: the metric, then the loss. None if the metric isn't finite."""
    value, loss = metrics.get(metric, math.nan), metrics.get("val/loss", math.nan)
    if not math.isfinite(value):
        return None
    return {"min": 1.0, "max": -1.0}[mode] * value, math.inf if math.isnan(loss) else loss


class CheckpointStore:
    """The checkpoints of a run (whose directory ``checkpoints`` the storage is), for reading; ``log`` takes one line."""

    def __init__(self, storage: Storage, log: Callable[[str], None] = print) -> None:
        self.storage = storage
        self.log = log

    def steps(self) -> list[int]:
        """Steps that have a directory or a prefix, in order; under a URL that doesn't mean that it is published."""
        return sorted(int(match[1]) for name in self.storage.list() if (match := _STEP.fullmatch(name)))

    def quarantined(self) -> list[str]:
        """Names of the directories or records of quarantined checkpoints."""
        return [name for name in self.storage.list() if _QUARANTINED.fullmatch(name)]

    def open(self, step: int, *, verify: bool = False) -> Found | None:
        """The published checkpoint of a step; ``None`` if there is none. Its manifest is checked, its files if ``verify``.

        Raises CorruptedError or NewerFormatError.
        """
        raw = self._raw_manifest(step_name(step))
        if raw is None:
            return None
        digest = hashlib.sha256(raw).hexdigest()
        if any(record["manifest_sha256"] == digest for record in self.records(step)):
            return None
        manifest = Manifest.from_bytes(raw)
        if manifest.step != step:
            raise CorruptedError(MANIFEST, f"is that of step {manifest.step}")
        found = Found(self.storage, step_name(step), manifest)
        if verify:
            found.verify()
        return found

    def published(self) -> Iterator[Found]:
        """Those whose manifest is valid, the newest first."""
        for step in reversed(self.steps()):
            with contextlib.suppress(CorruptedError, NewerFormatError):
                if found := self.open(step):
                    yield found

    def newest(self) -> Found | None:
        """The newest whose every file is as it was published; ``None`` if no checkpoint was ever published.

        Raises CheckpointError if there were some, and none is intact, and NewerFormatError for a newer one.
        """
        found, corrupted = self._first_intact(self.steps()[::-1])
        corrupted |= set(self.quarantined())
        if found is None and corrupted:
            raise CheckpointError(
                f"no intact checkpoint is left in {self.storage.location} ({', '.join(sorted(corrupted))}): put one back "
                "from a copy, or give the run another run.name to start over"
            )
        return found

    def ranked(self, metric: str, mode: str) -> list[int]:
        """Steps from the best to the worst by ``metric`` (``mode`` is ``min`` or ``max``), without those where it is NaN."""
        measured = [(ranking_key(found.metrics, metric, mode), found.step) for found in self.published()]
        return [step for key, step in sorted((key, step) for key, step in measured if key is not None)]

    def best(self, metric: str, mode: str) -> Found | None:
        """The best of the intact ones, or ``None`` if none has the metric."""
        return self._first_intact(self.ranked(metric, mode))[0]

    def find(self, name: str | None = None) -> Found:
        """``best``, ``last``, ``step-200`` (zeros don't matter), or by default best if one is kept, else last; verified.

        Raises:
            CheckpointError: there is none of that name; lists those that exist.
            CorruptedError: it isn't intact.
        """
        found, match = None, re.fullmatch(r"(?:step-)?(\d+)", name or "")
        if match:
            try:
                found = self.open(int(match[1]), verify=True)
            except CorruptedError:
                if self.has(int(match[1])):
                    raise  # else its owner deleted it while it was read
        elif name in (None, "best", "last") and (newest := self.newest()):
            kept = newest.value("best", list | None) if name != "last" else None
            found = self.best(*kept) if kept else None
            if name == "best" and found is None:
                raise CheckpointError(f"{self.storage.location} keeps no best checkpoint; use last or step-N")
            found = found or newest
        if found is None:
            known = ", ".join(f.name for f in self.published()) or "none"
            raise CheckpointError(f"no checkpoint {name or 'last'!r} in {self.storage.location}; found: {known}")
        return found

    def verify_all(self) -> list[Row]:
        """Check every file of every checkpoint, the oldest first; then list the quarantined ones."""
        rows = []
        for step in self.steps():
            try:
                if self.open(step, verify=True):
                    rows.append(Row(step, step_name(step), "good"))
            except (CorruptedError, NewerFormatError) as error:
                state = "corrupted" if isinstance(error, CorruptedError) else "newer"
                rows.append(Row(step, step_name(step), state, str(error)))
        return rows + [Row(int(name.split("-")[2]), name, "quarantined", "corrupted") for name in self.quarantined()]

    def records(self, step: int) -> Iterator[dict[str, Any]]:
        """The quarantine records of a step's manifests (under a URL)."""
        for name in self.quarantined():
            if name.endswith(".json") and f"-{step_name(step)}-" in name:
                try:
                    record = json.loads(self.storage.read_bytes(name))
                    if isinstance(record["manifest_sha256"], str) and isinstance(record["attempts"], list):
                        yield record
                except (ValueError, KeyError, TypeError, RecursionError):
                    self.log(f"{self.storage.join(name)} can't be read: skipped")

    def has(self, step: int) -> bool:
        """Whether a checkpoint of that step is published, intact or not."""
        try:
            return self.open(step) is not None
        except CheckpointError:
            return True

    def _raw_manifest(self, name: str) -> bytes | None:
        for _ in range(2):  # it may be published between the read and the lookup of its directory
            try:
                return self.storage.read_bytes(f"{name}/{MANIFEST}")
            except (IsADirectoryError, NotADirectoryError):
                raise CorruptedError(MANIFEST, "not a file") from None
            except FileNotFoundError:
                if not self.storage.is_local or not self.storage.exists(name):
                    return None
        raise CorruptedError(MANIFEST, "missing")

    def _first_intact(self, steps: list[int]) -> tuple[Found | None, set[str]]:
        corrupted: set[str] = set()
        for step in steps:
            try:
                if found := self.open(step, verify=True):
                    return found, corrupted
            except CorruptedError as error:
                if self.has(step):  # else its owner deleted it while it was read
                    corrupted.add(step_name(step))
                    self._on_corruption(step, error)
        return None, corrupted

    def _on_corruption(self, step: int, error: CorruptedError) -> None:
        self.log(f"checkpoint {step_name(step)} is corrupted ({error}): skipped")


def find_at(location: str, log: Callable[[str], None] = print) -> Found:
    """The checkpoint at a path or URL: of a checkpoint itself, of a ``checkpoints`` directory or of a run.

    Raises CheckpointError if there is none, or it is corrupted.
    """
    parent, _, name = location.rstrip("/").rpartition("/")
    if _STEP.fullmatch(name):
        return CheckpointStore(open_storage(parent or "."), log).find(name)
    storage = open_storage(location)
    if not any(_STEP.fullmatch(entry) for entry in storage.list()):
        storage = storage.sub("checkpoints")
    return CheckpointStore(storage, log).find("last")
