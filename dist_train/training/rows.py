"""What a train row of the records says: the mean over the samples since the row before, and how fast they were."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_train.training.parts import Parts
    from dist_train.training.state import Progress


class TrainRows:
    """Makes the rows, and keeps what lies between two of them.

    Attributes:
        lr: of the last step. extra: figures of callbacks, for the next row.
    """

    def __init__(self, parts: Parts, progress: Progress):
        self.parts, self.progress = parts, progress
        self.lr = 0.0
        self.extra: dict[str, float] = {}
        self._samples, self._time, self._waited = progress.samples, time.monotonic(), 0.0

    def take(self) -> dict[str, float]:
        """The row up to this step; the next one begins. Waits for the device."""
        stepper, waited, now = self.parts.stepper, self.parts.train_loader.waited, time.monotonic()
        loss, weight = stepper.totals.tolist()
        stepper.totals.zero_()
        row: dict[str, float] = {"loss": loss / weight if weight else float("nan"), "lr": self.lr}
        if stepper.grad_norm is not None:
            row["grad_norm"] = float(stepper.grad_norm)
        if stepper.guard.skipped:
            row["skipped"] = stepper.guard.skipped
        elapsed = max(now - self._time, 1e-9)
        row["samples_per_s"] = (self.progress.samples - self._samples) / elapsed
        row["data_wait"] = (waited - self._waited) / elapsed
        row |= self.parts.world.peers.pace() | self.extra
        self.extra.clear()
        self._samples, self._time, self._waited = self.progress.samples, now, waited
        return row
