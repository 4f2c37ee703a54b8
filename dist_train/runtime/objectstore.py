"""Objects below a URL of fsspec: ``s3://``, ``gs://``, ``memory://`` and the rest."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from dist_train.runtime.storage import Storage, StorageError


class ObjectStorage(Storage):
    """A prefix of an object store, or any other file system of fsspec."""

    is_local = False

    def __init__(self, location: str | os.PathLike[str], **keywords: Any) -> None:
        super().__init__(location, **keywords)
        from fsspec.core import url_to_fs

        # The listings cache of s3fs and gcsfs hides what other processes write, from `ls` and from `exists`.
        text = os.fspath(location).rstrip("/")
        self.fs, self._root = url_to_fs(text, **{"use_listings_cache": False, **self.options})
        self.location = text

    def abort_uploads(self) -> int:
        """See :meth:`Storage.abort_uploads`."""
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
        held = self.fs.info(self._at(name))["size"]
        if held != size:
            raise OSError(errno.EIO, f"the store holds {held} bytes where {size} were written", name)

    def _append(self, name: str, line: str) -> None:
        try:
            before = self._read(name)
        except FileNotFoundError:
            before = b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        self._put(name, before + line.encode())

    def _exists(self, name: str) -> bool:
        self.fs.invalidate_cache()
        try:
            self.fs.info(self._at(name))
        except FileNotFoundError:
            return False
        return True

    def _list(self, name: str) -> Iterable[str]:
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self._at(name), detail=False)
        except FileNotFoundError:
            return []
        return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != self._at(name)}

    def _walk(self, name: str) -> dict[str, int]:
        self.fs.invalidate_cache()
        found = self.fs.find(self._at(name), detail=True)
        return {path[len(self._root) :].lstrip("/"): entry["size"] for path, entry in found.items()}

    def _delete(self, name: str) -> None:
        for path in self._walk(name) or [name]:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(path))

    def _makedirs(self, name: str) -> None:
        return None
