"""The optimizer with its parameter groups, and the schedule of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from dist_train.config.components import build, locate, reserved, signature
from dist_train.config.durations import Duration
from dist_train.config.errors import ConfigError
from dist_train.engine.metrics import figure
from dist_train.engine.parameters import fill_momentum, is_dense, sparse_parameters
from dist_train.models.transfer import match_parameters


class WarmupCosine(LambdaLR):
    """A linear warm-up to the lr over `warmup_steps`, then half a cosine down to `final_scale` of it at `total_steps`.

    A run shorter than the warm-up ends inside it. Counted in whatever `scheduler.every` says, optimizer steps by default.
    The shape is that of SGDR's first cycle (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983) behind the warm-up
    of Goyal et al. 2017 (https://arxiv.org/abs/1706.02677).
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


# What torch's schedules keep for each group, in lists of their own and in the optimizer's groups.
PER_GROUP = ("lr_lambdas", "max_lrs", "base_momentums", "max_momentums")
IN_GROUPS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
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
    if not isinstance(own, dict):
        return own(groups) if callable(own) else own
    form = signature(locate(own["_target_"]))
    plain = device.type in ("cpu", "cuda") and all(p.is_floating_point() and is_dense(p) for p in model.parameters())
    plain = plain and next(sparse_parameters(model), None) is None
    # torch's first step leaves dampening out, which is lost where that step is skipped (see `fill_momentum`).
    plain = plain and not any(group.get("dampening") for group in (own, *groups))
    if plain and form and "fused" in form.parameters and not {"fused", "foreach", "differentiable"} & own.keys():
        own = {**own, "fused": True}
    optimizer = build(own, groups)
    fill_momentum(optimizer)
    return optimizer


def _grouped(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups, in the config's order behind the default one; the first pattern that matches takes a parameter."""
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not left:
        raise ConfigError.single("model", "it has no parameter that requires a gradient, so there is nothing to train")
    result = []
    for index, group in enumerate(groups):
        key, patterns = f"optimizer.groups.{index}.match", group["match"]
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        taken = [name for name in match_parameters(model, patterns, key) if name in left]
        if not taken:
            raise ConfigError.single(key, f"{', '.join(patterns)} matches no parameter that is left and trains")
        options = {name: value for name, value in group.items() if name != "match"}
        result.append({"params": [left.pop(name) for name in taken], **options})
    return [{"params": list(left.values())}, *result] if left else result


def homes(modules: nn.Module, spec: Any) -> dict[str, int | None]:
    """For each parameter, by name, the number of the config's group whose pattern takes it; None for the default group."""
    groups = reserved(spec, {"groups"})[1].get("groups") or []
    home: dict[str, int | None] = dict.fromkeys(name for name, _ in modules.named_parameters())
    for index, group in enumerate(groups):
        patterns = [group["match"]] if isinstance(group["match"], str) else list(group["match"])
        for name in match_parameters(modules, patterns, f"optimizer.groups.{index}.match"):
            home[name] = index if home.get(name) is None else home[name]
    return home


class Schedule:
    """An lr scheduler, and when it is stepped.

    Attributes:
        every: the duration between its steps.
        metric: for ReduceLROnPlateau (`on_plateau`), the metric it looks at after each evaluation.
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
        own = _with_numbers(own, {"total_steps": horizon, "steps_per_epoch": steps_per_epoch})
        self.scheduler: Any = build(own, optimizer) if isinstance(own, dict) else own(optimizer)
        self.on_plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        each_step = isinstance(self.scheduler, STEPPED_EACH_STEP)
        self.every = Duration.parse(str(extra.get("every") or ("1step" if each_step else "1ep")))
        self.metric = extra.get("metric") or default_metric

    def step(self, metrics: dict[str, float] | None = None) -> None:
        """One step; ReduceLROnPlateau's is after an evaluation and looks at its `metrics`."""
        if self.on_plateau:
            assert metrics is not None
            self.scheduler.step(figure(metrics, self.metric))
        else:
            self.scheduler.step()

    def extend(self) -> None:
        """Span groups that were added to the optimizer: the lr that they have now goes on as that of the first group does."""
        for scheduler in (self.scheduler, *getattr(self.scheduler, "_schedulers", ())):
            bases, groups = getattr(scheduler, "base_lrs", None), scheduler.optimizer.param_groups
            while bases is not None and len(bases) < len(groups):
                first, group = groups[0], groups[len(bases)]
                ratio = group["lr"] / (first["lr"] or bases[0] or 1.0)
                for name in PER_GROUP:
                    values = getattr(scheduler, name, None)
                    if isinstance(values, list) and len(values) < len(groups):
                        values.append(values[0] * ratio if name == "max_lrs" else values[0])
                for key in IN_GROUPS:
                    if key in first:
                        group.setdefault(key, first[key] * (ratio if key.endswith("lr") else 1.0))
                bases.append(bases[0] * ratio)

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state, less what isn't plain data (LambdaLR's function comes from the config again)."""
        state = self.scheduler.state_dict()
        return {key: value for key, value in state.items() if not callable(value) and key != "lr_lambdas"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state})


def _with_numbers(value: Any, known: dict[str, int | None]) -> Any:
    """`total_steps` and `steps_per_epoch` as values of the scheduler's arguments, nested ones too."""
    if isinstance(value, dict):
        return {key: _with_numbers(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item, known) for item in value]
    return known.get(value, value) if isinstance(value, str) else value
