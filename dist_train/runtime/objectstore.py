"""Files of a run under an fsspec URL (``s3://``, ``gs://``, ``memory://``).

On an object store a single PUT publishes an object; it has no rename, and an object can't be appended to. Everything here
is either complete or absent. Listings are never served from a cache, ``fs.transaction`` is never used, and a
stream that fails is discarded, because leaving a ``with fs.open(..., "wb")`` by an exception would publish the partial
object (s3fs issue 154).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import fsspec

from dist_train import files
from dist_train.config.errors import ConfigError
from dist_train.watch.status import status

T = TypeVar("T")

_CHUNK = 4 << 20


class NotAFileError(IsADirectoryError):
    """Something other than a regular file (reading a FIFO or a device could block, or act), or a file that is too large."""


class HashingWriter:
    """A write-only file that hashes and counts what passes, and keeps the error of its sink.

    ``torch.save`` turns an error of the file into a ``RuntimeError`` without a cause; ``failure`` keeps the real one.
    """

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self.hash = hashlib.sha256()
        self.bytes = 0
        self.failure: Exception | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data`` (bytes-like) or raise."""
        view = memoryview(data).cast("B")
        if self.failure is not None:  # torch's zip writer still writes its index after a failed record
            raise self.failure
        try:
            for start in range(0, len(view), _CHUNK):
                piece = view[start : start + _CHUNK]
                self._sink.write(piece)
                self.hash.update(piece)
                status.bytes += len(piece)  # a save that progresses is no hang
        except Exception as error:
            self.failure = error
            raise
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered here; the sink is flushed when it is closed."""


class Storage:
    """One directory of a run under a URL; ``LocalStorage`` is one on a disk, and ``open_storage`` makes either.

    Names are relative to it, with ``/`` between their parts. All methods raise ``StorageError`` when the patience has run
    out, naming place and cause, and ``FileNotFoundError`` and ``FileExistsError`` as they are.

    Attributes:
        location: URL, or absolute path.
        patience: seconds for which a failing operation is retried.
        fs: the fsspec file system.
    """

    is_local = False

    def __init__(self, location: str, patience: float, options: Mapping[str, Any] | None = None) -> None:
        self.location, self.patience, self.options = location.rstrip("/"), patience, dict(options or {})
        try:
            # The listings cache of s3fs and gcsfs hides what other processes write, from `ls` and from `info`.
            self.fs, self._root = fsspec.core.url_to_fs(self.location, **{"use_listings_cache": False, **self.options})
        except (ValueError, ImportError) as error:  # an unknown protocol, or its package isn't installed
            raise ConfigError.single("", f"{self.location} can't be reached: {error}") from None

    def sub(self, name: str, *, patience: float | None = None) -> Storage:
        """The directory ``name`` inside this one (it need not exist), with a patience of its own."""
        return type(self)(self.join(name), self.patience if patience is None else patience, self.options)

    def join(self, name: str) -> str:
        """Path or URL of ``name``."""
        return f"{self.location}/{name}" if name else self.location

    def read_bytes(self, name: str, *, most: int | None = None) -> bytes:
        """All bytes of a file. Raises NotAFileError if it is none, or holds more than `most` bytes."""

        def action() -> bytes:
            if most is not None and (size := self.fs.info(self._at(name))["size"]) > most:
                message = f"{size:,} bytes, where at most {most:,} are expected"
                raise NotAFileError(errno.EFBIG, message, self.join(name))
            return self._read(name)

        return self._retry("read", name, action)

    def digest(self, name: str) -> tuple[int, str]:
        """Length in bytes and sha256 of a file, in constant memory."""

        def action() -> tuple[int, str]:
            with self._open(name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
                return file.seek(0, os.SEEK_END), digest

        return self._retry("read", name, action)

    def write_atomic(self, name: str, data: bytes) -> None:
        """Create or replace a file; a reader sees the old bytes or the new ones, also after a power failure."""
        self._retry("write", name, lambda: self._put(name, data))

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file with all its bytes; of many processes that try, one gets ``True``.

        ``False`` if it exists with other bytes. One with the same bytes is the caller's own: a client library retries by
        itself when a response is lost, and finds what it has written. So no two callers may pass the same ``data``.
        """

        def action() -> bool:
            try:
                self._create(name, data)
            except FileExistsError:
                return self._read(name) == data
            return True

        return self._retry("create", name, action)

    def write_stream(self, name: str, produce: Callable[[BinaryIO], object]) -> tuple[int, str]:
        """Write what ``produce`` writes into the file it is given; returns bytes and sha256 of what was written.

        Not atomic (callers publish by other means), but durable on return, and a failed attempt leaves nothing on an
        object store. ``produce`` may be called again after a passing error, so it must be repeatable.
        """

        def action() -> tuple[int, str]:
            with self._sink(name) as sink:
                writer = HashingWriter(sink)
                try:
                    produce(writer)  # type: ignore[arg-type]
                finally:
                    if writer.failure is not None:
                        raise writer.failure from None
            return writer.bytes, writer.hash.hexdigest()

        return self._retry("write", name, action)

    def append_line(self, name: str, line: str) -> None:
        """Append one line, durably. On an object store the object is rewritten, so only its single owner may do this.

        A last line that a kill left torn stays as it is: the new one gets a line of its own.
        """
        self._retry("append to", name, lambda: self._append(name, line.rstrip("\n").encode() + b"\n"))

    def exists(self, name: str) -> bool:
        """Whether a file or directory of that name exists now."""
        try:
            return bool(self._refreshed("look up", name, lambda: self.fs.info(self._at(name))))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def list(self, name: str = "") -> Sequence[str]:
        """Sorted names of the files and directories in ``name``, never from a cache; empty if it doesn't exist."""
        try:
            entries = self._refreshed("list", name, lambda: self.fs.ls(self._at(name), detail=False))
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in entries if path.rstrip("/") != self._at(name)})

    def walk(self, name: str = "") -> dict[str, int]:
        """Every file below ``name`` with its size in bytes; names are relative to this storage."""
        found = self._refreshed("list", name, lambda: self.fs.find(self._at(name), detail=True))
        return {path[len(self._root) :].lstrip("/"): entry["size"] for path, entry in found.items()}

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all in it. It need not exist."""
        self._retry("delete", name, lambda: self._delete(name))

    def makedirs(self, name: str = "") -> None:
        """Create this directory with its parents, or one inside it, durably (nothing to do on an object store).

        Raises FileNotFoundError for a name inside a directory that was deleted: no write brings that back.
        """

    def _refreshed(self, what: str, name: str, action: Callable[[], T]) -> T:
        self.fs.invalidate_cache()
        return self._retry(what, name, action)

    def _retry(self, what: str, name: str, action: Callable[[], T]) -> T:
        return files.retried(what, self.join(name), action, self.patience)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    # What a local disk does differently; each without retries.
    def _open(self, name: str) -> BinaryIO:
        return self.fs.open(self._at(name), "rb", cache_type="readahead")

    def _read(self, name: str) -> bytes:
        return self.fs.cat_file(self._at(name))

    def _put(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(self._at(name), data)

    def _create(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(self._at(name), data, mode="create")

    @contextlib.contextmanager
    def _sink(self, name: str) -> Iterator[BinaryIO]:
        file = self.fs.open(self._at(name), "wb")
        try:
            yield file
            size = file.tell()
            file.close()
        except BaseException:
            # Closing would publish the partial object, so it is never closed, and its multipart upload is aborted.
            with contextlib.suppress(Exception):
                file.discard()
            with contextlib.suppress(AttributeError):
                file.closed = True
            raise
        if (stored := self.fs.info(self._at(name))["size"]) != size:
            raise OSError(errno.EIO, f"the store holds {stored} bytes where {size} were written", name)

    def _append(self, name: str, line: bytes) -> None:
        before = b""
        with contextlib.suppress(FileNotFoundError):
            before = self._read(name)
        self._put(name, before + after_torn(before[-1:], line))

    def _delete(self, name: str) -> None:
        for path in self.walk(name) or [name]:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(path))

    def abort_uploads(self) -> int:
        """Abort the multipart uploads that killed writers left here (S3 has such); returns how many."""
        if not hasattr(self.fs, "list_multipart_uploads"):
            return 0

        def action() -> int:
            bucket, prefix, _ = self.fs.split_path(self._root)
            try:
                uploads = self.fs.list_multipart_uploads(bucket)
            except FileNotFoundError as error:
                raise files.StorageError(f"cannot use {self.location}: {error}") from error
            stale = [upload for upload in uploads if upload["Key"].startswith(prefix.rstrip("/") + "/")]
            for upload in stale:
                self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            return len(stale)

        return self._retry("list uploads below", "", action)


def after_torn(last: bytes, line: bytes) -> bytes:
    """What to append after a file's last byte, so that a torn line before keeps to itself."""
    return line if last in (b"", b"\n") else b"\n" + line
