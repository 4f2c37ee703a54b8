"""Terminal output: a live bar and tables, or plain lines in a log. Never raises into the training."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from dist_train.config.errors import mask, visible
from dist_train.text import WIDTH, format_number, format_seconds, two_columns
from dist_train.tracking.logs import Capture

if TYPE_CHECKING:
    from dist_train.tracking.live import Live


class _Stream:
    """A text stream that masks secrets; silent once its reader has gone (`| head`, a closed terminal)."""

    def __init__(self, stream: TextIO | None) -> None:
        # Some services run without stdout.
        self._stream: Any = _nowhere() if stream is None or stream.closed else stream
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")  # a C locale

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._quietly(lambda: self._stream.write(mask(text)))
        return len(text)

    def flush(self) -> None:
        self._quietly(lambda: self._stream.flush())

    def _quietly(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError):  # the reader has gone, or the stream is closed
            lost, self._stream = self._stream, _nowhere()
            with contextlib.suppress(OSError, ValueError):  # Python flushes what is left when it exits (docs: SIGPIPE)
                os.dup2(self._stream.fileno(), lost.fileno())


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def wants_live(stream: Any) -> bool:
    """Whether the stream is a terminal with cursor control, without NO_COLOR and CI."""
    quiet = os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return bool(stream.isatty()) and not quiet


class Console:
    """Rank 0's terminal and every rank's log. Other ranks (`rank0=False`) write to their log file only.

    Thread-safe; nothing raises because of the terminal. `step` may be set at every step (it costs an attribute): the
    live bar moves with it between two log intervals.
    """

    def __init__(self, rank0: bool, *, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.rank0 = rank0
        self.step = 0
        self._out, self._err = _Stream(out or sys.stdout), _Stream(err or sys.stderr)
        self._lock = threading.RLock()
        self._log = logging.getLogger("dist_train")
        self._capture = Capture(self._show_warning if rank0 else None)
        self._live: Live | None = None
        self._began: tuple[int, float] | None = None
        self._epochs: int | None = None

    def start_block(self, lines: Sequence[tuple[str, str]]) -> None:
        """Print the block at the start: (label, value) pairs in two columns."""
        text = "\n".join(two_columns([(label, mask(value)) for label, value in lines]))
        for line in text.splitlines():
            self._log.info("%s", line)
        self._print(text + "\n")

    def begin(self, step: int, total_steps: int | None, epoch: int = 0, epochs: int | None = None) -> None:
        """Start the live bar and the clock that estimates the time left. `step`: steps done (of a resumed run)."""
        self.step, self._began, self._epochs = step, (step, time.monotonic()), epochs
        if not self.rank0 or self._live is not None or not wants_live(self._out):
            return
        try:
            from dist_train.tracking.live import Live

            self._live = Live(self._out, lambda: self.step, total_steps, self._epoch(epoch))
        except Exception as error:  # a broken rich or terminal: fall back to plain lines
            self._log.warning("no live bar: %r", error, extra={"shown": True})

    def progress(
        self,
        step: int,
        total_steps: int | None,
        epoch: int,
        metrics: Mapping[str, float],
        left: float | None = None,
    ) -> None:
        """At the log interval. metrics: the train row's, the most important first; what doesn't fit is left out.

        left: seconds to go where the caller knows them (a duration in time); by default estimated from the steps.
        """
        self.step = step
        if not self.rank0:
            return
        first, since = self._began = self._began or (step, time.monotonic())
        if left is None and total_steps is not None and step > first:
            left = (time.monotonic() - since) / (step - first) * (total_steps - step)
        of = "" if total_steps is None else f"/{total_steps}"
        line = f"{self._epoch(epoch)}  step {step:>{max(0, len(of) - 1)}}{of}"
        rate = metrics.get("samples_per_s")
        tail = "" if rate is None else f"  {format_number('samples_per_s', rate)} samples/s"
        tail += "" if left is None else f"  eta {format_seconds(left)}"
        for name, value in metrics.items():
            piece = f"  {name} {format_number(name, value)}"
            if name != "samples_per_s" and len(line) + len(piece) + len(tail) <= WIDTH:
                line += piece
        self._log.info("%s", line + tail)
        if self._live is not None:
            self._live.show(total_steps, self._epoch(epoch), metrics, left)
        else:
            self._print(line + tail)

    def evaluation(self, split: str, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation: a table on a terminal, a line in a log. `eval_samples` is its number of samples."""
        if not self.rank0:
            return
        self.step = max(self.step, step)
        samples = f" ({metrics['eval_samples']:,.0f} samples)" if "eval_samples" in metrics else ""
        metrics = {name: value for name, value in metrics.items() if name != "eval_samples"}
        values = "  ".join(f"{name} {format_number(name, value)}" for name, value in metrics.items())
        line = f"{split:<5} step {step}  {values}{samples and ' '}{samples}"
        self._log.info("%s", line)
        if self._live is not None:
            self._live.evaluation(split, step, metrics, samples)
        else:
            self._print(line)

    def note(self, text: str) -> None:
        """Print a line and log it."""
        self._log.info("%s", text)
        self._print(text)

    def warn(self, text: str) -> None:
        """A warning: on stderr (above the live bar where there is one) and in the log file."""
        self._log.warning("%s", text, extra={"shown": True})
        self._show_warning(text)

    def end_block(self, lines: Sequence[tuple[str, str]]) -> None:
        """Print the block at the end, without the live bar."""
        if self._live is not None:
            self._stop_live()
            self._print("")
        self.start_block(lines)

    def close(self) -> None:
        """Restore the terminal and Python's logging; idempotent."""
        self._stop_live()
        self._capture.close()

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _epoch(self, epoch: int) -> str:
        of = "" if self._epochs is None else f"/{self._epochs}"
        return f"epoch {epoch:>{max(0, len(of) - 1)}}{of}"

    def _show_warning(self, text: str) -> None:
        self._print(f"warning: {text}", self._err, "yellow")

    def _print(self, text: str, stream: _Stream | None = None, style: str | None = None) -> None:
        text = visible(mask(text))  # before anything wraps or truncates it
        live = self._live  # another thread may stop it meanwhile
        if live is not None:
            live.say(text, style)
        elif self.rank0:
            with self._lock:
                stream = stream or self._out
                stream.write(text + "\n")
                stream.flush()
