"""Views of the record: each sink lives in a thread of its own, where it may fail or hang without hurting the run.

A sink is an object with any of the methods row(row), image(name, step, array), histogram(name, step, array), graph(model,
inputs), flush() and close(outcome) (see `Logger`); what it lacks it isn't asked for. `abandon()` is called from another
thread when it hangs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from dist_train.tracking.records import FIELDS, Row

BACKLOG = 10_000  # calls that may wait for a slow sink before it is given up
STUCK = 60.0  # seconds that one call may take once the backlog is full
PAUSE = 0.5  # seconds between two looks into the queue: waking for each row would take the GIL from the training loop


class SinkThread:
    """Runs one sink behind a queue. The first call starts the thread; `make` (with its imports) runs inside it.

    Whatever the sink raises, or a hang, switches it off with one call of `warn` that names it.
    """

    def __init__(self, name: str, make: Callable[[], Any], warn: Callable[[str], None]) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._queue: deque[tuple[str, tuple[Any, ...], threading.Event]] = deque()
        self._sink: Any = None
        self._hurry = threading.Event()  # don't wait for the next look into the queue
        self._thread: threading.Thread | None = None
        self._off = threading.Lock()  # held for ever by whoever switches the sink off
        self._since = time.monotonic()  # when the sink's present call began

    def put(self, method: str, *args: Any, hurry: bool = False) -> threading.Event:
        """Queues `sink.method(*args)`; what it returns is set afterwards. Costs microseconds, never raises."""
        done = threading.Event()
        if self._off.locked() or (self._thread is None and method in ("flush", "close")):
            done.set()
            return done
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"tracking-{self.name}", daemon=True)
            self._thread.start()
        self._queue.append((method, args, done))
        if hurry:
            self._hurry.set()
        elif len(self._queue) > BACKLOG and time.monotonic() - self._since > STUCK:
            self._switch_off(f"it has taken nothing for {time.monotonic() - self._since:.0f} s")
        return done

    def close(self, outcome: str, timeout: float) -> None:
        """Closes the sink after all that was queued; one that takes longer than `timeout` seconds is switched off."""
        if not self.put("close", outcome, hurry=True).wait(max(0.0, timeout)):
            self._switch_off(f"it did not end within {timeout:.0f} s")

    def _switch_off(self, why: str) -> None:
        if self._off.acquire(blocking=False):
            self._warn(f"tracking: {self.name} is switched off for the rest of this run: {why}; metrics.jsonl goes on")
            getattr(self._sink, "abandon", lambda: None)()

    def _run(self) -> None:
        method = ""
        while method != "close" and not self._off.locked():
            self._since = time.monotonic()
            if not self._queue:
                self._hurry.wait(PAUSE)
                self._hurry.clear()
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


class TensorBoard:
    """TensorBoard event files. Tags are split/metric (train/loss, val/accuracy); the x axis is the step.

    A resumed run passes purge_step, so that TensorBoard hides what the run before it wrote after the checkpoint.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)
        self.flush = self._writer.flush

    def row(self, row: Row) -> None:
        """One event for the whole row (add_scalar would make one a metric), at the row's own time."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        values = [
            summary_pb2.Summary.Value(tag=f"{row['split']}/{name}", simple_value=value)
            for name, value in row.items()
            if name not in FIELDS
        ]
        event = event_pb2.Event(summary=summary_pb2.Summary(value=values))
        self._writer.file_writer.add_event(event, row["step"], datetime.fromisoformat(row["time"]).timestamp())

    def image(self, name: str, step: int, picture: Any) -> None:
        """A picture in the images tab."""
        self._writer.add_image(name, picture, step, dataformats="HW" if picture.ndim == 2 else "HWC")

    def histogram(self, name: str, step: int, values: Any) -> None:
        """A histogram; arrays with values that aren't finite are left out (TensorBoard can't bin them)."""
        import numpy

        if numpy.isfinite(values).all() and values.size:
            self._writer.add_histogram(name, values, step)

    def graph(self, model: Any, inputs: Any) -> None:
        """The model's graph, traced; a model that can't be is told in a warning, and the rest goes on."""
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints its errors too
            warnings.simplefilter("ignore")
            try:
                self._writer.add_graph(model, inputs, use_strict_trace=False)
            except Exception as error:
                text = "TensorBoard has no graph, torch.jit.trace failed: %s: %s"
                reason = str(error).strip().partition("\n")[0]
                logging.getLogger("dist_train").warning(text, type(error).__name__, reason)

    def close(self, outcome: str) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()
