"""The optimizer with its parameter groups, and the schedule of its learning rate."""

from __future__ import annotations

import difflib
import fnmatch
import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from dist_train.config.components import build, locate, reserved
from dist_train.config.durations import Duration
from dist_train.config.errors import ConfigError
from dist_train.engine.step import accepts_fused


class WarmupCosine(LambdaLR):
    """A linear warm-up to the lr over `warmup_steps`, then half a cosine down to `final_scale` of it at `total_steps`.

    A run shorter than the warm-up ends inside it. Counted in whatever `scheduler.every` says, optimizer steps by default.
    The shape is that of SGDR's first cycle
    (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983) behind the warm-up of Goyal et al. 2017 (https://arxiv.org/abs/1706.02677).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, final_scale: float = 0.0
    ):
        if warmup_steps < 0 or total_steps < 1:
            raise ValueError(f"expected warmup_steps >= 0 and total_steps >= 1, got {warmup_steps} and {total_steps}")
        if not 0 <= final_scale <= 1:
            raise ValueError(f"final_scale is a share of the lr between 0 and 1, got {final_scale}")

        def scale(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_scale + (1 - final_scale) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, scale)


STEPPED_EACH_STEP = (OneCycleLR, CyclicLR, WarmupCosine)


def build_optimizer(spec: Any, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `optimizer:`; groups take parameters by name pattern, the rest stay in the first group.

    A fused kernel is used where the class has one and the config names neither `fused` nor `foreach`: it is the fastest, and
    it can leave out an update on the device's own finding.

    Raises:
        ConfigError: a group matches no parameter, or there is nothing to train.
    """
    own, extra = reserved(spec, {"groups"})
    groups = _grouped(model, extra.get("groups") or [])
    if isinstance(own, dict) and "fused" not in own and "foreach" not in own:
        factory = locate(own["_target_"])
        plain = all(
            g.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16) for g in model.parameters()
        )
        if accepts_fused(factory) and plain and device.type in ("cpu", "cuda") and not own.get("differentiable"):
            own = {**own, "fused": True}
    if callable(own) and not isinstance(own, torch.optim.Optimizer):
        return own(groups)
    return build(own, groups)


def _grouped(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups, in the config's order behind the default one; the first pattern that matches takes a parameter."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise ConfigError.single(
            "model", "the model has no parameter that requires a gradient, so there is nothing to train"
        )
    left = dict(named)
    result = []
    for index, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key != "match"}
        patterns = [group["match"]] if isinstance(group["match"], str) else list(group["match"])
        taken = [name for name in left if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not taken:
            near = difflib.get_close_matches(patterns[0], named, n=3, cutoff=0.3) or list(named)[:3]
            raise ConfigError.single(
                f"optimizer.groups.{index}.match",
                f"{', '.join(patterns)} matches no parameter that is left and trains; names look like {', '.join(near)}",
            )
        result.append({"params": [left.pop(name) for name in taken], **options})
    return ([{"params": list(left.values())}] if left else []) + result


class Schedule:
    """An lr scheduler, and when it is stepped.

    Attributes:
        every: the duration between its steps.
        metric: for ReduceLROnPlateau, the metric it looks at after each evaluation.
    """

    def __init__(
        self,
        spec: Any,
        optimizer: torch.optim.Optimizer,
        *,
        horizon: int | None,
        steps_per_epoch: int,
        default_metric: str,
    ):
        own, extra = reserved(spec, {"every", "metric", "horizon"})
        if isinstance(own, dict):
            own = _numbers(own, horizon, steps_per_epoch)
        self.scheduler: LRScheduler | ReduceLROnPlateau = (
            build(own, optimizer) if isinstance(own, dict) else own(optimizer)
        )
        self.on_plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        each_step = isinstance(self.scheduler, STEPPED_EACH_STEP)
        every = extra.get("every")
        self.every = Duration.parse(str(every)) if every is not None else Duration(1, "step" if each_step else "ep")
        self.metric = extra.get("metric") or default_metric

    def step(self) -> None:
        """One step of a scheduler that counts."""
        self.scheduler.step()  # type: ignore[call-arg]

    def step_on(self, metrics: dict[str, float]) -> None:
        """One step of ReduceLROnPlateau, after an evaluation."""
        self.scheduler.step(metrics[self.metric])  # type: ignore[arg-type]

    def replay(self, times: int) -> None:
        """Bring a new scheduler to where it would stand after `times` steps (for a schedule that was changed by consent)."""
        for _ in range(times if not self.on_plateau else 0):
            self.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state, less what isn't plain data (LambdaLR's function comes from the config again)."""
        return {
            key: value
            for key, value in self.scheduler.state_dict().items()
            if not callable(value) and key != "lr_lambdas"
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        current = self.scheduler.state_dict()
        self.scheduler.load_state_dict({**current, **state})


def _numbers(value: Any, horizon: int | None, steps_per_epoch: int) -> Any:
    """`total_steps` and `steps_per_epoch` as values of the scheduler's arguments."""
    if isinstance(value, dict):
        return {key: _numbers(item, horizon, steps_per_epoch) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item, horizon, steps_per_epoch) for item in value]
    if value == "steps_per_epoch":
        return steps_per_epoch
    if value == "total_steps":
        if horizon is None:
            raise ConfigError.single(
                "scheduler",
                "total_steps isn't known when trainer.duration is a time: set scheduler.horizon to epochs or steps",
            )
        return horizon
    return value
