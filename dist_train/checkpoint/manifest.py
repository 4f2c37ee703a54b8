"""The manifest: the list of a checkpoint's files, and the file that publishes it.

It names every other file with its length and sha256, and ends with a sha256 of its own other fields. Its content
determines its bytes, so that a changed bit anywhere is noticed, white space included.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_train.tracking.records import finite

FORMAT = 1
MANIFEST = "manifest.json"
# Fields of format 1. A field added later must be optional on reading (`content.get`), or every older checkpoint would count
# as corrupted.
_FIELDS = ("step", "attempt", "created_at", "lease", "metrics")

_NAME, _HASH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*"), re.compile(r"[0-9a-f]{64}")


class CheckpointError(Exception):
    """A checkpoint that could not be saved, found or loaded; the message names step, file and cause."""


class CorruptedError(CheckpointError):
    """Bytes that were read and aren't those that were published, in ``file``."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = file
        self.reason = reason


class NewerFormatError(CheckpointError):
    """An intact checkpoint, written by a newer version of dist_train than this one."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its length, its sha256, and its path relative to the checkpoint's directory."""

    bytes: int
    sha256: str
    key: str


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    ``attempt`` is a random name, unique to each attempt to save; ``metrics`` are those measured at this step (one that
    isn't finite is null in the file and read as NaN). ``meta`` is any JSON; `Trainer._save` writes epoch, samples,
    world_size, best, plan and horizon, and `run_facts` config, versions, host and, in a git repository, commit.
    """

    step: int
    files: dict[str, FileEntry]
    attempt: str
    metrics: dict[str, float] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    created_at: str = ""
    lease: int | None = None

    def to_bytes(self) -> bytes:
        """Bytes of the file, ending with the hash.

        Raises:
            TypeError, ValueError: ``meta`` is not JSON (a NaN in it isn't).
        """
        files: dict[str, Any] = {name: vars(entry).copy() for name, entry in self.files.items()}
        for name, entry in files.items():
            if entry["key"] == name:
                del entry["key"]
        content = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _FIELDS},
            "files": files,
            "meta": self.meta,
        }
        content["metrics"] = finite({name: float(value) for name, value in self.metrics.items()})
        return _dump({**content, "sha256": _own_hash(content)})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Read and check a manifest.

        Raises:
            CorruptedError: these are not the bytes that :meth:`to_bytes` wrote.
            NewerFormatError: they are intact, but of a newer format.
        """
        try:
            content = json.loads(raw)
            claimed = content.pop("sha256")
            own = _own_hash(content)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CorruptedError(MANIFEST, "empty" if not raw else f"not a manifest ({error})") from None
        if claimed != own:
            raise CorruptedError(MANIFEST, "its content doesn't match the hash at its end")
        version = content.get("format")
        if not isinstance(version, int) or version < 1:
            raise CorruptedError(MANIFEST, f"format {version!r} is not a version number")
        if version > FORMAT:
            newer = f"checkpoint format {version} is newer than format {FORMAT}, which this dist_train reads"
            raise NewerFormatError(f"{newer}: update dist_train")
        # 1e-05 and 1E-05, or two escapes of one letter, mean the same, so the bytes are compared too.
        if _dump({**content, "sha256": claimed}) != raw:
            raise CorruptedError(MANIFEST, "its bytes aren't those that were written")
        try:
            return _checked(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptedError(MANIFEST, f"the hash matches, but the content is invalid ({error!r})") from None


def _checked(content: Mapping[str, Any]) -> Manifest:
    """The manifest, with every field of the type it must have. Raises any error where one isn't."""
    attempt, files = content["attempt"], {}
    for name, entry in content["files"].items():
        key, size = entry.get("key", name), entry["bytes"]
        # A name is that of a file inside the checkpoint's directory: nothing else is ever read or deleted.
        inside = _NAME.fullmatch(name) and name != MANIFEST and key in (name, f"{attempt}/{name}")
        _require(inside, f"file {name!r}, {key!r}")
        _require(type(size) is int and size > 0 and _HASH.fullmatch(entry["sha256"]), f"{name}: {entry}")
        files[name] = FileEntry(size, entry["sha256"], key)
    metrics = {name: math.nan if value is None else value for name, value in content["metrics"].items()}
    _require(files, "no files")
    _require(type(content["step"]) is int and content["step"] >= 0, f"step {content['step']!r}")
    _require(_NAME.fullmatch(attempt), f"attempt {attempt!r}")
    _require(
        isinstance(content["created_at"], str) and type(content["lease"]) in (int, type(None)), "created_at, lease"
    )
    _require(all(type(value) in (int, float) for value in metrics.values()), f"metrics {metrics!r}")
    _require(isinstance(content["meta"], dict), f"meta {content['meta']!r}")
    fields = {name: content[name] for name in _FIELDS} | {"metrics": metrics}
    return Manifest(files=files, meta=content["meta"], **fields)


def _require(condition: object, found: str) -> None:
    if not condition:
        raise ValueError(found[:200])


def _own_hash(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
