"""What is recorded of training: where it goes, the metrics of train rows, and which samples each rank has read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.files import append_whole, retried
from dist_train.tracking.logger import Logger

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.data.plan import Indices
    from dist_train.runtime.rundir import RunDir
    from dist_train.step.several import SeveralSteppers
    from dist_train.step.step import Stepper
    from dist_train.tracking.console import Console
    from dist_train.training.callbacks import Callback, Training
    from dist_train.training.digests import StepDigests
    from dist_train.training.meter import Meter


@dataclass
class Outputs:
    """Where training writes, on this rank.

    Attributes:
        checkpoints: on rank 0; None on the others.
        record: what goes into every manifest: config, versions, host, ...
        views: callbacks of our own, after the config's; they have no state.
        watch_batch: gets the trainer and each micro-batch on its way into the model.
    """

    run: RunDir
    console: Console
    logger: Logger = field(default_factory=Logger)
    checkpoints: CheckpointManager | None = None
    trace: Trace | None = None
    digests: StepDigests | None = None
    record: dict[str, Any] = field(default_factory=dict)
    views: list[Callback] = field(default_factory=list)
    watch_batch: Callable[[Training, Any], object] | None = None

    def flush_and_upload(self) -> None:
        """Make what was recorded so far as durable as the checkpoint that is about to be published (rank 0)."""
        self.logger.flush(wait=0.0 if self.run.storage.is_local else 5.0)
        self.run.upload()


class TrainRows:
    """Makes the metrics of train rows, and keeps what lies between two of them.

    Args:
        samples: those that the run has consumed so far.

    Attributes:
        lr: of the last step, `lr` or, of several optimizers, `lr/<name>`. extra: metrics of callbacks, for the next row.
    """

    def __init__(self, stepper: Stepper | SeveralSteppers, samples: int, meter: Meter):
        self.stepper, self.meter = stepper, meter
        self.lr: dict[str, float] = {}
        self.extra: dict[str, float] = {}
        self._samples, self._time, self._waited = samples, time.monotonic(), 0.0

    def take(self, samples: int, waited: float, pace: dict[str, float]) -> dict[str, float]:
        """The row up to now; the next one begins. Waits for the device.

        Args:
            samples: consumed so far. waited: seconds that training has waited for batches in this start.
            pace: how far the ranks are apart.
        """
        stepper, now = self.stepper, time.monotonic()
        taken = stepper.take_row()
        skipped = {name: taken.pop(name) for name in [*taken] if name.startswith(("grad_norm", "skipped"))}
        row = taken | self.lr | skipped
        elapsed = max(now - self._time, 1e-9)
        row["samples_per_s"] = (samples - self._samples) / elapsed
        row["data_wait"] = (waited - self._waited) / elapsed
        row |= self.meter.row(row) | pace | self.extra
        self.extra.clear()
        self._samples, self._time, self._waited = samples, now, waited
        return row


class Trace:
    """`debug.trace_samples`: `trace/attempt-<n>-rank-<r>.jsonl`, one line per step, flushed to the OS before its backward."""

    def __init__(self, folder: Path, attempt: int, rank: int):
        self._path = folder / f"attempt-{attempt}-rank-{rank}.jsonl"
        retried("create the directory", folder, lambda: folder.mkdir(parents=True, exist_ok=True))
        self._file = retried("create", self._path, lambda: open(self._path, "xb", buffering=0))  # noqa: SIM115

    def write(self, step: int, indices: Indices) -> None:
        """This rank's samples of optimizer step `step` (from 1)."""
        line = json.dumps({"step": step, "indices": indices.tolist()}).encode() + b"\n"
        retried("write", self._path, lambda: append_whole(self._file, line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
