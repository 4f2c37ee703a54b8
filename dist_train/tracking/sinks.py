"""Views of the record: each sink lives in a thread of its own, where it may fail or hang without hurting the run."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from dist_train.tracking.records import FIELDS, Row

BACKLOG = 10_000  # calls that may wait for a slow sink before it is given up
STUCK = 60.0  # seconds that one call may take once the backlog is full
PAUSE = 0.5  # seconds between two looks into the queue: waking for each row would take the GIL from the training loop


class Sink(Protocol):
    """What a view implements. All of it is called in the sink's own thread, heavy imports included."""

    def row(self, row: Row) -> None:
        """Takes one row of the record."""

    def text(self, name: str, text: str) -> None:
        """Takes a text (markdown) under a name."""

    def flush(self) -> None:
        """Brings to disk what was taken so far."""

    def close(self, outcome: str) -> None:
        """The end: outcome is completed, preempted or failed."""


class SinkThread:
    """Runs one sink behind a queue. The first call starts the thread; `make` (with its imports) runs inside it.

    Whatever the sink raises, or a hang, switches it off with one call of `warn` that names it.
    """

    def __init__(self, name: str, make: Callable[[], Any], warn: Callable[[str], None]) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._queue: deque[tuple[str, tuple[Any, ...], threading.Event | None]] = deque()
        self._hurry = threading.Event()  # don't wait for the next look into the queue
        self._thread: threading.Thread | None = None
        self._off = threading.Lock()  # held for ever by whoever switches the sink off
        self._since = time.monotonic()  # when the sink's present call began

    @property
    def on(self) -> bool:
        """Whether the sink still takes calls."""
        return not self._off.locked()

    def put(self, method: str, *args: Any, done: threading.Event | None = None) -> None:
        """Queues `sink.method(*args)`; `done` is set afterwards. Costs microseconds, never raises."""
        if not self.on:
            if done is not None:
                done.set()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"tracking-{self.name}", daemon=True)
            self._thread.start()
        self._queue.append((method, args, done))
        if done is not None:
            self._hurry.set()
        elif len(self._queue) > BACKLOG and time.monotonic() - self._since > STUCK:
            self.switch_off(f"it has taken nothing for {time.monotonic() - self._since:.0f} s")

    def switch_off(self, why: str) -> None:
        """Ends the sink's part in the run, with one warning."""
        if self._off.acquire(blocking=False):
            self._warn(f"tracking: {self.name} is switched off for the rest of this run: {why}; metrics.jsonl goes on")

    def wait(self, method: str, *args: Any, timeout: float) -> None:
        """Calls `sink.method(*args)` after all that was queued, for at most `timeout` seconds."""
        if self._thread is None or not self.on:
            return
        done = threading.Event()
        self.put(method, *args, done=done)
        if not done.wait(max(0.0, timeout)):
            self.switch_off(f"{method} did not end within {timeout:.0f} s")

    def _run(self) -> None:
        sink: Any = None
        method = ""
        while method != "close" and self.on:
            self._since = time.monotonic()
            if not self._queue:
                self._hurry.wait(PAUSE)
                self._hurry.clear()
                continue
            method, args, done = self._queue.popleft()
            try:
                sink = self._make() if sink is None else sink
                getattr(sink, method)(*args)
            except Exception as error:
                self.switch_off(f"{type(error).__name__}: {error}")
            finally:
                if done is not None:
                    done.set()
        for _, _, done in self._queue:  # nobody waits for a sink that is off
            if done is not None:
                done.set()


class TensorBoard:
    """TensorBoard event files. Tags are split/metric (train/loss, val/accuracy); the x axis is the step.

    A resumed run passes purge_step, so that TensorBoard hides what the run before it wrote after the checkpoint.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from torch.utils.tensorboard import SummaryWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)

    def row(self, row: Row) -> None:
        """One event for the whole row (add_scalar would make one a metric), at the row's own time."""
        values = [
            self._summary.Value(tag=f"{row['split']}/{name}", simple_value=value)
            for name, value in row.items()
            if name not in FIELDS
        ]
        at = datetime.fromisoformat(row["time"]).timestamp()
        self._writer.file_writer.add_event(self._event(summary=self._summary(value=values)), row["step"], at)

    def text(self, name: str, text: str) -> None:
        """Markdown in the text tab."""
        self._writer.add_text(name, text)

    def flush(self) -> None:
        """Writes the event file to disk."""
        self._writer.flush()

    def close(self, outcome: str) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()
