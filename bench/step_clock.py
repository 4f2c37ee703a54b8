"""Components that bench/overhead.yaml names."""

from __future__ import annotations

from typing import Any

from clock import Clock

from dist_train.callbacks import Callback
from dist_train.data import Digits


class StepClock(Callback):
    """The shared clock as a callback of dist_train."""

    def __init__(self, warmup: int, steps: int, path: str) -> None:
        self.clock = Clock(warmup, steps)
        self.path = path

    def on_step_end(self, trainer: Any) -> None:
        self.clock.tick()

    def on_epoch_end(self, trainer: Any) -> None:
        self.clock.boundary()

    def on_end(self, trainer: Any) -> None:
        self.clock.write(self.path)


class RepeatedDigits(Digits):
    """The digits repeated `repeat` times, so that an epoch is as long as for the other contenders."""

    def __init__(self, split: str = "train", *, repeat: int = 1) -> None:
        super().__init__(split, flat=True)
        assert self.targets is not None
        self.inputs, self.targets = self.inputs.repeat(repeat, 1), self.targets.repeat(repeat)
