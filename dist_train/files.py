"""Durable local files: atomic writes, appends that leave nothing of a failure, and retries of errors that may pass."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Errors that waiting doesn't fix. Anything else that an operating system or a store reports may pass.
_FINAL = {"ENOSPC", "EDQUOT", "EROFS", "ENAMETOOLONG", "EFBIG", "EMFILE", "ENOTEMPTY"}
_FINAL |= {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"}
_FINAL_TYPES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "adlfs", "azure", "urllib3"}


class StorageError(Exception):
    """A disk or an object store that kept failing until its patience ran out. It doesn't mean that data is corrupted."""


def utc_now() -> str:
    """The time in UTC as ISO 8601 with milliseconds, such as 2026-03-01T12:00:00.123Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def retried(what: str, place: str | os.PathLike[str], action: Callable[[], T], patience: float = 3.0) -> T:
    """What `action` returns; it is called again after an error that may pass, for up to `patience` seconds.

    Raises:
        StorageError: it kept failing; names place and cause. FileNotFoundError, FileExistsError, IsADirectoryError,
            NotADirectoryError and errors that aren't of a disk or a store are raised as they are.
    """
    give_up, pause = 0.0, 0.1
    while True:
        try:
            return action()
        except Exception as error:
            known = isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENT_LIBRARIES
            if not known or isinstance(error, _FINAL_TYPES):
                raise
            now = time.monotonic()
            give_up = give_up or now + patience
            final = _FINAL & {errno.errorcode.get(getattr(error, "errno", None) or 0), type(error).__name__}
            if final or now + pause > give_up:
                raise StorageError(f"cannot {what} {place}: {type(error).__name__}: {error}") from error
        time.sleep(pause)  # no jitter: it would draw from a generator that training may use
        pause = min(pause * 2, 8.0)


def append_whole(file: io.FileIO, data: bytes, *, sync: bool = False) -> None:
    """Append to an unbuffered file, durably if `sync`. A failure leaves nothing behind, so that it can be repeated.

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


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name in the same directory, deleted afterwards if it is still there."""
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # what has been written is there; a name too many harms nobody
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, whose file becomes `path` if all goes well, and vanishes if not. Atomic, but not durable."""
    with temporary_beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


def write_atomic(path: Path, data: bytes) -> None:
    """Create or replace a file durably: a reader sees the old bytes or the new ones, also after a power failure."""
    with replacing(path) as temporary:
        write_new(temporary, data)
    fsync_directory(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, and its content to the disk; FileExistsError if it does."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
