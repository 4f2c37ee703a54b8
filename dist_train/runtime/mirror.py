"""The files of a run under a URL that grow while it trains: kept in a local directory and uploaded whole.

Objects can't be appended to. So logs, metrics.jsonl, traces and TensorBoard's files are written to a directory of this
host, and go to the store before each checkpoint is published and at the end. What the store holds is the truth: a start
on another host begins with it.
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
from dist_train.runtime.storage import Storage, open_storage

log = logging.getLogger("dist_train")
POLL_SECONDS = 5.0
LAST_PATIENCE = 5.0
# Written to the store directly; what the mirror has of these are copies to read.
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
    """The files of a run on this host: those of its directory itself, or under a URL those that grow, and copies of others.

    Threads may share it. Where the run's directory is local, there is nothing to fetch and nothing to upload.

    Attributes:
        storage: the run's directory. location: its path or URL. root: where its files are on this host.
        shared: the files and folders that this process uploads for its host; None is all of them.
    """

    def __init__(self, location: str):
        self.storage = open_storage(location)
        self.location = self.storage.location
        self.root = Path(self.location) if self.storage.is_local else mirror_root(self.location)
        self.shared: Collection[str] | None = None
        self._store = self.storage.sub("")  # with a patience of its own
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._sending: threading.Thread | None = None

    def path(self, name: str) -> Path:
        """The local path of `name`."""
        return self.root / name

    def fetch(self, name: str) -> Path:
        """The local path of a file, with the store's content; what this host had of it is dropped.

        Raises:
            FileNotFoundError: the store doesn't hold it.
        """
        if not self.storage.is_local:
            self._keep(name, self._store.read_bytes(name))
        return self.path(name)

    def go_on_with(self, *names: str) -> None:
        """Begin with what the store holds of files that will be appended to; where it holds none, with none.

        A log that this host has more of than the store is kept: a start that was killed wrote its end.
        """
        for name in names if not self.storage.is_local else ():
            path = self.path(name)
            try:
                held = self._store.read_bytes(name)
            except FileNotFoundError:
                path.unlink(missing_ok=True)
                continue
            if not (name.startswith("logs/") and path.exists() and path.read_bytes().startswith(held)):
                self._keep(name, held)

    def upload(self, only: Collection[str] | None = None) -> None:
        """Send what has changed since it was sent last: of what is `shared`, or of some files and folders.

        Raises:
            StorageError: the store can't be written.
        """
        wanted = self.shared if only is None else only
        if self.storage.is_local or wanted == ():
            return
        with self._lock:
            for path in sorted(self.root.rglob("*")):
                name = path.relative_to(self.root).as_posix()
                if not path.is_file() or path.name.startswith(".tmp-") or name in COPIES:
                    continue
                if wanted is None or name.split("/")[0] in wanted:
                    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                        self._send(name, file)

    def upload_meanwhile(self) -> None:
        """The same in the background, for hosts other than rank 0's: a store that is away is rank 0's to tell."""

        def send() -> None:
            try:
                self.upload()
            except StorageError as error:
                log.warning("%s", error)

        if not self.storage.is_local and (self._sending is None or not self._sending.is_alive()):
            self._sending = threading.Thread(target=send, name="upload", daemon=True)
            self._sending.start()

    def hurry(self) -> None:
        """The run has failed: its last words don't wait for a store as long as its saves did."""
        for storage in (self.storage, self._store):
            storage.patience = min(storage.patience, LAST_PATIENCE)

    def close(self) -> None:
        """Wait for an upload that is under way."""
        if self._sending is not None:
            self._sending.join()

    def _keep(self, name: str, data: bytes) -> None:
        copies = open_storage(self.root)
        copies.makedirs()
        copies.write_atomic(name, data)

    def _send(self, name: str, file: BinaryIO) -> None:
        state = os.fstat(file.fileno())
        mark = (state.st_size, state.st_mtime_ns)
        if state.st_size and self._sent.get(name) != mark:
            self._store.write_stream(name, lambda sink: _copy(file, sink))
            self._sent[name] = mark


def _copy(file: BinaryIO, sink: BinaryIO) -> None:
    file.seek(0)  # the store may have lost the try before
    shutil.copyfileobj(file, sink, 4 << 20)


class Watch:
    """Looks for files (STOP, SAVE) every few seconds, in a thread of its own: whoever asks doesn't wait for the storage."""

    def __init__(self, storage: Storage, names: Collection[str]):
        self._storage = storage.sub("", patience=0.0)
        self._names = names
        self._seen: set[str] = set()
        self._over = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def take(self, name: str) -> bool:
        """Whether the file has come; it is gone by then, and the next one counts anew."""
        found = name in self._seen
        self._seen.discard(name)
        return found

    def close(self) -> None:
        """Stop looking."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(0.2 if self._storage.is_local else POLL_SECONDS):
            with contextlib.suppress(StorageError, OSError):  # a store that is away holds up saves, not this
                for name in self._names:
                    if self._storage.exists(name):
                        self._storage.delete(name)
                        self._seen.add(name)
