"""TensorBoard, and the logger of a run with the views that its config asks for."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.tracking.logger import Logger, SinkThread
from dist_train.tracking.records import FIELDS, Row, cut_back
from dist_train.views.wandb_run import Wandb

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.tracking.console import Console


def open_logger(
    folder: Path, config: Config, console: Console, *, start_step: int = 0, pending: Collection[str] = ()
) -> Logger:
    """Rank 0's logger of a run, whose metrics.jsonl is truncated to `start_step`, the step that it resumes from.

    Args:
        folder: the run's directory on this host. config: its `tracking` chooses the sinks.
        pending: splits that will be evaluated again at `start_step` (see records.cut_back).
    """
    cut_back(folder / "metrics.jsonl", start_step, pending)
    sinks = []
    if config.tracking.tensorboard:
        # Here, before the first step: in the sink's thread it would compete with the steps for the interpreter.
        with contextlib.suppress(Exception):  # the sink says so
            import torch.utils.tensorboard  # noqa: F401
        sinks.append(SinkThread("tensorboard", lambda: TensorBoard(folder / "tensorboard", start_step), console.warn))
    if config.tracking.wandb is not None and config.tracking.wandb.mode != "disabled":
        settings, known = config.tracking.wandb.model_dump(exclude_none=True), config.to_dict()
        sinks.append(SinkThread("wandb", lambda: Wandb(folder, settings, known, console.note), console.warn))
    return Logger(folder / "metrics.jsonl", sinks)


class TensorBoard:
    """TensorBoard event files. Tags are split/metric (train/loss, val/accuracy); the x axis is the step.

    A resumed run passes purge_step, so that TensorBoard hides what was written after the checkpoint.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)
        self.flush = self._writer.flush

    def row(self, row: Row) -> None:
        """One event for the whole row (add_scalar would make one per metric), at the row's own time."""
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
        """The model's graph, traced; a model that can't be traced is a warning."""
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints errors as well
            warnings.simplefilter("ignore")
            try:
                self._writer.add_graph(model, inputs, use_strict_trace=False)
            except Exception as error:
                text = "TensorBoard has no graph, torch.jit.trace failed: %s: %s"
                reason = str(error).strip().partition("\n")[0]
                logging.getLogger("dist_train").warning(text, type(error).__name__, reason)

    def close(self, outcome: str) -> None:
        """Flush and close the event file."""
        self._writer.close()
