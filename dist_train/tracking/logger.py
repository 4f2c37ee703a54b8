"""The logger: every row goes into metrics.jsonl at once, then to the views (TensorBoard, ...) in the background."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.runtime.storage import append_whole, retried
from dist_train.tracking.records import cut_back, encode, make_row
from dist_train.views.sinks import SinkThread, TensorBoard
from dist_train.views.wandb_run import Wandb

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.tracking.console import Console


def open_logger(
    folder: Path, config: Config, console: Console, *, start_step: int = 0, pending: Collection[str] = ()
) -> Logger:
    """Rank 0's logger of a run, whose metrics.jsonl is cut back to `start_step`, the step that the run goes on from.

    Args:
        folder: the run's directory on this host. config: its `tracking` chooses the views.
        pending: splits that will be evaluated again at `start_step` (see records.cut_back).
    """
    cut_back(folder / "metrics.jsonl", start_step, pending)
    views = []
    if config.tracking.tensorboard:
        views.append(SinkThread("tensorboard", lambda: TensorBoard(folder / "tensorboard", start_step), console.warn))
    if config.tracking.wandb is not None and config.tracking.wandb.mode != "disabled":
        settings, known = config.tracking.wandb.model_dump(exclude_none=True), config.to_dict()
        views.append(SinkThread("wandb", lambda: Wandb(folder, settings, known, console.note), console.warn))
    return Logger(folder / "metrics.jsonl", views)


class Logger:
    """What is recorded: into a file, opened for appending, and to the views.

    Ranks other than 0 have one without a file and without views, which keeps nothing.
    """

    def __init__(self, path: Path | None = None, views: Collection[SinkThread] = ()) -> None:
        self._path, self._views = path or Path(os.devnull), views
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: io.FileIO | None = None
        if path is not None:
            self._file = retried("open", path, lambda: open(path, "ab", buffering=0))  # noqa: SIM115
        self._synced = 0 if self._file is None else self._file.tell()

    def row(self, split: str, step: int, epoch: int | float, samples: int, metrics: Mapping[str, Any]) -> None:
        """One row: {"time", "step", "epoch", "samples", "split", **metrics}; the kernel has it when this returns.

        split: train, val or test. step: from 1. samples: consumed since the run's beginning. metrics: numbers.
        Raises ValueError for a metric named like a field, StorageError naming the file when it can't be written whole.
        """
        if self._file is None:
            return
        row = make_row(split, step, epoch, samples, metrics)
        file, line = self._file, encode(row)
        retried("write", self._path, lambda: append_whole(file, line))
        self._put("row", row)

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
        self._sync()
        self._put("flush", wait=wait)

    def close(self, outcome: str, timeout: float = 15.0) -> None:
        """The end of this start: outcome is completed, preempted or failed.

        Takes at most `timeout` seconds; a view that isn't done by then is given up with a warning.
        """
        self._sync()
        if self._file is not None:
            self._file.close()
        end = time.monotonic() + timeout
        for view in self._views:
            view.close(outcome, end - time.monotonic())

    def _sync(self) -> None:
        if self._file is None or self._file.closed:
            return
        file, tries = self._file, list[int]()

        def sync() -> None:
            if tries:  # after a sync that failed the kernel takes those bytes for written: they are written once more
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

    def _put(self, method: str, *args: Any, wait: float | None = None) -> None:
        waiting = [view.put(method, *args, hurry=wait is not None) for view in self._views]
        end = time.monotonic() + (wait or 0.0)
        for done in waiting if wait else ():
            done.wait(max(0.0, end - time.monotonic()))
