"""The manifest: the list of a checkpoint's files, and the file that publishes it.

It names every other file with its length and sha256, and ends with a sha256 of its own other fields. Its content
determines its bytes, so that a changed bit anywhere is noticed, white space included.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, Strict, TypeAdapter

from dist_train.tracking.records import finite

FORMAT = 1
MANIFEST = "manifest.json"
# Fields of format 1, each of which is required. One added later stands beside them: optional on reading (`content.get`), or every
# older checkpoint would count as corrupted, and written only where it is there.
_FIELDS = ("step", "attempt", "created_at", "lease", "metrics", "files", "meta")

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class CheckpointError(Exception):
    """A checkpoint that could not be saved, found or loaded; the message names step, file and cause."""


class CorruptedError(CheckpointError):
    """Bytes that were read and aren't those that were published."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")


class NewerFormatError(CheckpointError):
    """An intact checkpoint, written by a newer version of dist_train than this one."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its length, its sha256, and its path relative to the checkpoint's directory."""

    bytes: Annotated[int, Field(gt=0, strict=True)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    key: str


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    ``attempt`` is a random name, unique to each attempt to save; ``metrics`` are those measured at this step (one that
    isn't finite is null in the file and read as NaN). ``meta`` is any JSON; `Trainer._save` writes epoch, samples,
    world_size, best, plan and horizon, and `run_facts` config, command, versions, host and, in a git repository, commit and git.
    """

    step: Annotated[int, Field(ge=0, strict=True)]
    files: Annotated[dict[_Name, FileEntry], Field(min_length=1)]
    attempt: _Name
    metrics: dict[str, Annotated[float, Strict()]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    created_at: str = ""
    lease: Annotated[int, Strict()] | None = None

    def to_bytes(self) -> bytes:
        """Bytes of the file, ending with the hash. Raises TypeError or ValueError if ``meta`` isn't JSON (NaN isn't)."""
        content = {"format": FORMAT, **{name: getattr(self, name) for name in _FIELDS}}
        content["metrics"] = finite({name: float(value) for name, value in self.metrics.items()})
        content["files"] = {
            name: {field: value for field, value in vars(entry).items() if (field, value) != ("key", name)}
            for name, entry in self.files.items()
        }
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
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CorruptedError(MANIFEST, f"the hash matches, but the content is invalid ({why})") from None


_READER = TypeAdapter(Manifest)


def _checked(content: dict[str, Any]) -> Manifest:
    """The manifest, with every field of the type it must have. Raises any error where one isn't."""
    fields = {name: content[name] for name in _FIELDS}
    fields["metrics"] = {name: math.nan if value is None else value for name, value in content["metrics"].items()}
    for name, entry in fields["files"].items():
        # A name is that of a file inside the checkpoint's directory: nothing else is ever read or deleted.
        if name == MANIFEST or entry.setdefault("key", name) not in (name, f"{fields['attempt']}/{name}"):
            raise ValueError(f"file {name!r}: {entry}")
    return _READER.validate_python(fields)


def _own_hash(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
