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
import io
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from dist_train.config.errors import SECRET_HINT, ConfigError, holds_secret
from dist_train.watch.status import status

T = TypeVar("T")

_CHUNK = 4 << 20
# Errors that waiting doesn't cure. Anything else that an operating system or a store reports may be a passing one.
_FINAL = {"ENOSPC", "EDQUOT", "EROFS", "ENAMETOOLONG", "EFBIG", "EMFILE", "ENOTEMPTY"}
_FINAL |= {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"}
_FINAL_TYPES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "adlfs", "azure", "urllib3"}


class StorageError(Exception):
    """A disk or a store that failed for longer than its patience. Says nothing about the bytes being damaged."""


class NotAFileError(IsADirectoryError):
    """A directory, FIFO, device or socket where a file was expected (reading it could wait for ever, or act), or far too much."""


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether ``location`` is on an object store, as opposed to a path (or ``file://``) of a local disk."""
    text = os.fspath(location)
    return "://" in text and not text.startswith(("file://", "local://"))


def retried(what: str, place: str | os.PathLike[str], action: Callable[[], T], patience: float = 3.0) -> T:
    """What ``action`` returns; it is called again after an error that may pass, for so many seconds.

    Raises:
        StorageError: it went on failing; names place and cause. FileNotFoundError, FileExistsError, NotAFileError and errors
            that aren't of a disk or a store come as they are.
    """
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
            give_up = give_up or now + patience
            final = _FINAL & {errno.errorcode.get(getattr(error, "errno", None) or 0), type(error).__name__}
            if final or now + pause > give_up:
                raise StorageError(f"cannot {what} {place}: {type(error).__name__}: {error}") from error
        time.sleep(pause)  # no jitter: it would draw from a generator that training may use
        pause = min(pause * 2, 8.0)


def append_whole(file: io.FileIO, data: bytes, *, sync: bool = False) -> None:
    """Write at the end of an unbuffered file, and make it durable if asked; what fails leaves nothing, and may be repeated.

    Raises:
        OSError: of the write or the sync.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, "written in part only; is the disk full?", str(file.name))
        if sync:
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


class HashingWriter:
    """A write-only file that hashes and counts what passes, and remembers why its sink failed.

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
        if self.failure is not None:  # torch's zip writer goes on to write its index after a failed record
            raise self.failure
        try:
            for start in range(0, len(view), _CHUNK):
                piece = view[start : start + _CHUNK]
                self._sink.write(piece)
                self.hash.update(piece)
                status.bytes += len(piece)  # a save that moves is no hang
        except Exception as error:
            self.failure = error
            raise
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back here; the sink is flushed when it is closed."""


class Storage:
    """One directory of a run, by path or URL. Names are relative to it, with ``/`` between their parts.

    ``Storage(location)`` makes a :class:`LocalStorage` of a path; what stands here is for object stores and the like.

    Args:
        location: a path, or any URL that fsspec knows.
        patience: seconds for which a failing operation is tried again, with growing pauses. By default 3 on a local
            disk and 60 on a store.
        options: passed to fsspec (credentials, endpoint). fsspec's own configuration files and variables count too.

    Raises (from all methods): :class:`StorageError` when the patience has run out, naming place and cause;
    ``FileNotFoundError`` and ``FileExistsError`` as they are. ``ConfigError``: the location has a password in it.
    """

    is_local = False

    def __new__(cls, location: str | os.PathLike[str], **_: Any) -> Storage:
        return object.__new__(cls if is_url(location) else LocalStorage)

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        patience: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if holds_secret(os.fspath(location)):
            raise ConfigError.single(
                "", f"{location} holds a secret, and a place is named in many records; {SECRET_HINT}"
            )
        self.options = dict(options or {})
        self.patience = (3.0 if self.is_local else 60.0) if patience is None else patience
        self.location = os.fspath(location).rstrip("/")
        if self.is_local:
            path = os.fspath(location).removeprefix("file://").removeprefix("local://")
            self.location = self._root = os.path.abspath(os.path.expanduser(path))
            self.fs = fsspec.filesystem("file")
        else:
            # The listings cache of s3fs and gcsfs hides what other processes write, from `ls` and from `info`.
            options = {"use_listings_cache": False, **self.options}
            try:
                self.fs, self._root = fsspec.core.url_to_fs(self.location, **options)
            except (
                ValueError,
                ImportError,
            ) as error:  # a protocol that fsspec doesn't know, or whose package isn't installed
                raise ConfigError.single("", f"{self.location} can't be reached: {error}") from None

    def sub(self, name: str) -> Storage:
        """The directory ``name`` inside this one (it need not exist)."""
        return Storage(self.join(name), patience=self.patience, options=self.options)

    def join(self, name: str) -> str:
        """Path or URL of ``name``."""
        return f"{self.location}/{name}" if name else self.location

    def read_bytes(self, name: str, *, most: int | None = None) -> bytes:
        """All bytes of a file.

        Raises:
            NotAFileError: it is none, or holds more than `most` bytes.
        """

        def action() -> bytes:
            if most is not None and (size := self.fs.info(self._at(name))["size"]) > most:
                raise NotAFileError(
                    errno.EFBIG, f"{size:,} bytes, where at most {most:,} are expected", self.join(name)
                )
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
        """Create or replace a file; a reader sees the old bytes or the new ones, also after a power cut."""
        self._retry("write", name, lambda: self._put(name, data))

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file with all its bytes; of many that try, one gets ``True``.

        ``False`` if it is there already with other bytes: a client's library tries again by itself when an answer is lost,
        and finds what it has written. So ``data`` must be the caller's own.
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

        Not atomic (callers publish by other means), but durable on return, and on a store nothing of a failed try is
        left. ``produce`` may be called again after a passing error, so it must be able to repeat itself.
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
        """Append one line, durably. On a store the object is written anew, so only its single owner may do this.

        A last line that a kill has torn is left alone: the new one stands on a line of its own.
        """
        self._retry("append to", name, lambda: self._append(name, line.rstrip("\n").encode() + b"\n"))

    def exists(self, name: str) -> bool:
        """Whether a file or directory of that name is there now."""

        try:
            return bool(self._afresh("look up", name, lambda: self.fs.info(self._at(name))))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def list(self, name: str = "") -> Sequence[str]:
        """Sorted names of the files and directories in ``name``, read afresh; empty if it isn't there."""

        try:
            entries = self._afresh("list", name, lambda: self.fs.ls(self._at(name), detail=False))
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in entries if path.rstrip("/") != self._at(name)})

    def walk(self, name: str = "") -> dict[str, int]:
        """Every file below ``name`` with its size in bytes; names are relative to this storage."""

        found = self._afresh("list", name, lambda: self.fs.find(self._at(name), detail=True))
        return {path[len(self._root) :].lstrip("/"): entry["size"] for path, entry in found.items()}

    def delete(self, name: str) -> None:
        """Delete a file, or a directory with all in it. It need not exist."""
        self._retry("delete", name, lambda: self._delete(name))

    def makedirs(self, name: str = "") -> None:
        """Create this directory with its parents, or one inside it, durably (nothing to do on a store).

        Raises:
            FileNotFoundError: `name` is wanted inside a directory that is gone. Nothing that is written inside brings it back.
        """

    def abort_uploads(self) -> int:
        """Abort the multipart uploads that killed writers left here (S3 has such); returns how many."""
        if not hasattr(self.fs, "list_multipart_uploads"):
            return 0

        def action() -> int:
            bucket, prefix, _ = self.fs.split_path(self._root)
            try:
                uploads = self.fs.list_multipart_uploads(bucket)
            except FileNotFoundError as error:
                raise StorageError(f"cannot use {self.location}: {error}") from error
            stale = [upload for upload in uploads if upload["Key"].startswith(prefix.rstrip("/") + "/")]
            for upload in stale:
                self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            return len(stale)

        return self._retry("list uploads below", "", action)

    def _afresh(self, what: str, name: str, action: Callable[[], T]) -> T:
        self.fs.invalidate_cache()
        return self._retry(what, name, action)

    def _retry(self, what: str, name: str, action: Callable[[], T]) -> T:
        return retried(what, self.join(name), action, self.patience)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

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
        if (held := self.fs.info(self._at(name))["size"]) != size:
            raise OSError(errno.EIO, f"the store holds {held} bytes where {size} were written", name)

    def _append(self, name: str, line: bytes) -> None:
        before = b""
        with contextlib.suppress(FileNotFoundError):
            before = self._read(name)
        torn = before and not before.endswith(b"\n")
        self._put(name, before + (b"\n" if torn else b"") + line)

    def _delete(self, name: str) -> None:
        for path in self.walk(name) or [name]:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(path))


class LocalStorage(Storage):
    """A directory of a mounted file system."""

    is_local = True

    def path(self, name: str = "") -> Path:
        """Path of ``name``."""
        return Path(self.join(name))

    def rename(self, source: str, target: str) -> None:
        """Rename a file or a directory within this storage, durably. A non-empty directory is never replaced."""
        self._retry("rename", source, lambda: os.rename(self.join(source), self.join(target)))
        self.fsync(os.path.dirname(target))

    def fsync(self, name: str = "") -> None:
        """Make the names in directory ``name`` durable."""
        self._retry("sync", name, lambda: _fsync_directory(self.path(name)))

    def makedirs(self, name: str = "") -> None:
        """Create this directory with its parents, or one inside it, if this one is still there; durably."""
        wanted, root = self.path(name), self.path()
        missing = [path for path in (wanted, *wanted.parents) if not path.exists()]

        def create(path: Path) -> None:
            path.mkdir(exist_ok=True)
            _fsync_directory(path.parent)

        for path in reversed(missing):
            if not name or path.is_relative_to(root / name.split("/")[0]):
                self._retry("create the directory", name, lambda path=path: create(path))  # type: ignore[misc]

    def sweep_temporaries(self, older_than: float = 600.0) -> None:
        """Delete what killed writers left here, if older (in seconds) than a live one's can be."""
        for path in self.path().glob(".tmp-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= older_than:
                    self.delete(path.name)

    @contextlib.contextmanager
    def _temporary(self, name: str, data: bytes) -> Iterator[Path]:
        """The bytes, durably, under a passing name beside the wanted one, which is durable afterwards."""
        path = self.path(name)
        self._make_room(name)
        temporary = path.parent / f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            _write_new(temporary, data)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_directory(path.parent)

    def _put(self, name: str, data: bytes) -> None:
        with self._temporary(name, data) as temporary:
            os.replace(temporary, self.join(name))

    def _create(self, name: str, data: bytes) -> None:
        with self._temporary(name, data) as temporary:
            try:
                os.link(
                    temporary, self.join(name)
                )  # it appears with all its bytes, or fails if the name is taken; on NFS too
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                _write_new(self.path(name), data)  # a file system without hard links

    @contextlib.contextmanager
    def _sink(self, name: str) -> Iterator[BinaryIO]:
        with open(self.join(name), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def _append(self, name: str, line: bytes) -> None:
        self._make_room(name)
        with open(self.join(name), "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            torn = end and os.pread(file.fileno(), 1, end - 1) != b"\n"
            append_whole(file, (b"\n" if torn else b"") + line, sync=True)

    def _make_room(self, name: str) -> None:
        if folder := os.path.dirname(name):
            self.makedirs(folder)

    def _open(self, name: str) -> BinaryIO:
        path = self.join(name)
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            mode = 0
        if not stat.S_ISREG(mode):
            kinds = {
                stat.S_IFDIR: "a directory",
                stat.S_IFIFO: "a FIFO",
                stat.S_IFSOCK: "a socket",
                0: "a link to itself",
            }
            kind = kinds.get(stat.S_IFMT(mode), "a device")
            raise NotAFileError(errno.EISDIR, f"expected a file, found {kind}", path)
        return open(path, "rb")

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read()

    def _delete(self, name: str) -> None:
        path = self.path(name)
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fsync_directory(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
