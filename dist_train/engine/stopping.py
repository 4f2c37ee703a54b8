"""When something is due: intervals in epochs and steps, and the rule that ends a run early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_train.config.durations import Duration

if TYPE_CHECKING:
    from dist_train.config.schema import StopWhenConfig


def in_steps(duration: Duration | None, steps_per_epoch: int) -> int | None:
    """A duration as optimizer steps; None for a time (which the control thread watches) or for nothing."""
    if duration is None or duration.unit == "s":
        return None
    return int(duration.value) * (steps_per_epoch if duration.unit == "ep" else 1)


def is_due(every: Duration | None, step: int, steps_per_epoch: int) -> bool:
    """Whether `every` (epochs or steps) ends with optimizer step `step` (from 1)."""
    steps = in_steps(every, steps_per_epoch)
    return steps is not None and step > 0 and step % steps == 0


def better_is_lower(metric: str) -> bool:
    """Whether less of a metric is better, judged by its name, as `mode: auto` does."""
    name = metric.rsplit("/", 1)[-1].lower()
    return any(part in name for part in ("loss", "error", "mae", "mse", "perplexity", "nll"))


class StopWhen:
    """Ends a run when a metric passes a threshold, or hasn't got better by `min_delta` for `patience`; saved and resumed."""

    def __init__(self, config: StopWhenConfig, steps_per_epoch: int):
        self.config = config
        self.lower = config.mode == "min" or (config.mode == "auto" and better_is_lower(config.metric))
        self.patience = in_steps(config.patience, steps_per_epoch)
        self.best: float | None = None
        self.best_step = 0

    def judge(self, metrics: dict[str, float], step: int) -> str | None:
        """The reason to stop after an evaluation, or None."""
        value = metrics[self.config.metric]
        if self.config.above is not None and value > self.config.above:
            return f"{self.config.metric} is {value:.6g}, above {self.config.above:g}"
        if self.config.below is not None and value < self.config.below:
            return f"{self.config.metric} is {value:.6g}, below {self.config.below:g}"
        gain = None if self.best is None else (self.best - value if self.lower else value - self.best)
        if gain is None or gain > self.config.min_delta:
            self.best, self.best_step = value, step
        elif self.patience is not None and step - self.best_step >= self.patience:
            return f"{self.config.metric} hasn't got better than {self.best:.6g} for {self.config.patience}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Best value and its step."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting."""
        self.best, self.best_step = state["best"], state["best_step"]
