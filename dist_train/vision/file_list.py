"""The files of a folder per class, as packed arrays from an index on disk: a million of them open in a fraction of a second.

A Python list of a million paths takes 150 MB, and each worker that is forked gets a copy of its own, since counting references
writes into every string. Arrays have no such counts, and those that are mapped from the index are shared by all processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.data.errors import DataError
from dist_train.files import write_atomic

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
log = logging.getLogger("dist_train")

_FORMAT = 1
# A directory that has changed so shortly before it was read may change again without another time of modification.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class FileList:
    """The files of `root/<class>/**`: classes sorted, then directories, then names, as torchvision's ImageFolder has them.

    Attributes:
        classes: names, sorted.
        names: (bytes,) uint8: the paths below the class's folder, one behind the other.
        ends: (n,) int64: where each of them ends.
        class_ends: (classes,) int64: where the files of each class end.
    """

    root: str
    classes: list[str]
    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    class_ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def target(self, index: int) -> int:
        """The number of the class of a file. IndexError if there is no such file."""
        if not 0 <= index < len(self.ends):
            raise IndexError(f"expected an index below {len(self.ends)}, found {index}")
        return int(np.searchsorted(self.class_ends, index, side="right"))

    def path(self, index: int) -> str:
        """The path of a file, `root` included. IndexError if there is none."""
        folder = self.classes[self.target(index)]
        start = int(self.ends[index - 1]) if index else 0
        return os.path.join(self.root, folder, os.fsdecode(self.names[start : self.ends[index]].tobytes()))

    def targets(self) -> NDArray[np.int64]:
        """The class of every file, (n,) int64."""
        return np.repeat(np.arange(len(self.classes)), np.diff(self.class_ends, prepend=0))

    def digest(self) -> str:
        """sha256 of classes, names and their order, in hex; the root doesn't matter."""
        arrays = (self.names, self.ends.astype("<i8"), self.class_ends.astype("<i8"))
        return _digest(json.dumps(self.classes).encode(), *arrays)


class Samples(Sequence[tuple[str, int]]):
    """(path, class) of every file, made when asked for: what torchvision's `samples` holds as a list."""

    def __init__(self, files: FileList) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end
        return self._files.path(index), self._files.target(index)


def open_files(root: str | os.PathLike[str], *, cached: bool = True) -> FileList:
    """The files below `root`, from an index in the user's cache directory if that is as new as the directories.

    Otherwise they are listed, and the index is written; by one process, for which others on this machine wait. An index is
    renewed when any directory's time of modification differs: files and directories that were added, removed or renamed.
    It isn't noticed on file systems that don't keep these times, or when a link to a file leads elsewhere: `cached=False`
    lists them.

    Raises:
        DataError: there is no directory for a class, a class has no picture, or a directory can't be read.
    """
    place = os.path.realpath(root)
    if not os.path.isdir(place):
        raise DataError(
            f"ImageFolder: {os.path.abspath(root)} is no directory; expected one with a folder for each class "
            "(relative paths count from the working directory)"
        )
    if not cached:
        return _listed(str(root), place)[0]
    index = cache_directory() / "files" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.index"
    found = _load(index, str(root), place)
    if found is not None:
        return found
    with _one_at_a_time(index):
        found = _load(index, str(root), place)  # another process may have written it meanwhile
        if found is None:
            found, folders = _listed(str(root), place)
            _store(index, found, folders)
    return found


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/dist_train`, by default ~/.cache/dist_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_train"


@contextlib.contextmanager
def _one_at_a_time(index: Path) -> Iterator[None]:
    """Held by one process of those that would write `index`; by all where the directory can't be written or locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            index.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(index.with_suffix(".lock"), "ab"))
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, however the process ends
        yield


# --- listing ---------------------------------------------------------------------------------------------------------


def _listed(root: str, place: str) -> tuple[FileList, list[list[Any]]]:
    """The files, and each directory with its time of modification (0: it may not have settled yet)."""
    began = time.time_ns()
    folders: list[list[Any]] = [[".", _modified(place, began)]]
    classes = sorted(entry.name for entry in os.scandir(place) if entry.is_dir())
    names = bytearray()
    ends: list[NDArray[np.int64]] = []
    class_ends: list[int] = []
    empty = []
    total = 0
    for name in classes:
        before = total
        top = os.path.join(place, name)
        for folder, _, files in sorted(os.walk(top, followlinks=True, onerror=_unreadable)):
            folders.append([os.path.relpath(folder, place), _modified(folder, began)])
            below = os.path.relpath(folder, top)
            prefix = b"" if below == "." else os.fsencode(below) + b"/"
            mine = [prefix + os.fsencode(file) for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
            ends.append(len(names) + np.cumsum([len(one) for one in mine], dtype=np.int64))
            names += b"".join(mine)
            total += len(mine)
        class_ends.append(total)
        if total == before:
            empty.append(name)
    if not classes or empty:
        what = f"no picture in {', '.join(empty[:5])}" if classes else "no folder for a class"
        raise DataError(f"ImageFolder: {what} in {os.path.abspath(root)}; pictures are {', '.join(EXTENSIONS)}")
    packed = np.frombuffer(bytes(names), dtype=np.uint8)
    return FileList(root, classes, packed, np.concatenate(ends), np.array(class_ends, dtype=np.int64)), folders


def _unreadable(error: OSError) -> None:
    raise DataError(f"ImageFolder: {error.filename} can't be listed: {error}") from error


def _modified(folder: str, now: int) -> int:
    modified = os.stat(folder).st_mtime_ns
    return modified if modified < now - _SETTLED_NS else 0


# --- the index: a line of JSON with the sha256 of all that follows, then the arrays --------------------------------------


def _digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _store(index: Path, files: FileList, folders: list[list[Any]]) -> None:
    head = {"root": os.path.realpath(files.root), "classes": files.classes, "folders": folders}
    text = json.dumps({**head, "bytes": len(files.names), "files": len(files)}).encode()
    text += b" " * (-(len(text) + 1) % 8) + b"\n"  # the arrays begin at a multiple of 8 bytes
    body = (text, files.ends.tobytes(), files.class_ends.tobytes(), files.names.tobytes())
    first = json.dumps({"format": _FORMAT, "head": len(text), "sha256": _digest(*body)}).encode().ljust(127) + b"\n"
    try:
        write_atomic(index, b"".join([first, *body]))
    except OSError as error:
        log.warning("the index of %s isn't kept, so that the next start lists it again: %s", files.root, error)


def _load(index: Path, root: str, place: str) -> FileList | None:
    """The index, if it is complete and as new as the directories; else None."""
    try:
        data = np.memmap(index, dtype=np.uint8, mode="r")
        first = json.loads(data[:128].tobytes())
        if first["format"] != _FORMAT or first["sha256"] != _digest(data[128:]):
            return None
        start = 128 + first["head"]
        head = json.loads(data[128:start].tobytes())
        if head["root"] != place or not all(
            modified and os.stat(os.path.join(place, folder)).st_mtime_ns == modified
            for folder, modified in head["folders"]
        ):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none yet, a damaged one, or a directory that is gone
    split = start + 8 * head["files"]
    end = split + 8 * len(head["classes"])
    ends, class_ends = (np.asarray(data[a:b]).view(np.int64) for a, b in ((start, split), (split, end)))
    return FileList(root, head["classes"], np.asarray(data[end : end + head["bytes"]]), ends, class_ends)
