"""The logger: every row goes into metrics.jsonl at once, then to the views (TensorBoard, ...) in the background."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from dist_train.tracking.console import Console
from dist_train.tracking.records import RecordFile, cut_back, make_row
from dist_train.tracking.sinks import SinkThread, TensorBoard, Wandb


class RunDirectory(Protocol):
    """What the logger needs of a run's directory."""

    def path(self, name: str) -> str | os.PathLike[str]:
        """A local path for `name`."""
        ...


class NullLogger:
    """The logger of ranks other than 0: takes everything, keeps nothing."""

    def row(self, split: str, step: int, epoch: int | float, samples: int, metrics: Mapping[str, Any]) -> None:
        """Takes a row."""

    def text(self, name: str, text: str) -> None:
        """Takes a text."""

    def image(self, name: str, step: int, picture: Any) -> None:
        """Takes a picture."""

    def histogram(self, name: str, step: int, values: Any) -> None:
        """Takes values to bin."""

    def graph(self, model: Any, inputs: Any, timeout: float = 600.0) -> None:
        """Takes a model."""

    def flush(self, wait: float = 0.0) -> None:
        """Nothing to bring to disk."""

    def close(self, outcome: str, timeout: float = 15.0) -> None:
        """Nothing to close."""


class Logger(NullLogger):
    """Rank 0's logger. Creating it cuts metrics.jsonl back to `start_step`, the step that the run goes on from.

    run: gives local paths (`run.path("metrics.jsonl")`). config: the run's config; `config.tracking` chooses the views.
    start_step: 0 for a new run. attempt: the number of this start. pending: splits that will be evaluated again at
    start_step (see records.cut_back).
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Any,
        *,
        console: Console,
        start_step: int = 0,
        attempt: int = 0,
        pending: Collection[str] = (),
    ) -> None:
        path = Path(run.path("metrics.jsonl"))
        cut_back(path, start_step, pending)
        self._record = RecordFile(path)
        self._views: list[SinkThread] = []
        if config.tracking.tensorboard:
            folder = Path(run.path("tensorboard"))
            self._views.append(SinkThread("tensorboard", lambda: TensorBoard(folder, start_step), console.warn))
        wandb: Any = getattr(config.tracking, "wandb", None)
        settings = wandb.model_dump(exclude_none=True) if hasattr(wandb, "model_dump") else dict(wandb or {})
        if settings and settings.get("mode") != "disabled":
            root, known = path.parent, config.to_dict()
            self._views.append(SinkThread("wandb", lambda: Wandb(root, settings, known, console.note), console.warn))

    def row(self, split: str, step: int, epoch: int | float, samples: int, metrics: Mapping[str, Any]) -> None:
        """One row: {"time", "step", "epoch", "samples", "split", **metrics}, flushed before this returns.

        split: train, val or test. step: from 1. samples: consumed since the run's beginning. metrics: numbers.
        Raises ValueError for a metric named like a field, OSError when metrics.jsonl can't be written.
        """
        row = make_row(split, step, epoch, samples, metrics)
        self._record.append(row)
        self._put("row", row)

    def text(self, name: str, text: str) -> None:
        """A text (markdown) for the views that show one, such as the config."""
        self._put("text", name, text)

    def image(self, name: str, step: int, picture: Any) -> None:
        """A picture: a NumPy array (H, W) or (H, W, 3), uint8 or float in [0, 1], that nobody writes to afterwards."""
        self._put("image", name, step, picture)

    def histogram(self, name: str, step: int, values: Any) -> None:
        """A NumPy array of any shape (weights, gradients), that nobody writes to afterwards."""
        self._put("histogram", name, step, values)

    def graph(self, model: Any, inputs: Any, timeout: float = 600.0) -> None:
        """The model's graph, traced on an example of its inputs.

        This waits for it: the trace meddles with torch's random numbers, in the view's thread.
        """
        self._put("graph", model, inputs, wait=timeout)

    def flush(self, wait: float = 0.0) -> None:
        """Returns when the rows so far would survive a power failure: call it before a checkpoint is published.

        It costs an fsync, and may be called from the thread that publishes. The views are told to flush too; `wait` is
        for how many seconds that is waited for (before their files are uploaded).
        """
        self._record.sync()
        self._put("flush", wait=wait)

    def close(self, outcome: str, timeout: float = 15.0) -> None:
        """The end of this start: outcome is completed, preempted or failed.

        Takes at most `timeout` seconds; a view that isn't done by then is given up with a warning.
        """
        self._record.close()
        end = time.monotonic() + timeout
        for view in self._views:
            view.close(outcome, end - time.monotonic())

    def _put(self, method: str, *args: Any, wait: float | None = None) -> None:
        waiting = [view.put(method, *args, hurry=wait is not None) for view in self._views]
        end = time.monotonic() + (wait or 0.0)
        for done in waiting if wait else ():
            done.wait(max(0.0, end - time.monotonic()))
