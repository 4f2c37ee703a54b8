"""The schedule of the learning rate: any of torch's schedulers, and when it is stepped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from dist_train.config.components import build, is_spec, locate, reserved, signature
from dist_train.config.errors import ConfigError
from dist_train.config.fields import METRICS, Duration
from dist_train.config.schedules import Warmup, is_schedule_number, schedule_count
from dist_train.library.schedules import WarmupCosine
from dist_train.task.entries import monitored

EACH_STEP = (OneCycleLR, CyclicLR, WarmupCosine)
WARM_THEMSELVES = (OneCycleLR, CyclicLR)  # they set the lr at the first step, and rise by themselves
EITHER_WAY = (LambdaLR, MultiplicativeLR)  # commonly stepped each step or each epoch
COMPOSITE = (SequentialLR, ChainedScheduler)  # stepped as their parts are
# What torch's schedulers keep for each group, in lists of their own and in the optimizer's groups.
PER_GROUP = ("lr_lambdas", "max_lrs", "base_momentums", "max_momentums")
IN_GROUPS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")


class Span(NamedTuple):
    """In optimizer steps: the schedule's `horizon` (None if that is a time), an epoch, and the run's `end`."""

    horizon: int | None
    steps_per_epoch: int
    end: int | None

    def steps(self, duration: Duration) -> int:
        """A duration in epochs or steps as optimizer steps."""
        return int(duration.value * (self.steps_per_epoch if duration.unit == "ep" else 1))

    def numbers(self, every: Duration, warmup: int) -> Callable[[str], Any]:
        """What replaces a string among a scheduler's arguments: a number counted in `every`, or the string itself.

        `total_steps` is what the horizon leaves after `warmup` optimizer steps.

        Raises:
            ConfigError: a duration isn't a whole number of the scheduler's steps.
        """
        period = self.steps(every)
        known = {"steps_per_epoch": max(1, self.steps_per_epoch // period)}
        if self.horizon is not None:
            known["total_steps"] = max(1, (self.horizon - warmup) // period)

        def number(text: str) -> Any:
            if (count := schedule_count(text)) is None:
                return known.get(text, text)
            from_end, duration = count
            whole, rest = divmod(self.steps(duration), period)
            if rest:
                raise _refused(
                    f"{text}: {duration} is {self.steps(duration):,} optimizer steps, which isn't a whole number of the "
                    f"scheduler's steps, {period:,} optimizer steps each (every: {every}); give a multiple, or every: 1step"
                )
            if from_end and known["total_steps"] <= whole:
                raise _refused(
                    f"{text}: there are only {known['total_steps']:,} steps of the scheduler (every: {every})"
                )
            return known["total_steps"] - whole if from_end else whole

        return number


class Schedule:
    """An lr scheduler, and when it is stepped.

    With a `warmup`, torch's LinearLR raises the lr over that many optimizer steps, then the scheduler begins, as in torch's
    SequentialLR: it counts from the end of the warm-up, in `every`, and `total_steps` is what is left of the horizon.

    Args:
        monitor: the metric for ReduceLROnPlateau, and which way it is better: `min` or `max`.

    Attributes:
        every: the duration between its steps, after the warm-up.
        on_plateau: it is ReduceLROnPlateau, stepped after each evaluation by the value of `metric`.
        note: for the user, where the run continues after the end of the schedule, or ends before its warm-up does; or "".

    Raises:
        ConfigError: it isn't one of torch's, or is ambiguous in a way that would change the lr.
    """

    def __init__(self, spec: Any, optimizer: torch.optim.Optimizer, span: Span, monitor: tuple[str, str]):
        own, extra = reserved(spec, {"every", "metric", "horizon", "warmup"})
        words = {value for value in _nested(own) if isinstance(value, str) and is_schedule_number(value)}
        every = extra.get("every") or _usual_every(own, numbered=bool(words))
        self.every = Duration.parse(str(every or "1ep"))
        self.note = ""
        if (
            any(word.startswith("total_steps") for word in words)
            and span.horizon is not None
            and span.horizon < (span.end or 0)
        ):
            self.note = (
                f"the schedule spans {span.horizon:,} of the {span.end:,} steps (scheduler.horizon, by default the duration at "
                "the first start); the lr after that is up to the scheduler"
            )
        self.metric, mode = monitor
        outer = _class_of(own)
        if isinstance(own, dict) and outer is not None and issubclass(outer, ReduceLROnPlateau) and "_args_" not in own:
            own = {"mode": mode, **own}
        self.warmup, self._warmup = 0, None
        if extra.get("warmup"):
            warmup = Warmup.parse(extra["warmup"])
            self.warmup = span.steps(warmup.duration)
            if span.end is not None and self.warmup >= span.end:
                self.note = (
                    f"scheduler.warmup, {self.warmup:,} steps, is no shorter than the run of {span.end:,} steps: it ends in the "
                    "warm-up, and the scheduler never begins"
                )
            start = warmup.start or 1 / (self.warmup + 1)
            self._warmup = LinearLR(optimizer, start_factor=start, total_iters=self.warmup)
        self.scheduler: Any = _build(own, optimizer, span.numbers(self.every, self.warmup))
        self.on_plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        self._check_form()
        if self.on_plateau:
            self._check_plateau(mode, extra)
            return
        if every is None:
            self.every = Duration.parse(_unit(type(part) for part in _parts(self.scheduler)))
        self._period = span.steps(self.every)
        if span.end is not None:
            self._check_end((span.end - self.warmup) // self._period)
        if self._warmup is not None:
            self.scheduler = _after(self._warmup, self.scheduler)

    def _check_form(self) -> None:
        if not isinstance(self.scheduler, LRScheduler):
            raise _refused(
                f"expected a scheduler of torch.optim.lr_scheduler, which is stepped without arguments, found "
                f"{type(self.scheduler).__module__}.{type(self.scheduler).__name__}; use torch's own or "
                "dist_train.schedules.WarmupCosine"
            )
        try:
            self.state_dict()
        except Exception as error:
            raise _refused(
                f"its state can't be saved ({type(error).__name__}: {error}); use Python functions or objects in it instead of "
                "built-in functions"
            ) from error
        inner = [part for whole in _wholes(self.scheduler, SequentialLR) for part in whole._schedulers]
        if self._warmup is not None and isinstance(self.scheduler, ChainedScheduler):
            inner = [self.scheduler]
        if mixed := next((part for part in inner if isinstance(part, COMPOSITE)), None):
            raise _refused(
                f"torch's SequentialLR can't switch to a {type(mixed).__name__}: list the schedulers of both in one, or put a "
                "LinearLR into the chain instead of `warmup`"
            )
        itself = [type(part).__name__ for part in _parts(self.scheduler) if isinstance(part, WARM_THEMSELVES)]
        if self._warmup is not None and itself:
            share = "pct_start" if itself[0] == "OneCycleLR" else "step_size_up"
            raise _refused(f"{itself[0]} rises by itself ({share}): leave `warmup` out", "scheduler.warmup")

    def _check_plateau(self, mode: str, extra: dict[str, Any]) -> None:
        """Its direction is the metric's; that of a custom metric is known only to the user, who may name both."""
        own_name = extra.get("metric") and self.metric.removeprefix("val/") not in ("loss", *METRICS)
        if self.scheduler.mode != mode and not own_name:
            raise _refused(
                f"ReduceLROnPlateau has mode={self.scheduler.mode}, but follows {self.metric}, of which "
                f"{'less' if mode == 'min' else 'more'} is better; leave mode out (or pass mode={mode} where a function builds "
                "it), or name another metric: metric: val/loss",
                "scheduler.mode",
            )
        if extra.get("every"):
            raise _refused(
                "ReduceLROnPlateau is stepped after evaluations (trainer.evaluate_every); leave `every` out",
                "scheduler.every",
            )

    def _check_end(self, steps: int) -> None:
        room = _room(self.scheduler)
        if room < steps:
            raise _refused(
                f"OneCycleLR is over after {room} of its steps, but this run takes {steps}: its length was fixed when the "
                "run was started (or by its own arguments). Set a longer scheduler.horizon (epochs or steps), with "
                "checkpoint.accept_changes=true if the run has started, or total_steps: total_steps",
                "scheduler.horizon",
            )

    def after_step(self, done: int) -> None:
        """After `done` optimizer steps: in a warm-up a step after each, then once in `every`."""
        if done <= self.warmup or (not self.on_plateau and (done - self.warmup) % self._period == 0):
            self.step()

    def evaluated(self, metrics: dict[str, float]) -> None:
        """After an evaluation, which ReduceLROnPlateau follows once a warm-up is over."""
        if self.on_plateau and (self._warmup is None or self._warmup.last_epoch >= self.warmup):
            self.scheduler.step(monitored(metrics, self.metric))

    def step(self) -> None:
        """One step; of ReduceLROnPlateau its warm-up's.

        Raises:
            ValueError: OneCycleLR is over.
        """
        if self.on_plateau:
            assert self._warmup is not None
            self._warmup.step()
            return
        try:
            self.scheduler.step()
        except ValueError as error:
            raise ValueError(
                f"the schedule is over: {error}; scheduler.horizon is the duration that it spans"
            ) from error

    def extend(self) -> None:
        """Include groups that were added to the optimizer: their lr changes from now on as that of the first group does."""
        for scheduler in {id(part): part for part in (*_parts(self.scheduler), *filter(None, [self._warmup]))}.values():
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
        """Bring a new one to where it would be after `steps` optimizer steps; its lr is then in the optimizer's groups."""
        later = 0 if self.on_plateau else max(0, steps - self.warmup) // self._period
        with warnings.catch_warnings():  # torch takes this for a wrong order of steps
            warnings.simplefilter("ignore")
            for _ in range(min(steps, self.warmup) + later):
                self.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state, without functions, which come from the config again."""
        state: dict[str, Any] = _without_functions(self.scheduler.state_dict())
        if self.on_plateau and self._warmup is not None:
            state["warmup"] = self._warmup.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        own, warmup = reserved(state, {"warmup"})
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **own})
        if warmup and self._warmup is not None:
            self._warmup.load_state_dict(warmup["warmup"])


def _build(spec: Any, optimizer: torch.optim.Optimizer, number: Callable[[str], Any], outer: bool = True) -> Any:
    """What a spec describes, with numbers for the strings that stand for them; schedulers inside get the optimizer too."""
    if isinstance(spec, str):
        return number(spec)
    if isinstance(spec, list):
        return [_build(item, optimizer, number, False) for item in spec]
    if not isinstance(spec, dict):
        return spec(optimizer) if outer else spec
    own = {key: item if key == "_target_" else _build(item, optimizer, number, False) for key, item in spec.items()}
    if not is_spec(spec):
        return own
    places = _parameters(spec)
    if "optimizer" in places[1:]:
        return build(own, optimizer=optimizer)
    return build(own, optimizer) if outer or "optimizer" in places else build(own)


def _parameters(spec: Any) -> list[str]:
    form = signature(locate(spec["_target_"])) if isinstance(spec, dict) else None
    return [] if form is None else list(form.parameters)


def _refused(message: str, key: str = "scheduler") -> ConfigError:
    return ConfigError.single(key, message)


def _class_of(target: Any) -> type | None:
    """The class of a component, if it names one."""
    target = locate(target["_target_"]) if isinstance(target, dict) else target
    target = getattr(target, "func", target)  # of a partial
    return target if isinstance(target, type) else None


def _usual_every(spec: Any, numbered: bool) -> str | None:
    """`every` where the config doesn't give it, by what the classes are made for; None if only the built object shows it."""
    specs = [value for value in _nested(spec) if is_spec(value)] if isinstance(spec, dict) else [spec]
    classes = [_class_of(inner) for inner in specs]
    if classes[0] is not None:
        if all(kind is not None or "optimizer" not in _parameters(s) for s, kind in zip(specs, classes, strict=True)):
            return _unit(kind for kind in classes if kind is not None and issubclass(kind, LRScheduler))
    else:
        target = locate(specs[0]["_target_"]) if isinstance(specs[0], dict) else specs[0]
        if str(getattr(target, "__module__", "")).partition(".")[0] in ("transformers", "diffusers"):
            return "1step"
    if numbered:
        raise _ambiguous("a function builds it, with total_steps or steps_per_epoch")
    return None


def _unit(kinds: Iterable[type]) -> str:
    """When schedulers of these classes are usually stepped: `1step` or `1ep`."""
    kinds = [kind for kind in kinds if not issubclass(kind, COMPOSITE)]
    each_step = {issubclass(kind, EACH_STEP) for kind in kinds}
    if len(each_step) != 1 or any(issubclass(kind, EITHER_WAY) and not issubclass(kind, EACH_STEP) for kind in kinds):
        raise _ambiguous("LambdaLR, MultiplicativeLR and mixtures of schedulers are used both ways")
    return "1step" if each_step.pop() else "1ep"


def _ambiguous(why: str) -> ConfigError:
    return _refused(
        f"say whether it is stepped after each optimizer step or each epoch, by every: 1step or every: 1ep ({why}); numbers "
        "of the schedule, total_steps included, count in it"
    )


def _parts(scheduler: Any) -> Iterator[Any]:
    """The schedulers inside a composite one, or itself."""
    if isinstance(scheduler, COMPOSITE):
        for part in scheduler._schedulers:
            yield from _parts(part)
    else:
        yield scheduler


def _wholes(scheduler: Any, kind: type) -> Iterator[Any]:
    """The composite schedulers of a class, from the outside in."""
    if isinstance(scheduler, kind):
        yield scheduler
    for part in scheduler._schedulers if isinstance(scheduler, COMPOSITE) else ():
        yield from _wholes(part, kind)


def _after(warmup: LinearLR, scheduler: Any) -> SequentialLR:
    """The warm-up, then the scheduler; the parts of a sequence one by one, since torch's can't hold another."""
    begin, later, places = warmup.total_iters, [scheduler], list[int]()
    if isinstance(scheduler, SequentialLR):
        later, places = scheduler._schedulers, [begin + place for place in scheduler._milestones]
    return SequentialLR(warmup.optimizer, [warmup, *later], [begin, *places])


def _room(scheduler: Any) -> float:
    """How many steps a scheduler can take."""
    if isinstance(scheduler, OneCycleLR):
        return scheduler.total_steps
    if isinstance(scheduler, SequentialLR):
        return _room(scheduler._schedulers[-1]) + (scheduler._milestones[-1] if scheduler._milestones else 0)
    return min(map(_room, scheduler._schedulers)) if isinstance(scheduler, ChainedScheduler) else math.inf


def _nested(value: Any) -> Iterator[Any]:
    """A value and everything in it, from the outside in."""
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nested(item)


def _without_functions(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_functions(item) for key, item in value.items() if not callable(item)}
    return [_without_functions(item) for item in value] if isinstance(value, list) else value
