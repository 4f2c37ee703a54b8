"""When something is due: durations in steps and by the clock, and the rule that ends a run early."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dist_train.config.fields import in_steps
from dist_train.task.entries import monitored
from dist_train.watch.control import EVALUATE, FINISH, LOG, SAVE, STOP, Source, next_multiple, watch_clock

if TYPE_CHECKING:
    from dist_train.config.schema import Config, StopWhenConfig

NEVER = 1 << 62  # steps


class Due:
    """What is due after a given number of optimizer steps; time-based actions come from `clocks`.

    Attributes:
        end, stop: the steps of `trainer.duration` and `trainer.stop_at`; None for a time or nothing.
    """

    def __init__(self, config: Config, steps_per_epoch: int):
        trainer = config.trainer
        self.end = in_steps(trainer.duration, steps_per_epoch)
        self.stop = in_steps(trainer.stop_at, steps_per_epoch)
        self._log, self._evaluate, *self._saves = (
            in_steps(every, steps_per_epoch) or NEVER
            for every in (trainer.log_every, trainer.evaluate_every, *config.checkpoint.every)
        )

        self._every = [self._log, self._evaluate, *self._saves, steps_per_epoch]

    def following(self, done: int) -> int:
        """The first step after `done` after which anything is due: what is above, an epoch's end, the end."""
        ends = [end for end in (self.end, self.stop) if end is not None and end > done]
        return min([(done // every + 1) * every for every in self._every] + ends)

    def log(self, done: int) -> bool:
        """A train row."""
        return done % self._log == 0 or done == self.end

    def evaluate(self, done: int) -> bool:
        """An evaluation."""
        return done % self._evaluate == 0

    def save(self, done: int) -> bool:
        """A checkpoint."""
        return any(done % every == 0 for every in self._saves)


def clocks(config: Config, seconds: Callable[[], float]) -> Iterator[Source]:
    """For the control thread: what becomes due by the clock, `seconds()` trained over all starts of the run."""
    trainer = config.trainer
    for duration, action, key in ((trainer.duration, FINISH, "duration"), (trainer.stop_at, STOP, "stop_at")):
        if duration is not None and duration.is_time:
            yield watch_clock(seconds, duration.value, None, action, f"trainer.{key}={duration}")
    repeated = [(trainer.log_every, LOG), (trainer.evaluate_every, EVALUATE)]
    for every, action in repeated + [(every, SAVE) for every in config.checkpoint.every]:
        if every is not None and every.is_time:
            first = next_multiple(seconds(), every.value)
            yield watch_clock(seconds, first, every.value, action, f"every {every}")


class StopWhen:
    """Ends a run when a metric passes a threshold, or hasn't improved by `min_delta` for `patience`; saved and restored."""

    def __init__(self, config: StopWhenConfig, steps_per_epoch: int, lower: bool):
        self.config = config
        self.lower = lower if config.mode == "auto" else config.mode == "min"
        self.patience = in_steps(config.patience, steps_per_epoch)
        self.best: float | None = None
        self.best_step = 0

    def judge(self, metrics: dict[str, float], step: int) -> str | None:
        """The reason to stop after an evaluation, or None."""
        value = monitored(metrics, self.config.metric)
        if self.config.above is not None and value > self.config.above:
            return f"{self.config.metric} is {value:.6g}, above {self.config.above:g}"
        if self.config.below is not None and value < self.config.below:
            return f"{self.config.metric} is {value:.6g}, below {self.config.below:g}"
        gain = math.inf if self.best is None else self.best - value if self.lower else value - self.best
        if value == value and gain > self.config.min_delta:  # NaN is never the best, not even the first value
            self.best, self.best_step = value, step
        elif self.patience is not None and step - self.best_step >= self.patience:
            than = "been a number" if self.best is None else f"improved on {self.best:.6g}"
            return f"{self.config.metric} hasn't {than} for {self.config.patience}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Best value and its step."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from them."""
        self.best, self.best_step = state["best"], state["best_step"]
