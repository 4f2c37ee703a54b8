"""Views of the record: each sink lives in a thread of its own, where it may fail or hang without hurting the run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dist_train.tracking.records import FIELDS, Row, encode

Note = Callable[[str], None]

BACKLOG = 10_000  # calls that may wait for a slow sink before it is given up
STUCK = 60.0  # seconds that one call may take once the backlog is full
PAUSE = 0.5  # seconds between two looks into the queue: waking for each row would take the GIL from the training loop


class Sink:
    """A view, called in the sink's own thread, heavy imports included. What it can't show it ignores."""

    def row(self, row: Row) -> None:
        """Takes one row of the record."""

    def text(self, name: str, text: str) -> None:
        """Takes a text (markdown) under a name."""

    def image(self, name: str, step: int, picture: Any) -> None:
        """Takes an array (H, W) or (H, W, 3), uint8 or float in [0, 1]."""

    def histogram(self, name: str, step: int, values: Any) -> None:
        """Takes an array of any shape."""

    def graph(self, model: Any, inputs: Any) -> None:
        """Takes an nn.Module and an example of its inputs."""

    def flush(self) -> None:
        """Brings to disk what was taken so far."""

    def close(self, outcome: str) -> None:
        """The end: outcome is completed, preempted or failed."""

    def abandon(self) -> None:
        """Called from another thread for a sink that hangs, so that it holds up nothing."""


class SinkThread:
    """Runs one sink behind a queue. The first call starts the thread; `make` (with its imports) runs inside it.

    Whatever the sink raises, or a hang, switches it off with one call of `warn` that names it.
    """

    def __init__(self, name: str, make: Callable[[], Sink], warn: Note) -> None:
        self.name, self._make, self._warn = name, make, warn
        self._queue: deque[tuple[str, tuple[Any, ...], threading.Event]] = deque()
        self._sink: Sink | None = None
        self._hurry = threading.Event()  # don't wait for the next look into the queue
        self._thread: threading.Thread | None = None
        self._off = threading.Lock()  # held for ever by whoever switches the sink off
        self._since = time.monotonic()  # when the sink's present call began

    @property
    def on(self) -> bool:
        """Whether the sink still takes calls."""
        return not self._off.locked()

    def put(self, method: str, *args: Any, hurry: bool = False) -> threading.Event:
        """Queues `sink.method(*args)`; what it returns is set afterwards. Costs microseconds, never raises."""
        done = threading.Event()
        if not self.on or (self._thread is None and method == "flush"):
            done.set()
            return done
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"tracking-{self.name}", daemon=True)
            self._thread.start()
        self._queue.append((method, args, done))
        if hurry:
            self._hurry.set()
        elif len(self._queue) > BACKLOG and time.monotonic() - self._since > STUCK:
            self.switch_off(f"it has taken nothing for {time.monotonic() - self._since:.0f} s")
        return done

    def switch_off(self, why: str) -> None:
        """Ends the sink's part in the run, with one warning."""
        if self._off.acquire(blocking=False):
            self._warn(f"tracking: {self.name} is switched off for the rest of this run: {why}; metrics.jsonl goes on")
            if self._sink is not None:
                self._sink.abandon()

    def close(self, outcome: str, timeout: float) -> None:
        """Closes the sink after all that was queued; one that takes longer than `timeout` seconds is switched off."""
        if self._thread is None or not self.on:
            return
        if not self.put("close", outcome, hurry=True).wait(max(0.0, timeout)):
            self.switch_off(f"it did not end within {timeout:.0f} s")

    def _run(self) -> None:
        method = ""
        while method != "close" and self.on:
            self._since = time.monotonic()
            if not self._queue:
                self._hurry.wait(PAUSE)
                self._hurry.clear()
                continue
            method, args, done = self._queue.popleft()
            try:
                if self._sink is None:
                    self._sink = self._make()
                getattr(self._sink, method)(*args)
            except Exception as error:
                self.switch_off(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")
            finally:
                done.set()
        for _, _, done in self._queue:  # nobody waits for a sink that is off
            done.set()


class TensorBoard(Sink):
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
                logging.getLogger("dist_train").warning(
                    text, type(error).__name__, str(error).strip().partition("\n")[0]
                )

    def flush(self) -> None:
        """Writes the event file to disk."""
        self._writer.flush()

    def close(self, outcome: str) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()


class Wandb(Sink):
    """Weights & Biases in a child process (wandb_child says why); this end only writes lines into its stdin."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], note: Note) -> None:
        init = {"name": folder.name, "config": dict(config), **settings}
        mode = init.pop("mode", "online")
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with open(folder / "logs" / "wandb.log", "ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "dist_train.tracking.wandb_child"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env=os.environ | {"WANDB_SILENT": "true", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdout.fileno(), False)
        self._note = note
        self._say("open", {"folder": str(folder), "mode": mode, "init": init, "trainer": os.getpid()})

    def row(self, row: Row) -> None:
        """Sends a row; raises RuntimeError with wandb's message once it has failed."""
        self._say("row", json.loads(encode(row)))

    def flush(self) -> None:
        """Nothing to do: the child writes as it goes."""
        self._listen()

    def close(self, outcome: str) -> None:
        """Waits until wandb has written or uploaded everything."""
        self._say("close", outcome)
        os.set_blocking(self._child.stdout.fileno(), True)  # type: ignore[union-attr]
        self._listen()
        self._child.wait()

    def abandon(self) -> None:
        """Ends a child that hangs."""
        with contextlib.suppress(ProcessLookupError):  # its process group: it started a session
            os.killpg(self._child.pid, signal.SIGKILL)

    def _say(self, *message: Any) -> None:
        self._listen()
        try:
            self._child.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            self._child.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            self._child.wait()
            self._listen()
            raise RuntimeError(
                f"wandb's process ended with code {self._child.returncode}; see logs/wandb.log"
            ) from None

    def _listen(self) -> None:
        """What the child has said: its address once, or what went wrong."""
        for line in self._child.stdout or ():
            said = json.loads(line)
            if "error" in said:
                raise RuntimeError(said["error"])
            if said.get("url"):
                self._note(f"wandb: {said['url']}")
