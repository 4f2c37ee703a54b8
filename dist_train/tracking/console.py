"""Terminal output: a live bar and rows, or plain lines in a log. Never raises into the training."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from dist_train.config.errors import mask, visible
from dist_train.text import WIDTH, format_number, format_seconds, two_columns
from dist_train.tracking.live import Beside, Live, LiveView, Position
from dist_train.tracking.logs import Capture
from dist_train.tracking.terminal import (
    Stream,
    bottom_line,
    close_bottom_line,
    columns,
    has_color,
    is_terminal,
    painted,
    show_status,
    wrapped,
)

PAUSE = (
    0.25  # seconds between two looks at what training has handed over: waking for each row would take the GIL from it
)
OFTEN, SELDOM = 5.0, 60.0  # seconds between two rows where there are no evaluations: one an epoch, within these


class Console:
    """Rank 0's terminal and every rank's log. Other ranks (`rank0=False`) write to their log file only.

    Thread-safe; nothing raises because of the terminal. `step` may be set at every step (it costs an attribute): the
    live bar moves with it between two log intervals. From `begin` to `close` a thread draws the bar and writes the lines of log
    intervals, up to a quarter of a second after `progress`, which so takes microseconds of training.
    """

    def __init__(
        self, rank0: bool, *, out: TextIO | None = None, err: TextIO | None = None,
        live: Callable[[Position], LiveView | None] = lambda position: None,
    ) -> None:  # fmt: skip
        """live: what is shown instead of a terminal's bar where it gives something, as in a notebook."""
        self.rank0 = rank0
        self._make_live = live
        self.step = 0
        self._out, self._err = Stream(out or sys.stdout), Stream(err or sys.stderr)
        self._line = bottom_line(out) if rank0 else None
        self._lock = threading.RLock()
        self._log = logging.getLogger("dist_train")
        self._capture = Capture(self._show_warning if rank0 else None)
        self._live: LiveView | None = None
        self._at: Position | None = None
        self._waiting: deque[tuple[int, int | None, int, Mapping[str, float], float | None]] = deque()
        self._rows_at: tuple[float, int] | None = None  # the last row without an evaluation: when, and its epoch
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def start_block(self, lines: Sequence[tuple[str, str]]) -> None:
        """Print the block at the start: (label, value) pairs in two columns."""
        masked = [(label, mask(value)) for label, value in lines]
        for line in two_columns(masked):
            self._log.info("%s", line)
        self._print("\n".join(two_columns(masked, columns(self._out))) + "\n")

    def working(self, what: str) -> None:
        """Show at the bottom of a terminal what takes a while, before and after the training steps."""
        self._drain()
        self._stop_live()
        if self._line is not None:
            show_status(what)

    def begin(
        self, step: int, total_steps: int | None, epoch: int = 0, epochs: int | None = None, *,
        seconds: float = 0.0, evaluates: bool = True, doing: Callable[[], str] = str,
    ) -> None:  # fmt: skip
        """Start the live bar, the clock that estimates the time left, and the thread that prints.

        Args:
            step: steps done (of a resumed run). seconds: trained so far, in earlier starts.
            evaluates: whether evaluations follow; rows of the table are theirs. doing: what goes on, if not training steps.
        """
        self.step = step
        if self._thread is not None or not self.rank0:
            return
        self._at = Position(lambda: self.step, doing, total_steps, step, epoch=epoch, epochs=epochs, before=seconds)
        self._rows_at = None if evaluates else (self._at.began, epoch)
        self._live = self._make_live(self._at)
        if self._live is None and self._line is not None:
            self._live = Live(self._line, self._at)
        self._thread = threading.Thread(target=self._run, name="dist_train-console", daemon=True)
        self._thread.start()

    def progress(
        self, step: int, total_steps: int | None, epoch: int, metrics: Mapping[str, float], left: float | None = None
    ) -> None:
        """At the log interval. metrics: the train row's, the most important first; what doesn't fit is left out.

        left: seconds to go where the caller knows them (a duration in time); by default estimated from the steps.
        """
        self.step = step
        if not self.rank0:
            return
        if (at := self._at) is not None:
            at.total, at.epoch, at.metrics = total_steps, epoch, metrics
            at.until = None if left is None else time.monotonic() + left
            left = at.left(step)
        self._waiting.append((step, total_steps, epoch, metrics, left))
        if self._thread is None:
            self._drain()

    def evaluation(self, split: str, step: int, metrics: Mapping[str, float], beside: Beside | None = None) -> None:
        """After an evaluation: a row on a terminal, a line in a log. `eval_samples` is its number of samples."""
        if not self.rank0:
            return
        self._drain()
        self.step = max(self.step, step)
        samples = f"  ({metrics['eval_samples']:,.0f} samples)" if "eval_samples" in metrics else ""
        metrics = {name: value for name, value in metrics.items() if name != "eval_samples"}
        values = "  ".join(f"{name} {format_number(name, value)}" for name, value in metrics.items())
        line = f"{split:<5} step {step}  {values}{samples}"
        self._log.info("%s", line)
        if self._live is not None and beside is not None:
            self._live.row(step, metrics, beside)
        elif self._line is None:  # of the test data the last block tells a person
            self._print(line)

    def note(self, text: str) -> None:
        """Print a line and log it."""
        self._drain()
        self._log.info("%s", text)
        self._print(text, wraps=True)

    def warn(self, text: str) -> None:
        """A warning: on stderr (above the live bar where there is one) and in the log file."""
        self._log.warning("%s", text, extra={"shown": True})
        self._show_warning(text)

    def end_block(self, lines: Sequence[tuple[str, str]]) -> None:
        """Print the block at the end, without the live bar."""
        shown = self._at is not None and self._line is not None
        self.close_live()
        self.start_block([("", ""), *lines] if shown else lines)

    def close_live(self) -> None:
        """Print what is waiting, and remove the live bar."""
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2)
        self._drain()
        self._stop_live()
        if self._line is not None:
            self._line = None
            close_bottom_line()

    def close(self) -> None:
        """Restore the terminal and Python's logging; idempotent."""
        self.close_live()
        self._capture.close()

    def _run(self) -> None:
        while not self._closing.wait(PAUSE):
            self._drain()
            live = self._live
            if live is not None:
                live.refresh()

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _drain(self) -> None:
        """Log and print what `progress` has left."""
        if os.getpid() != self._pid:
            return  # a fork (a loader worker that warns): another thread may have held the lock
        with self._lock:
            while self._waiting:
                step, total, epoch, metrics, left = self._waiting.popleft()
                line = self._progress_line(step, total, epoch, metrics, left)
                self._log.info("%s", line)
                if self._live is None:
                    self._print(line)
                elif self._rows_at is not None and self._row_due(step, total, epoch, left):
                    self._rows_at = time.monotonic(), epoch
                    lr = {name: value for name, value in metrics.items() if name.startswith("lr")}
                    self._live.row(step, {}, Beside(epoch, {"loss": metrics.get("loss", float("nan"))}, lr))

    def _row_due(self, step: int, total: int | None, epoch: int, left: float | None) -> bool:
        assert self._rows_at is not None
        since, before = time.monotonic() - self._rows_at[0], self._rows_at[1]
        return step == total or left == 0 or since > (OFTEN if epoch != before else SELDOM)

    def _progress_line(
        self, step: int, total: int | None, epoch: int, metrics: Mapping[str, float], left: float | None
    ) -> str:
        of = "" if total is None else f"/{total}"
        line = f"{_epoch(epoch, self._at.epochs if self._at is not None else None)}  step {step:>{max(0, len(of) - 1)}}{of}"
        rate = metrics.get("samples_per_s")
        tail = "" if rate is None else f"  {format_number('samples_per_s', rate)} samples/s"
        tail += "" if left is None else f"  eta {format_seconds(left)}"
        for name, value in metrics.items():
            if name == "samples_per_s":
                continue
            piece = f"  {name} {format_number(name, value)}"
            if len(line) + len(piece) + len(tail) <= WIDTH:
                line += piece
        return line + tail

    def _show_warning(self, text: str) -> None:
        self._drain()
        self._print(f"warning: {text}", self._err, "yellow", wraps=True)

    def _print(self, text: str, stream: Stream | None = None, style: str = "", wraps: bool = False) -> None:
        text = visible(mask(text))  # before anything wraps or truncates it
        stream = stream or self._out
        if is_terminal(stream):
            text = painted(wrapped(text, columns(stream)) if wraps else text, style, has_color(stream))
        line = self._line  # another thread may close it meanwhile
        if line is not None and is_terminal(stream):
            line.above(text)
        elif self.rank0:
            with self._lock:
                stream.write(text + "\n")
                stream.flush()


def _epoch(epoch: int, epochs: int | None) -> str:
    of = "" if epochs is None else f"/{epochs}"
    return f"epoch {epoch:>{max(0, len(of) - 1)}}{of}"
