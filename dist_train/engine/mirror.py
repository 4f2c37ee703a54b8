"""The files of a run under a URL that grow while it trains: kept in a local directory and uploaded whole.

Objects can't be appended to. So logs, metrics.jsonl, traces and TensorBoard's files are written to a directory of this
host, and go to the store before each checkpoint is published and at the end. What the store holds is the truth: a start
on another host begins with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from dist_train.runtime.storage import LocalStorage, Storage, StorageError

POLL_SECONDS = 5.0
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
    """The local side of a run's directory under a URL. Threads may share it."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.root = mirror_root(storage.location)
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def fetch(self, name: str) -> Path:
        """The local path of a file, with the store's content; what this host had of it is dropped.

        Raises:
            FileNotFoundError: the store doesn't hold it.
        """
        LocalStorage(self.root).write_atomic(name, self.storage.read_bytes(name))
        return self.root / name

    def go_on_with(self, *names: str) -> None:
        """Begin with what the store holds of files that will be appended to; where it holds none, with none.

        A log that this host has more of than the store is kept: a start that was killed wrote its end.
        """
        for name in names:
            path = self.root / name
            try:
                held = self.storage.read_bytes(name)
            except FileNotFoundError:
                path.unlink(missing_ok=True)
                continue
            if not (name.startswith("logs/") and path.exists() and path.read_bytes().startswith(held)):
                LocalStorage(self.root).write_atomic(name, held)

    def upload(self, only: Collection[str] | None = None) -> None:
        """Send what has changed since it was sent last: of all files, or of some files and folders.

        Raises:
            StorageError: the store can't be written.
        """
        with self._lock:
            for path in sorted(self.root.rglob("*")):
                name = path.relative_to(self.root).as_posix()
                if not path.is_file() or path.name.startswith(".tmp-") or name in COPIES:
                    continue
                if only is not None and name.split("/")[0] not in only:
                    continue
                with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                    self._send(name, file)

    def _send(self, name: str, file: BinaryIO) -> None:
        state = os.fstat(file.fileno())
        mark = (state.st_size, state.st_mtime_ns)
        if state.st_size and self._sent.get(name) != mark:
            self.storage.write_stream(name, lambda sink: _copy(file, sink))
            self._sent[name] = mark


def _copy(file: BinaryIO, sink: BinaryIO) -> None:
    file.seek(0)  # the store may have lost the try before
    shutil.copyfileobj(file, sink, 4 << 20)


class Watch:
    """Looks for files (STOP, SAVE) every few seconds, in a thread of its own: whoever asks doesn't wait for the storage."""

    def __init__(self, storage: Storage, names: Collection[str]):
        self._storage = Storage(storage.location, patience=0.0, options=storage.options)
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
