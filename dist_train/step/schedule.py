"""The schedule of the learning rate: any of torch's schedulers, and when it is stepped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from dist_train.config.components import build, is_spec, locate, reserved, signature
from dist_train.config.errors import ConfigError
from dist_train.config.fields import METRICS, Duration
from dist_train.task.metrics import monitored


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


EACH_STEP = (OneCycleLR, CyclicLR, WarmupCosine)
EITHER_WAY = (LambdaLR, MultiplicativeLR)  # people step these each step and each epoch
OF_ITSELF = (SequentialLR, ChainedScheduler)  # as their parts
# What torch's schedules keep for each group, in lists of their own and in the optimizer's groups.
PER_GROUP = ("lr_lambdas", "max_lrs", "base_momentums", "max_momentums")
IN_GROUPS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
NUMBERS = ("total_steps", "steps_per_epoch")


class Span(NamedTuple):
    """What a schedule counts, in optimizer steps: `horizon` (None: a time), those of an epoch, and `end`, the run's."""

    horizon: int | None
    steps_per_epoch: int
    end: int | None


class Schedule:
    """An lr scheduler, and when it is stepped.

    Args:
        watched: the metric that ReduceLROnPlateau looks at, and which way it is better: `min` or `max`.

    Attributes:
        every: the duration between its steps.
        metric: for ReduceLROnPlateau (`on_plateau`), the metric it looks at after each evaluation.
        note: for the person, where the run goes on after the end of the schedule; or "".

    Raises:
        ConfigError: it isn't one of torch's, or isn't clear in a way that would change the lr.
    """

    def __init__(self, spec: Any, optimizer: torch.optim.Optimizer, span: Span, watched: tuple[str, str]):
        own, extra = reserved(spec, {"every", "metric", "horizon"})
        numbered = any(value in NUMBERS for value in _leaves(own))
        every = extra.get("every") or _usual(own, numbered)
        self.every = Duration.parse(str(every or "1ep"))
        period = self.every.value * (span.steps_per_epoch if self.every.unit == "ep" else 1)
        counted = {"steps_per_epoch": max(1, span.steps_per_epoch // int(period))}
        if span.horizon is not None:
            counted["total_steps"] = max(1, span.horizon // int(period))
        self.note = ""
        if "total_steps" in _leaves(own) and span.horizon is not None and span.horizon < (span.end or 0):
            self.note = (
                f"the schedule spans {span.horizon:,} of the {span.end:,} steps (scheduler.horizon, by default the duration at "
                "the first start); after that the lr is what the scheduler makes of it"
            )
        self.metric, mode = watched
        outer = _class_of(own)
        if isinstance(own, dict) and outer is not None and issubclass(outer, ReduceLROnPlateau) and "_args_" not in own:
            own = {"mode": mode, **own}
        self.scheduler: Any = _build(own, optimizer, counted)
        if not isinstance(self.scheduler, LRScheduler):
            raise _refused(
                f"expected a scheduler of torch.optim.lr_scheduler, which is stepped without arguments, but this gave "
                f"{type(self.scheduler).__module__}.{type(self.scheduler).__name__}; torch's own or "
                "dist_train.schedules.WarmupCosine do the same"
            )
        try:
            self.state_dict()
        except Exception as error:
            message = f"its state can't be saved ({type(error).__name__}: {error}); give it Python functions or objects"
            raise _refused(f"{message}, not built-in ones") from error
        self.on_plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        if self.on_plateau:
            self._check_plateau(mode, extra)
            return
        if every is None:
            self.every = Duration.parse(_unit({_kind(type(part)) for part in _parts(self.scheduler)}))
        period = self.every.value * (span.steps_per_epoch if self.every.unit == "ep" else 1)
        if span.end is not None:
            self._check_end(span.end // int(period))

    def _check_plateau(self, mode: str, extra: dict[str, Any]) -> None:
        """The direction that it was given is the metric's: a name of one's own may mean anything, if it is given too."""
        own_name = extra.get("metric") and self.metric.removeprefix("val/") not in ("loss", *METRICS)
        if self.scheduler.mode != mode and not own_name:
            raise _refused(
                f"ReduceLROnPlateau has mode={self.scheduler.mode}, but looks at {self.metric}, of which "
                f"{'less' if mode == 'min' else 'more'} is better; leave mode out (or give a function's scheduler "
                f"mode={mode}), or name another metric: metric: val/loss",
                "scheduler.mode",
            )
        if extra.get("every"):
            raise _refused(
                "ReduceLROnPlateau is stepped at evaluations (trainer.evaluate_every); leave `every` out",
                "scheduler.every",
            )

    def _check_end(self, steps: int) -> None:
        room = _room(self.scheduler)
        if room < steps:
            raise _refused(
                f"OneCycleLR is over after {room} of its steps, but this run takes {steps}: its length was fixed when the "
                "run was begun (or by its own arguments). Give a longer one by scheduler.horizon (epochs or steps), with "
                "checkpoint.accept_changes=true if the run has begun, or total_steps: total_steps",
                "scheduler.horizon",
            )

    def step(self, metrics: dict[str, float] | None = None) -> None:
        """One step; ReduceLROnPlateau's is after an evaluation and looks at its `metrics`.

        Raises:
            ValueError: OneCycleLR is over.
        """
        if self.on_plateau:
            assert metrics is not None
            self.scheduler.step(monitored(metrics, self.metric))
            return
        try:
            self.scheduler.step()
        except ValueError as error:
            raise ValueError(
                f"the schedule can't go on: {error}; scheduler.horizon is the duration that it spans"
            ) from error

    def extend(self) -> None:
        """Span groups that were added to the optimizer: the lr that they have now goes on as that of the first group does."""
        for scheduler in _parts(self.scheduler):
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

    def advance(self, steps: int) -> None:
        """Bring a new one to where it would stand after so many steps; its lr is in the optimizer's groups then."""
        with warnings.catch_warnings():  # torch takes this for a wrong order of steps
            warnings.simplefilter("ignore")
            for _ in range(0 if self.on_plateau else steps):
                self.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state, less functions, which come from the config again."""
        state: dict[str, Any] = _without_functions(self.scheduler.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state})


def _build(spec: Any, optimizer: torch.optim.Optimizer, counted: Mapping[str, int], outer: bool = True) -> Any:
    """What a spec describes, with numbers for their names; schedulers inside get the optimizer too, in the written order."""
    if isinstance(spec, str):
        return counted.get(spec, spec)
    if isinstance(spec, list):
        return [_build(item, optimizer, counted, False) for item in spec]
    if not isinstance(spec, dict):
        return spec(optimizer) if outer else spec
    own = {key: item if key == "_target_" else _build(item, optimizer, counted, False) for key, item in spec.items()}
    if not is_spec(spec):
        return own
    form = signature(locate(spec["_target_"]))
    places = list(form.parameters) if form is not None else []
    if "optimizer" in places[1:]:
        return build(own, optimizer=optimizer)
    return build(own, optimizer) if outer or "optimizer" in places else build(own)


def _refused(message: str, key: str = "scheduler") -> ConfigError:
    return ConfigError.single(key, message)


def _class_of(target: Any) -> type | None:
    """The class that a component is of, where it is named as such."""
    target = locate(target["_target_"]) if isinstance(target, dict) else target
    target = getattr(target, "func", target)  # of a partial
    return target if isinstance(target, type) else None


def _usual(spec: Any, numbered: bool) -> str | None:
    """`every` where the config doesn't give it, by what the classes are made for; None where only the object tells."""
    specs = list(_specs(spec)) if isinstance(spec, dict) else [spec]
    classes = [_class_of(inner) for inner in specs]
    if classes[0] is None:
        target = locate(specs[0]["_target_"]) if isinstance(specs[0], dict) else specs[0]
        if str(getattr(target, "__module__", "")).partition(".")[0] in ("transformers", "diffusers"):
            return "1step"
    makes = [inner for inner, kind in zip(specs, classes, strict=True) if kind is None and _takes_optimizer(inner)]
    if classes[0] is not None and not makes:
        return _unit({_kind(kind) for kind in classes if kind is not None and issubclass(kind, LRScheduler)})
    if numbered:
        raise _unclear("a function builds it, with total_steps or steps_per_epoch")
    return None


def _takes_optimizer(spec: Any) -> bool:
    form = signature(locate(spec["_target_"])) if isinstance(spec, dict) else None
    return form is not None and "optimizer" in form.parameters


def _kind(scheduler: type) -> str:
    """When a class is stepped by those who use it: `1step`, `1ep`, "" (as its parts are) or `?` (both are usual)."""
    if issubclass(scheduler, EACH_STEP):
        return "1step"
    if issubclass(scheduler, OF_ITSELF):
        return ""
    return "?" if issubclass(scheduler, EITHER_WAY) else "1ep"


def _unit(kinds: set[str]) -> str:
    kinds = kinds - {""}
    if len(kinds) == 1 and "?" not in kinds:
        return next(iter(kinds))
    raise _unclear("LambdaLR, MultiplicativeLR and mixtures of schedulers are used both ways")


def _unclear(why: str) -> ConfigError:
    return _refused(
        f"say whether it is stepped after each optimizer step or each epoch, by every: 1step or every: 1ep ({why}); numbers "
        "of the schedule, total_steps included, count in it"
    )


def _parts(scheduler: Any) -> Iterator[Any]:
    """The schedulers that one is made of, or itself."""
    if isinstance(scheduler, OF_ITSELF):
        for part in scheduler._schedulers:
            yield from _parts(part)
    else:
        yield scheduler


def _room(scheduler: Any) -> float:
    """How many steps a scheduler can take."""
    if isinstance(scheduler, OneCycleLR):
        return scheduler.total_steps
    if isinstance(scheduler, SequentialLR):
        return _room(scheduler._schedulers[-1]) + (scheduler._milestones[-1] if scheduler._milestones else 0)
    return min(map(_room, scheduler._schedulers)) if isinstance(scheduler, ChainedScheduler) else math.inf


def _specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every component in a value, the outer one first."""
    if is_spec(value):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _specs(item)


def _leaves(value: Any) -> Iterator[Any]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _leaves(item)
    if isinstance(value, str):
        yield value


def _without_functions(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_functions(item) for key, item in value.items() if not callable(item)}
    return [_without_functions(item) for item in value] if isinstance(value, list) else value
