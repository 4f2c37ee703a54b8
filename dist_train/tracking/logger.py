"""The logger: every row goes into metrics.jsonl at once, then to sinks (TensorBoard, wandb) in the background.

A sink is an object with any of the methods row(row), image(name, step, array), histogram(name, step, array), graph(model,
inputs), flush() and close(outcome) (see `Logger`); a method that it lacks isn't called. It lives in a thread of its own, where
it may fail or hang without hurting the run; `abandon()` is called from another thread when it hangs.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from dist_train.files import append_whole, retried
from dist_train.tracking.records import encode, make_row
from dist_train.tracking.table import Table

BACKLOG = 10_000  # calls that may wait for a slow sink before it is switched off
STUCK = 60.0  # seconds that one call may take once the backlog is full
PAUSE = 0.5  # seconds between two polls of the queue: waking for each row would take the GIL from the training loop
_NOBODY_WAITS = threading.Event()


class Logger:
    """Writes every row to metrics.jsonl and passes it to the sinks.

    Ranks other than 0 have one without a file and without sinks, which discards everything.
    """

    def __init__(self, path: Path | None = None, sinks: Collection[SinkThread] = ()) -> None:
        self._path, self._sinks = path or Path(os.devnull), sinks
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: io.FileIO | None = None
        if path is not None:
            self._file = retried("open", path, lambda: open(path, "ab", buffering=0))  # noqa: SIM115
        self._synced = 0 if self._file is None else self._file.tell()
        self._table = Table(self._path)

    def row(self, split: str, step: int, epoch: int | float, samples: int, metrics: Mapping[str, Any]) -> None:
        """One row: {"time", "step", "epoch", "samples", "split", **metrics}; flushed to the OS when this returns.

        split: train, val or test. step: from 1. samples: consumed since the run started. metrics: numbers.
        Raises ValueError for a metric named like a field, StorageError naming the file when it can't be written completely.
        """
        if self._file is None:
            return
        row = make_row(split, step, epoch, samples, metrics)
        file, line = self._file, encode(row)
        retried("write", self._path, lambda: append_whole(file, line))
        self._put("row", row)

    def image(self, name: str, step: int, picture: Any) -> None:
        """A picture: a NumPy array (H, W) or (H, W, 3), uint8 or float in [0, 1], not written to afterwards."""
        self._put("image", name, step, picture)

    def histogram(self, name: str, step: int, values: Any) -> None:
        """A NumPy array of any shape (weights, gradients), not written to afterwards."""
        self._put("histogram", name, step, values)

    def graph(self, model: Any, inputs: Any, timeout: float = 600.0) -> None:
        """The model's graph, traced on an example of its inputs.

        Blocks until it is done: tracing draws from torch's default generator in the sink's thread.
        """
        self._put("graph", model, inputs, wait=timeout)

    def flush(self, wait: float = 0.0) -> None:
        """Make the rows so far durable (they survive a power failure): called before a checkpoint is published.

        Costs an fsync; may be called from the publishing thread. The sinks flush too; `wait` is for how many seconds
        to wait for them (before their files are uploaded).
        """
        self._sync()
        self._update_table()
        self._put("flush", wait=wait)

    def close(self, outcome: str, timeout: float = 15.0) -> None:
        """The end of this start: outcome is completed, preempted or failed.

        Takes at most `timeout` seconds; a sink that isn't done by then is switched off with a warning.
        """
        self._sync()
        self._update_table()
        if self._file is not None:
            self._file.close()
        end = time.monotonic() + timeout
        for sink in self._sinks:
            sink.close(outcome, end - time.monotonic())

    def _sync(self) -> None:
        if self._file is None or self._file.closed:
            return
        file, tries = self._file, list[int]()

        def sync() -> None:
            if tries:  # after a failed fsync the kernel marks those pages clean: write them again
                with open(self._path, "r+b", buffering=0) as again:
                    again.seek(self._synced)
                    rows = again.read()
                    again.seek(self._synced)
                    again.write(rows)
            tries.append(1)
            end = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
            self._synced = end

        retried("sync", self._path, sync)

    def _update_table(self) -> None:
        """metrics.csv, which is a copy only: a full disk or a file that a spreadsheet has locked is no failure."""
        if self._file is None or self._file.closed:
            return
        try:
            self._table.update()
        except OSError as error:
            logging.getLogger("dist_train").warning("metrics.csv isn't up to date: %s", error)

    def _put(self, method: str, *args: Any, wait: float | None = None) -> None:
        waiting = [sink.put(method, *args, now=wait is not None) for sink in self._sinks]
        end = time.monotonic() + (wait or 0.0)
        for done in waiting if wait else ():
            done.wait(max(0.0, end - time.monotonic()))


class SinkThread:
    """Runs one sink behind a queue. The first call starts the thread; `make` (with its imports) runs inside it.

    An exception or a hang switches the sink off, with one warning that names it.
    """

    def __init__(self, name: str, make: Callable[[], Any], warn: Callable[[str], None]) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._queue: deque[tuple[str, tuple[Any, ...], threading.Event]] = deque()
        self._sink: Any = None
        self._wake = threading.Event()  # don't wait for the next poll
        self._thread: threading.Thread | None = None
        self._off = threading.Lock()  # acquired, and never released, to switch the sink off
        self._since = time.monotonic()  # when the sink's present call began

    def put(self, method: str, *args: Any, now: bool = False) -> threading.Event:
        """Queue `sink.method(*args)`; if `now`, the returned event is set when it is done. Costs microseconds, never raises."""
        done = threading.Event() if now else _NOBODY_WAITS
        if self._off.locked() or (self._thread is None and method in ("flush", "close")):
            done.set()
            return done
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"tracking-{self.name}", daemon=True)
            self._thread.start()
        self._queue.append((method, args, done))
        if now:
            self._wake.set()
        elif len(self._queue) > BACKLOG and time.monotonic() - self._since > STUCK:
            self._switch_off(f"it has accepted nothing for {time.monotonic() - self._since:.0f} s")
        return done

    def close(self, outcome: str, timeout: float) -> None:
        """Close the sink after what is queued; switched off if that takes longer than `timeout` seconds."""
        if not self.put("close", outcome, now=True).wait(max(0.0, timeout)):
            self._switch_off(f"it did not end within {timeout:.0f} s")

    def _switch_off(self, why: str) -> None:
        if self._off.acquire(blocking=False):
            self._warn(
                f"tracking: {self.name} is switched off for the rest of this run: {why} (metrics.jsonl is complete)"
            )
            getattr(self._sink, "abandon", lambda: None)()

    def _run(self) -> None:
        method = ""
        while method != "close" and not self._off.locked():
            self._since = time.monotonic()
            if not self._queue:
                self._wake.wait(PAUSE)
                self._wake.clear()
                continue
            method, args, done = self._queue.popleft()
            try:
                self._sink = self._sink or self._make()
                getattr(self._sink, method, lambda *_: None)(*args)
            except Exception as error:
                self._switch_off(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")
            finally:
                done.set()
        for _, _, done in self._queue:  # nobody waits for a sink that is off
            done.set()
