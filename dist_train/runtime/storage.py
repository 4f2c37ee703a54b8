"""Files of a run, on a local disk or under any fsspec URL.

The two differ in what publishes a file: on a disk a rename does, on an object store (:mod:`.objectstore`) a single PUT.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from dist_train import files
from dist_train.config.errors import SECRET_HINT, ConfigError, holds_secret
from dist_train.runtime.objectstore import NotAFileError, Storage, after_torn

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", 0: "a link to itself"}


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether ``location`` is on an object store, as opposed to a path (or ``file://``) of a local disk."""
    text = os.fspath(location)
    return "://" in text and not text.startswith(("file://", "local://"))


def open_storage(
    location: str | os.PathLike[str], *, patience: float | None = None, options: Mapping[str, Any] | None = None
) -> Storage:
    """The directory at a path, or any URL that fsspec knows; it need not exist.

    Raises ConfigError if the location has a password in it, or its protocol is unknown or not installed.

    Args:
        patience: seconds for which a failing operation is retried, with growing pauses; by default 3 on a local disk and
            60 on an object store.
        options: passed to fsspec (credentials, endpoint). fsspec's own configuration files and variables count too.
    """
    if holds_secret(os.fspath(location)):
        why = "holds a secret, and a location is named in many records"
        raise ConfigError.single("", f"{location} {why}; {SECRET_HINT}")
    kind, usual = (Storage, 60.0) if is_url(location) else (LocalStorage, 3.0)
    return kind(os.fspath(location), usual if patience is None else patience, options)


class LocalStorage(Storage):
    """A directory of a mounted file system."""

    is_local = True

    def __init__(self, location: str, patience: float, options: Mapping[str, Any] | None = None) -> None:
        path = location.removeprefix("file://").removeprefix("local://")
        self.location = self._root = os.path.abspath(os.path.expanduser(path))
        self.patience, self.options, self.fs = patience, dict(options or {}), fsspec.filesystem("file")

    def path(self, name: str = "") -> Path:
        """Path of ``name``."""
        return Path(self.join(name))

    def rename(self, source: str, target: str) -> None:
        """Rename a file or a directory within this storage, durably. A non-empty directory is never replaced."""
        self._retry("rename", source, lambda: os.rename(self.join(source), self.join(target)))
        self.fsync(os.path.dirname(target))

    def fsync(self, name: str = "") -> None:
        """Make the names in directory ``name`` durable."""
        self._retry("sync", name, lambda: files.fsync_directory(self.path(name)))

    def makedirs(self, name: str = "") -> None:
        """Create this directory with its parents, or one inside it, if this one still exists; durably."""
        wanted, top = self.path(name), self.path(name.split("/")[0])
        for path in [path for path in (wanted, *wanted.parents) if not path.exists()][::-1]:
            if not name or path.is_relative_to(top):
                self._retry("create the directory", name, partial(path.mkdir, exist_ok=True))
                self._retry("sync", name, partial(files.fsync_directory, path.parent))

    def sweep_temporaries(self, older_than: float = 600.0) -> None:
        """Delete what killed writers left here, if older (in seconds) than a live one's can be."""
        for path in self.path().glob(".tmp-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= older_than:
                    self.delete(path.name)

    def _put(self, name: str, data: bytes) -> None:
        files.write_atomic(self._with_folder(name), data)

    def _create(self, name: str, data: bytes) -> None:
        path = self._with_folder(name)
        with files.temporary_beside(path) as temporary:
            files.write_new(temporary, data)
            try:
                os.link(temporary, path)  # it appears with all its bytes, or fails if the name is taken; on NFS too
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                files.write_new(path, data)  # a file system without hard links
        files.fsync_directory(path.parent)

    @contextlib.contextmanager
    def _sink(self, name: str) -> Iterator[BinaryIO]:
        with open(self.join(name), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def _append(self, name: str, line: bytes) -> None:
        with open(self._with_folder(name), "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            files.append_whole(file, after_torn(os.pread(file.fileno(), 1, max(end - 1, 0)), line), sync=True)

    def _with_folder(self, name: str) -> Path:
        if folder := os.path.dirname(name):
            self.makedirs(folder)
        return self.path(name)

    def _open(self, name: str) -> BinaryIO:
        path = self.join(name)
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            mode = 0
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
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
