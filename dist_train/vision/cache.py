"""Pictures decoded once, kept as raw pixels in memory-mapped files that all processes of a node share.

A directory of chunks, `PER_CHUNK` pictures each. A chunk is complete or absent: it is written under another name, flushed to
the disk and renamed, so that a build that was killed resumes with the chunks that are missing. All processes that open the
directory build together; each chunk is one's, by a lock that the kernel releases however its holder ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.data.errors import DataError
from dist_train.files import append_whole, fsync_directory, write_atomic
from dist_train.runtime.launch import read_placement
from dist_train.runtime.world import usable_cpus
from dist_train.vision.crops import Picture, resize, shorter_side
from dist_train.vision.file_list import FileList
from dist_train.vision.turbojpeg import Box

log = logging.getLogger("dist_train")

PER_CHUNK = 1024
_FORMAT = 1
_REPORT_SECONDS = 30.0


class PictureCache:
    """The pictures of a list with a shorter side of `size` pixels (smaller ones as they are), decoded at most once.

    Opening it makes what is missing. A chunk that isn't as it was written (by its length and time of modification: copied,
    restored, changed) is hashed, and made again if it is damaged. A picture that was replaced under the same name isn't
    noticed: delete the directory.

    Args:
        scaled: as `Picture` has it.
        directory: on a disk of this node, or shared by nodes, whose file system can lock files.

    Raises:
        DataError: the directory holds another list, or another size; the disk is full. OSError: a picture or the directory
            can't be read or written.
    """

    def __init__(self, directory: str | os.PathLike[str], files: FileList, size: int, scaled: bool = False) -> None:
        self._directory, self._files, self._side = Path(directory).absolute(), files, size
        self._scaled = scaled
        if size < 1:
            raise DataError(f"ImageFolder: expected cache_size to be at least 1, found {size}")
        self._chunks = -(-len(files) // PER_CHUNK)
        self._maps: dict[int, mmap.mmap] = {}
        with _explained(self._directory):
            self._check_identity()
            Builder(self._directory, files, size, self._chunks, scaled).complete()
            tables = [_read_sizes(self._path(chunk), self._count(chunk)) for chunk in range(self._chunks)]
        self._sizes = np.concatenate(tables)
        areas = 3 * self._sizes.prod(1, dtype=np.int64)
        self._starts = np.concatenate(
            [np.cumsum(part) - part for part in np.split(areas, range(PER_CHUNK, len(areas), PER_CHUNK))]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a picture as it is kept. Raises DataError: it couldn't be decoded when this was made."""
        height, width = self._sizes[index].tolist()
        if not height:
            raise DataError(
                f"{self._files.path(index)} is no picture that could be decoded when {self._directory} was made; if it has been "
                f"repaired since, delete that directory"
            )
        return height, width

    def pixels(self, index: int, box: Box) -> NDArray[np.uint8]:
        """Those of a box of a picture: (height, width, 3) RGB, without a copy."""
        chunk = index // PER_CHUNK
        held = self._maps.get(chunk)
        if held is None:
            with open(self._path(chunk), "rb") as file:  # private pages, which are never written
                held = self._maps[chunk] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        height, width = self._sizes[index].tolist()
        flat = np.frombuffer(held, np.uint8, 3 * height * width, int(self._starts[index]))
        top, left, h, w = box
        return flat.reshape(height, width, 3)[top : top + h, left : left + w]

    def _path(self, chunk: int) -> Path:
        return self._directory / f"chunk-{chunk:06d}.raw"

    def _count(self, chunk: int) -> int:
        return min(PER_CHUNK, len(self._files) - chunk * PER_CHUNK)

    def _check_identity(self) -> None:
        """Write what the directory holds, or compare it."""
        mine = {
            "format": _FORMAT,
            "per_chunk": PER_CHUNK,
            "size": self._side,
            "scaled": self._scaled,
            "files": self._files.digest(),
        }
        path = self._directory / "cache.json"
        self._directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(self._directory.iterdir()) and not (self._directory / "lock").exists():
                raise DataError(
                    f"ImageFolder: cache {self._directory} isn't empty, and no cache of pictures: name another"
                )
            (self._directory / "lock").touch()
            write_atomic(path, json.dumps(mine).encode())
        found = json.loads(path.read_bytes())
        if found != mine:
            differing = ", ".join(
                f"{key} {found.get(key)} instead of {mine[key]}" for key in mine if found.get(key) != mine[key]
            )
            raise DataError(
                f"ImageFolder: cache {self._directory} was made of other pictures: {differing}. Name another directory, or "
                f"delete it"
            )


class Builder:
    """Makes the chunks that are missing, together with whatever other process does so."""

    def __init__(self, directory: Path, files: FileList, side: int, chunks: int, scaled: bool) -> None:
        self._directory, self._files, self._side, self._chunks = directory, files, side, chunks
        self._scaled = scaled
        self._journal = directory / "hashed.jsonl"
        self._known: dict[str, list[int]] = {}  # chunk: its length and time of modification when it was hashed
        self._read = self._broken = 0
        # Kept over chunks: each thread has a decoder.
        self._pool = ThreadPoolExecutor(max(1, usable_cpus() // max(1, read_placement(os.environ).local_size)))

    def complete(self) -> None:
        """Return when every chunk is there and has been hashed as it is now."""
        self._follow()
        todo = [chunk for chunk in range(self._chunks) if not self._is_known(chunk)]
        if not todo:
            return
        with self._pool, open(self._directory / "lock", "ab") as lock:
            first = os.getpid() % len(todo)  # each begins at another
            todo = todo[first:] + todo[:first]
            left = self._work(lock, todo, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._work(lock, left, fcntl.LOCK_EX)  # others are at these, or have died at them
        fsync_directory(self._directory)

    def _follow(self) -> None:
        """Read what this and other processes have written down since the last time."""
        with contextlib.suppress(FileNotFoundError), open(self._journal, "rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
            for line in lines:
                with contextlib.suppress(ValueError):  # one whose writer was killed
                    self._known |= json.loads(line)
            self._read += sum(len(line) for line in lines if line.endswith(b"\n"))

    def _note(self, chunk: int) -> None:
        """Write down that it is there, and hashed: whoever opens the directory relies on it."""
        line = b"\n%s\n" % json.dumps({str(chunk): self._stamp(chunk)}).encode()
        with open(self._journal, "ab", buffering=0) as file:
            append_whole(file, line)

    def _work(self, lock: Any, todo: list[int], how: int) -> list[int]:
        """Those that other processes hold."""
        left, reported = [], time.monotonic()
        for done, chunk in enumerate(todo):
            try:
                fcntl.lockf(lock, how, 1, chunk)
            except BlockingIOError:
                left.append(chunk)
                continue
            try:
                self._follow()
                if not self._is_known(chunk):
                    if not self._is_sound(chunk):
                        self._make(chunk)
                    self._note(chunk)
            finally:
                fcntl.lockf(lock, fcntl.LOCK_UN, 1, chunk)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                log.info("cache %s: %d of %d chunks", self._directory, done + 1, len(todo))
        return left

    def _path(self, chunk: int) -> Path:
        return self._directory / f"chunk-{chunk:06d}.raw"

    def _stamp(self, chunk: int) -> list[int] | None:
        try:
            found = self._path(chunk).stat()
        except FileNotFoundError:
            return None
        return [found.st_size, found.st_mtime_ns]

    def _is_known(self, chunk: int) -> bool:
        stamp = self._stamp(chunk)
        return stamp is not None and self._known.get(str(chunk)) == stamp

    def _is_sound(self, chunk: int) -> bool:
        """Whether it is there with the hash that it ends with."""
        stamp, hashed = self._stamp(chunk), hashlib.sha256()
        if stamp is None:
            return False
        with open(self._path(chunk), "rb") as file:
            left = stamp[0] - hashed.digest_size
            while left > 0 and (data := file.read(min(left, 1 << 20))):
                hashed.update(data)
                left -= len(data)
            sound = left == 0 and file.read() == hashed.digest()
        if not sound:
            log.warning("cache %s: %s is damaged and made again", self._directory, self._path(chunk).name)
        return sound

    def _make(self, chunk: int) -> None:
        """Pixels of all pictures, their sizes (n, 2) int32, sha256 of both."""
        path = self._path(chunk)
        part, hashed = path.with_suffix(".part"), hashlib.sha256()
        mine = range(chunk * PER_CHUNK, min((chunk + 1) * PER_CHUNK, len(self._files)))
        sizes = []
        with open(part, "wb") as file:
            for pixels in self._pool.map(self._small, mine):
                sizes.append(pixels.shape[:2])
                raw = pixels.tobytes()
                hashed.update(raw)
                file.write(raw)
            table = np.array(sizes, dtype="<i4").tobytes()
            hashed.update(table)
            file.write(table + hashed.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def _small(self, index: int) -> NDArray[np.uint8]:
        """A picture as it is kept; one that is broken has no pixels."""
        try:
            picture = Picture(self._files.path(index), self._scaled)
            height, width = picture.height, picture.width
            keeps = min(height, width) <= self._side
            shape = (height, width) if keeps else shorter_side(height, width, self._side)
            pixels = picture.pixels(Box(0, 0, height, width), shape)
        except DataError as error:
            self._broken += 1
            if self._broken <= 10:
                log.warning("cache %s: %s", self._directory, error)
            return np.empty((0, 0, 3), dtype=np.uint8)
        if keeps:
            return np.ascontiguousarray(pixels)
        kept = np.empty((*shape, 3), dtype=np.uint8)
        resize(pixels, shape, torch.from_numpy(kept).permute(2, 0, 1))
        return kept


def _read_sizes(path: Path, count: int) -> NDArray[np.int32]:
    with open(path, "rb") as file:
        file.seek(-(8 * count + hashlib.sha256().digest_size), os.SEEK_END)
        return np.frombuffer(file.read(8 * count), dtype="<i4").reshape(count, 2)


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """A full disk and locks that aren't there, in words."""
    try:
        yield
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise DataError(
                f"ImageFolder: the disk of cache {directory} is full ({error.strerror}); what is complete stays: make room, and "
                f"start again"
            ) from error
        if error.errno in (37, 38, 95):  # ENOLCK, ENOSYS, EOPNOTSUPP
            raise DataError(
                f"ImageFolder: the file system of cache {directory} can't lock files: name another"
            ) from error
        raise
