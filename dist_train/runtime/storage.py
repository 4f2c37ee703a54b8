"""Files of a run on a local disk or on any fsspec URL (``s3://``, ``gs://``, ``memory://``).

The two worlds differ in what publishes: on a local disk a rename does, on an object store a single PUT does (there is
no rename, and an object can't be appended to). Everything here is either published whole or absent. Listings are never
served from a cache, ``fs.transaction`` is never used, and a stream that fails is discarded, because leaving a
``with fs.open(..., "wb")`` by an exception would publish the partial object (s3fs issue 154).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dist_train.runtime.here import here

T = TypeVar("T")

_CHUNK = 4 << 20
# Errors that waiting doesn't cure. Anything else that an operating system or a store reports may be a passing one.
_FINAL_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENOTEMPTY,
}
_FINAL_TYPES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"}
_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "adlfs", "azure", "urllib3"}


class StorageError(Exception):
    """A disk or a store that failed for longer than its patience. Says nothing about the bytes being damaged."""


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether ``location`` is on an object store, as opposed to a path (or ``file://``) of a local disk."""
    text = os.fspath(location)
    return "://" in text and not text.startswith(("file://", "local://"))


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make renames and new names in the directory ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HashingWriter:
    """A write-only file that hashes and counts what passes, and remembers why its sink failed.

    ``torch.save`` turns an error of the file into a ``RuntimeError`` without a cause; ``failure`` keeps the real one.
    """

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.failure: Exception | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data`` (bytes-like) or raise."""
        view = memoryview(data).cast("B")
        if self.failure is not None:  # torch's zip writer goes on to write its index after a failed record
            raise self.failure
        try:
            for start in range(0, len(view), _CHUNK):
                piece = view[start : start + _CHUNK]
                self._sink.write(piece)
                self._hash.update(piece)
                here.bytes += len(piece)  # a save that moves is no hang
        except Exception as error:
            self.failure = error
            raise
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back here; the sink is flushed when it is closed."""

    def hexdigest(self) -> str:
        """sha256 of everything written so far."""
        return self._hash.hexdigest()


class Storage:
    """One directory of a run, by path or URL. Names are relative to it, with ``/`` between their parts.

    Args:
        location: a path, or any URL that fsspec knows.
        patience: seconds for which a failing operation is tried again, with growing pauses. By default 3 on a local
            disk and 60 on a store.
        options: passed to fsspec (credentials, endpoint). fsspec's own configuration files and variables count too.

    Raises (from all methods): :class:`StorageError` when the patience has run out, naming place and cause;
    ``FileNotFoundError`` and ``FileExistsError`` as they are.
    """

    is_local: bool
    location: str

    def __new__(cls, location: str | os.PathLike[str], **_: Any) -> Storage:
        if cls is not Storage:
            return object.__new__(cls)
        if is_url(location):
            from dist_train.runtime.objectstore import ObjectStorage

            return object.__new__(ObjectStorage)
        return object.__new__(LocalStorage)

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        patience: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = dict(options or {})
        self.patience = (3.0 if self.is_local else 60.0) if patience is None else patience

    def __repr__(self) -> str:
        return f"Storage({self.location!r})"

    def sub(self, name: str) -> Storage:
        """The directory ``name`` inside this one (it need not exist)."""
        return Storage(self.join(name), patience=self.patience, options=self.options)

    def join(self, name: str) -> str:
        """Path or URL of ``name``."""
        return f"{self.location}/{name}" if name else self.location

    def read_bytes(self, name: str) -> bytes:
        """All bytes of a file."""
        return self._retry("read", name, lambda: self._read(name))

    def digest(self, name: str) -> tuple[int, str]:
        """Length in bytes and sha256 of a file, in constant memory."""

        def action() -> tuple[int, str]:
            hasher, count = hashlib.sha256(), 0
            with self._open(name) as file:
                while piece := file.read(_CHUNK):
                    hasher.update(piece)
                    count += len(piece)
            return count, hasher.hexdigest()

        return self._retry("read", name, action)

    def write_atomic(self, name: str, data: bytes) -> None:
        """Create or replace a file; a reader sees the old bytes or the new ones, also after a power cut."""
        self._retry("write", name, lambda: self._put(name, data))

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file with all its bytes. ``False`` if it is there already: of many that try, one gets ``True``."""
        tried = False

        def action() -> bool:
            nonlocal tried
            try:
                again, tried = tried, True
                self._create(name, data)
            except FileExistsError:
                # A try that timed out may have reached the store all the same.
                return again and self._read(name) == data
            return True

        return self._retry("create", name, action)

    def write_stream(self, name: str, produce: Callable[[BinaryIO], object]) -> tuple[int, str]:
        """Write what ``produce`` writes into the file it is given; returns bytes and sha256 of what was written.

        Not atomic (callers publish by other means), but durable on return, and on a store nothing of a failed try is
        left. ``produce`` may be called again after a passing error, so it must be able to repeat itself.
        """

        def action() -> tuple[int, str]:
            with self._sink(name) as sink:
                writer = HashingWriter(sink)
                try:
                    produce(writer)  # type: ignore[arg-type]
                except Exception:
                    if writer.failure is not None:
                        raise writer.failure from None
                    raise
                if writer.failure is not None:
                    raise writer.failure
            return writer.bytes, writer.hexdigest()

        return self._retry("write", name, action)

    def append_line(self, name: str, line: str) -> None:
        """Append one line, durably. On a store the object is written anew, so only its single owner may do this."""
        self._retry("append to", name, lambda: self._append(name, line.rstrip("\n") + "\n"))

    def exists(self, name: str) -> bool:
        """Whether a file or directory of that name is there now."""
        return self._retry("look up", name, lambda: self._exists(name))

    def list(self, name: str = "") -> Sequence[str]:
        """Sorted names of the files and directories in ``name``, read afresh; empty if it isn't there."""
        return self._retry("list", name, lambda: sorted(self._list(name)))

    def walk(self, name: str = "") -> dict[str, int]:
        """Every file below ``name`` with its size in bytes; names are relative to this storage."""
        return self._retry("list", name, lambda: self._walk(name))

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all in it. It need not exist."""
        self._retry("delete", name, lambda: self._delete(name))

    def makedirs(self, name: str = "") -> None:
        """Create a directory with its parents, durably (nothing to do on a store)."""
        self._retry("create the directory", name, lambda: self._makedirs(name))

    def abort_uploads(self) -> int:
        """Abort the multipart uploads that killed writers left here (S3 has such); returns how many."""
        return 0

    def _retry(self, what: str, name: str, action: Callable[[], T]) -> T:
        give_up, pause = 0.0, 0.1
        while True:
            try:
                return action()
            except _FINAL_TYPES:
                raise
            except Exception as error:
                if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _CLIENT_LIBRARIES:
                    raise
                now = time.monotonic()
                give_up = give_up or now + self.patience
                final = getattr(error, "errno", None) in _FINAL_ERRNOS or type(error).__name__ in _FINAL_NAMES
                if final or now + pause > give_up:
                    cause = f"{type(error).__name__}: {error}"
                    raise StorageError(f"cannot {what} {self.join(name)}: {cause}") from error
            time.sleep(pause)  # no jitter: it would draw from a generator that training may use
            pause = min(pause * 2, 8.0)

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read()

    # What the two kinds bring; `Storage(location)` always makes one of them. None of these tries again.
    def _open(self, name: str) -> BinaryIO:
        raise TypeError(type(self))

    def _put(self, name: str, data: bytes) -> None:
        raise TypeError(type(self))

    def _create(self, name: str, data: bytes) -> None:
        raise TypeError(type(self))

    def _sink(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        raise TypeError(type(self))

    def _append(self, name: str, line: str) -> None:
        raise TypeError(type(self))

    def _exists(self, name: str) -> bool:
        raise TypeError(type(self))

    def _list(self, name: str) -> Iterable[str]:
        raise TypeError(type(self))

    def _walk(self, name: str) -> dict[str, int]:
        raise TypeError(type(self))

    def _delete(self, name: str) -> None:
        raise TypeError(type(self))

    def _makedirs(self, name: str) -> None:
        raise TypeError(type(self))


class LocalStorage(Storage):
    """A directory of a mounted file system."""

    is_local = True

    def __init__(self, location: str | os.PathLike[str], **keywords: Any) -> None:
        super().__init__(location, **keywords)
        text = os.fspath(location)
        for scheme in ("file://", "local://"):
            text = text.removeprefix(scheme)
        self.location = os.path.abspath(os.path.expanduser(text))

    def path(self, name: str = "") -> Path:
        """Path of ``name``."""
        return Path(self.join(name))

    def rename(self, source: str, target: str) -> None:
        """Rename a file or a directory within this storage, durably. A non-empty directory is never replaced."""

        self._retry("rename", source, lambda: os.rename(self.join(source), self.join(target)))
        self.fsync(os.path.dirname(target))

    def fsync(self, name: str = "") -> None:
        """Make the names in directory ``name`` durable."""
        self._retry("sync", name, lambda: fsync_directory(self.path(name)))

    def sweep_temporaries(self, older_than: float = 600.0) -> None:
        """Delete what killed :meth:`write_atomic` calls left, if older (in seconds) than a live one can be."""
        for name in self.list():
            if name.startswith(".tmp-"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - os.stat(self.join(name)).st_mtime >= older_than:
                        self.delete(name)

    def _open(self, name: str) -> BinaryIO:
        return open(self.join(name), "rb")

    def _temporary(self, name: str, data: bytes) -> Path:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _put(self, name: str, data: bytes) -> None:
        temporary = self._temporary(name, data)
        os.replace(temporary, self.join(name))
        fsync_directory(temporary.parent)

    def _create(self, name: str, data: bytes) -> None:
        # A hard link appears with all its bytes and fails if the name is taken, on NFS too.
        temporary = self._temporary(name, data)
        try:
            os.link(temporary, self.join(name))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            with open(self.join(name), "xb") as file:  # a file system without hard links
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(temporary.parent)

    @contextlib.contextmanager
    def _sink(self, name: str) -> Iterator[BinaryIO]:
        with open(self.join(name), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def _append(self, name: str, line: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        with open(self.join(name), "a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = "\n" + line  # the line before was torn by a kill: leave it alone, on a line of its own
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _exists(self, name: str) -> bool:
        try:
            os.stat(self.join(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _list(self, name: str) -> Iterable[str]:
        try:
            return os.listdir(self.join(name))
        except FileNotFoundError:
            return []

    def _walk(self, name: str) -> dict[str, int]:
        found = {}
        for parent, _, files in os.walk(self.join(name)):
            for file in files:
                path = os.path.join(parent, file)
                found[os.path.relpath(path, self.location)] = os.stat(path).st_size
        return found

    def _delete(self, name: str) -> None:
        path = self.path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _makedirs(self, name: str) -> None:
        missing = [path for path in (self.path(name), *self.path(name).parents) if not path.exists()]
        self.path(name).mkdir(parents=True, exist_ok=True)
        for path in missing:
            fsync_directory(path.parent)
