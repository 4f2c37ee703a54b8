"""The growing files of a run under a URL: kept in a local directory; each upload sends the entire file.

Objects can't be appended to. So logs, metrics.jsonl, traces, digests and TensorBoard's files are written to a directory of this
host, and uploaded before each checkpoint is published and at the end. The store is the source of truth: a start on
another host begins with what it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from dist_train.files import StorageError
from dist_train.runtime.sharing import Sharing
from dist_train.runtime.storage import Storage, open_storage

log = logging.getLogger("dist_train")
POLL_SECONDS = 5.0
LAST_PATIENCE = 5.0
# Written to the store directly; the mirror only has copies to read.
COPIES = ("config.yaml", "status.json", "result.json", "attempts.jsonl")


def mirror_root(url: str) -> Path:
    """The directory of this host for a run's URL: the same at each start, in the user's cache (`XDG_CACHE_HOME`)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dist_train", "runs")
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"set XDG_CACHE_HOME to a directory of this host for the files of {url}: {error}") from error
    return cache / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rstrip("/").rsplit("/", 1)[-1]


class Mirror:
    """The files of a run on this host: of a local run the files themselves, with nothing to fetch and nothing to upload;
    under a URL the growing ones and copies. Threads may share it.

    Attributes:
        storage: the run's directory. location: its path or URL. root: where its files are on this host.
        uploaded: the files and folders that this process uploads; None is all of them. sharing: whose files it uploads.
    """

    def __init__(self, location: str):
        self.storage = open_storage(location)
        self.location = self.storage.location
        self.root = Path(self.location) if self.storage.is_local else mirror_root(self.location)
        self.uploaded: Collection[str] | None = None
        self.sharing = Sharing()
        self._store = self.storage.sub("")  # with a patience of its own
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._sending: threading.Thread | None = None

    def path(self, name: str) -> Path:
        """The local path of `name`."""
        return self.root / name

    def fetch(self, name: str) -> Path:
        """The local path of a file, with the store's content (FileNotFoundError without one), which replaces this host's."""
        if not self.storage.is_local:
            self._keep(name, self._store.read_bytes(name))
        return self.path(name)

    def resume_files(self, *names: str) -> None:
        """Make files that will be appended to what the store holds; delete those that it doesn't hold.

        A log that extends the store's is kept: a killed start wrote its end.
        """
        for name in names if not self.storage.is_local else ():
            path = self.path(name)
            try:
                stored = self._store.read_bytes(name)
            except FileNotFoundError:
                path.unlink(missing_ok=True)
                continue
            if not (name.startswith("logs/") and path.exists() and path.read_bytes().startswith(stored)):
                self._keep(name, stored)

    def upload(self, only: Collection[str] | None = None) -> None:
        """Upload what has changed since its last upload: of `uploaded`, or of some files and folders."""
        wanted = self.uploaded if only is None else only
        if self.storage.is_local or wanted == ():
            return
        with self._lock:
            for path in sorted(self.root.rglob("*")):
                name = path.relative_to(self.root).as_posix()
                mine = (wanted is None or name.split("/")[0] in wanted) and self.sharing.uploads(name)
                if mine and path.is_file() and not path.name.startswith(".tmp-") and name not in COPIES:
                    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                        self._send(name, file)

    def upload_in_background(self) -> None:
        """The same in a thread, for hosts other than rank 0's: an unreachable store is for rank 0 to report."""

        def send() -> None:
            try:
                self.upload()
            except StorageError as error:
                log.warning("%s", error)

        if not self.storage.is_local and (self._sending is None or not self._sending.is_alive()):
            self._sending = threading.Thread(target=send, name="upload", daemon=True)
            self._sending.start()

    def shorten_timeouts(self) -> None:
        """The run has failed: its last records don't wait for a store as long as its saves did."""
        for storage in (self.storage, self._store):
            storage.patience = min(storage.patience, LAST_PATIENCE)

    def close(self) -> None:
        """Wait for an upload in progress."""
        if self._sending is not None:
            self._sending.join()

    def _keep(self, name: str, data: bytes) -> None:
        copies = open_storage(self.root)
        copies.makedirs()
        copies.write_atomic(name, data)

    def _send(self, name: str, file: BinaryIO) -> None:
        def copy(sink: BinaryIO) -> None:
            file.seek(0)  # it may be a retry
            shutil.copyfileobj(file, sink, 4 << 20)

        state = os.fstat(file.fileno())
        mark = (state.st_size, state.st_mtime_ns)
        if state.st_size and self._sent.get(name) != mark:
            self._store.write_stream(name, copy)
            self._sent[name] = mark


class Watch:
    """Looks for files (STOP, SAVE) every few seconds in a thread of its own, so that nobody waits for the storage."""

    def __init__(self, storage: Storage, names: Collection[str]):
        self._storage = storage.sub("", patience=0.0)
        self._names = names
        self._seen: set[str] = set()
        self._over = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def take(self, name: str) -> bool:
        """Whether the file was found since the last call; it has been deleted."""
        found = name in self._seen
        self._seen.discard(name)
        return found

    def close(self) -> None:
        """Stop looking."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(0.2 if self._storage.is_local else POLL_SECONDS):
            with contextlib.suppress(StorageError, OSError):  # an unreachable store holds up saves, not this
                for name in self._names:
                    if self._storage.exists(name):
                        self._storage.delete(name)
                        self._seen.add(name)
