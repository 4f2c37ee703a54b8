"""`python -m dist_train.main` with the clock that all contenders share, and the data of bench/overhead.yaml.

    python bench/step_clock.py WARMUP STEPS PATH --config ...

The clock is put around two methods of the trainer: a callback would have costs of its own (after one of a user's, parameters may
train that didn't, and its random numbers are seeded).
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from clock import Clock

from dist_train.data import Digits
from dist_train.training.trainer import Trainer


class RepeatedDigits(Digits):
    """The digits repeated `repeat` times, so that an epoch is as long as for the other contenders."""

    def __init__(self, split: str = "train", *, repeat: int = 1) -> None:
        super().__init__(split, flat=True)
        assert self.targets is not None
        self.inputs, self.targets = self.inputs.repeat(repeat, 1), self.targets.repeat(repeat)


def watch(clock: Clock, path: str) -> None:
    """Let it tick after each optimizer step, know where epochs end, and write its result."""
    run_step = Trainer._run_step

    def timed(trainer: Any, work: Any) -> None:
        run_step(trainer, work)
        if clock.tick():
            clock.write(path)
        if (work.step + 1) % trainer.plan.steps_per_epoch == 0:
            clock.boundary()

    Trainer._run_step = timed  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    warmup, steps, path = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
    watch(Clock(int(warmup), int(steps)), path)
    runpy.run_module("dist_train.main", run_name="__main__")
