"""Checks every component of a config: it is found, its arguments fit its signature, and its class fits its slot."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import components
from .code import missing, read_signature
from .errors import ConfigError, Problem, describe, did_you_mean
from .fields import Key, is_named
from .metrics import RESERVED, metric_spec
from .schedules import is_schedule_number
from .schema import Config
from .source import as_problems, nearest

Finding = tuple[Key, str]
_Kind = inspect.Parameter


@dataclass(frozen=True)
class Slot:
    """What a slot (a key that holds a component) expects.

    Attributes:
        wants: in words. fits: whether a class fits, of the component or of a live object; functions always do.
        gives: the positional arguments that dist_train passes. own: keys of the spec that aren't arguments.
        late: functions are called later with more arguments (loss, collate).
        yields: a key in `own` is an argument where the target has a parameter of that name.
    """

    wants: str
    fits: Callable[[type], bool]
    gives: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    late: bool = False
    yields: bool = False


def _is(path: str) -> Callable[[type], bool]:
    return lambda kind: issubclass(kind, components.locate(path))


def _has(*names: str) -> Callable[[type], bool]:
    return lambda kind: all(hasattr(kind, name) for name in names)


def _is_callable(kind: type) -> bool:
    # hasattr(kind, "__call__") is true of every class: calling it builds an instance
    return any("__call__" in base.__dict__ for base in kind.__mro__)


def _is_dataset(kind: type) -> bool:
    readable = _has("__getitem__", "__len__")(kind) or hasattr(kind, "__iter__")
    return readable and not _is("torch.nn.Module")(kind)  # torch.nn.Sequential can be read like a list


_DATASET = Slot("a dataset, with __getitem__ and __len__", _is_dataset)
_MODULE = Slot("a torch.nn.Module", _is("torch.nn.Module"))
SLOTS: dict[str, Slot] = {
    "data.train": _DATASET,
    "data.val": _DATASET,
    "data.test": _DATASET,
    "data.weights": Slot("a function from the dataset to the weights of its samples", _is_callable, ("dataset",)),
    "data.collate": Slot("a function from a list of samples to a batch", _is_callable, late=True),
    "data.augment": Slot(
        "an augmentation, called with (inputs, targets, draws), (inputs, targets) or (inputs)", _is_callable
    ),
    "model": _MODULE,
    "model_init": Slot("a function that fills a tensor, of torch.nn.init say", _is_callable, ("tensor",), ("match",)),
    "transfer.append.module": _MODULE,
    "task": Slot(
        "a task, with step(model, batch) and predict(model, batch), or outputs(model, batch) and loss(outputs, targets)",
        lambda kind: _has("step", "predict")(kind) or _has("outputs", "loss")(kind),
    ),
    "loss": Slot("a loss, called with (output, target)", _is_callable, late=True),
    "val_loss": Slot("a loss, called with (output, target)", _is_callable, late=True),
    "metrics": Slot(
        "a metric, with sums and result (dist_train.metrics.Metric) or update, compute and reset",
        lambda kind: hasattr(kind, "sums") or _has("update", "compute", "reset")(kind),
        own=RESERVED,
        yields=True,
    ),
    "optimizer": Slot(
        "a torch.optim.Optimizer",
        _is("torch.optim.Optimizer"),
        ("params",),
        ("groups", "layer_decay", "match", "named_parameters"),
    ),
    "scheduler": Slot(
        "a scheduler of torch.optim.lr_scheduler",
        _is("torch.optim.lr_scheduler.LRScheduler"),
        ("optimizer",),
        ("every", "metric", "horizon", "warmup"),
    ),
    "callbacks": Slot(
        "a callback, a subclass of dist_train.callbacks.Callback or one with all of its methods",
        _has("on_start", "on_step_end", "on_epoch_end", "on_evaluation_end", "on_end", "state_dict", "load_state_dict"),
    ),
}


_ARGUMENT = Slot("anything", lambda kind: True)  # a component in the arguments of another one
_OF = Slot("a function (outputs, targets) -> (outputs, targets)", _is_callable, late=True)  # `of` of a metric
_NESTED_SCHEDULER = Slot("anything", lambda kind: True, ("optimizer",))  # gets the optimizer if it takes one


def check_components(config: Config) -> list[Problem]:
    """Every problem of every component, with its place: not found, wrong arguments, wrong class for its slot.

    Imports what the config names (and torch), looking for user code in run.code_paths; builds nothing.
    """
    components.add_code_paths(config.run.code_paths)
    findings: list[Finding] = []
    for key, slot, spec in _specs(config):
        findings += _imported(key, slot, spec) if components.is_spec(spec) else _live(key, slot, spec)
    return as_problems((nearest(config.places, key), key, message) for key, message in findings)


def require_components(config: Config) -> None:
    """Raises ConfigError: with every problem that `check_components` finds."""
    if problems := check_components(config):
        raise ConfigError(problems)


def check_sources(config: Config) -> Iterator[Finding]:
    """The same problems as far as they can be found without importing anything: see `code.py`."""
    components.add_code_paths(config.run.code_paths)
    for key, slot, spec in _specs(config):
        if components.is_spec(spec) and isinstance(spec["_target_"], str):
            if form := read_signature(spec["_target_"], config.run.code_paths):
                yield from _arguments(key, slot, spec, *form)
            elif wrong := missing(spec["_target_"], config.run.code_paths):
                yield (*key, "_target_"), wrong


def _specs(config: Config) -> Iterator[tuple[Key, Slot, Any]]:
    """Every component of a config, also those in arguments of others; without metrics given by name."""
    for name, slot in SLOTS.items():
        key: Key = tuple(name.split("."))
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        places: list[tuple[Key, Any]] = [(key, value)]
        if isinstance(value, list) or (name in ("optimizer", "scheduler") and is_named(value)):
            items = enumerate(value) if isinstance(value, list) else value.items()
            places = [((*key, place), item) for place, item in items]
        for place, item in places:
            if name == "metrics" and isinstance(item, dict) and "metric" in item:
                yield from _metric(place, slot, item)
            elif item is not None and not isinstance(item, str | int | float):
                yield place, slot, item
                own, taken = components.reserved(item, slot.own)
                if components.is_spec(taken.get("of")):
                    yield (*place, "of"), _OF, taken["of"]
                yield from _nested(place, own, _NESTED_SCHEDULER if name == "scheduler" else _ARGUMENT)


def _metric(key: Key, slot: Slot, entry: dict[str, Any]) -> Iterator[tuple[Key, Slot, Any]]:
    """The component of an entry with the key `metric`, and the function that `of` names."""
    spec = metric_spec(entry)
    yield (*key, *spec.place), slot, spec.component
    yield from _nested((*key, *spec.place), spec.component, _ARGUMENT)
    if components.is_spec(spec.of) or callable(spec.of):
        yield (*key, "of"), _OF, spec.of


def _nested(key: Key, value: Any, slot: Slot) -> Iterator[tuple[Key, Slot, Any]]:
    for name, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if components.is_spec(item):
            yield (*key, name), slot, item
        yield from _nested((*key, name), item, slot)


def _live(key: Key, slot: Slot, value: Any) -> Iterator[Finding]:
    """Whether an object from Python fits; where the slot passes arguments, a factory does too."""
    is_class = isinstance(value, type)
    kind = value if is_class else type(value)
    if slot.gives and not callable(value):
        given = ", ".join(slot.gives)
        yield key, f"expected a factory called with ({given}), such as functools.partial, found {describe(value)}"
    elif is_class and not slot.gives:
        yield key, f"expected {slot.wants}, found the class {kind.__name__} itself: write {kind.__name__}(...)"
    elif (is_class or not slot.gives) and not slot.fits(kind):
        yield key, f"expected {slot.wants}, found {f'the class {kind.__name__}' if is_class else describe(value)}"


def _imported(key: Key, slot: Slot, spec: dict[str, Any]) -> Iterator[Finding]:
    """A spec's target, class and arguments."""
    try:
        target = components.locate(spec["_target_"])
    except ConfigError as error:
        yield (*key, "_target_"), error.problems[0].message
        return
    name, form = _name(spec), components.signature(target)
    if not callable(target):
        yield (*key, "_target_"), f"{name} is {describe(target)}, which can't be called; expected a class or function"
    elif isinstance(target, type) and not slot.fits(target):
        yield (*key, "_target_"), f"expected {slot.wants}; {name} is a class of another kind"
    elif form is not None:
        yield from _arguments(key, slot, spec, form, isinstance(target, type))


def _name(spec: dict[str, Any]) -> str:
    return str(getattr(spec["_target_"], "__qualname__", spec["_target_"]))


def _arguments(
    key: Key, slot: Slot, spec: dict[str, Any], form: inspect.Signature, is_class: bool
) -> Iterator[Finding]:
    """Everything that doesn't fit a signature (`Signature.bind` stops at the first)."""
    name = _name(spec)
    own = [name for name in slot.own if not (slot.yields and name in form.parameters)]
    keywords, extra = components.reserved(spec, ("_target_", "_args_", *own))
    parameters = list(form.parameters.values())
    kinds = {p.kind for p in parameters}
    places = [p.name for p in parameters if p.kind in (_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD)]
    named = {p.name: p for p in parameters if p.kind in (_Kind.POSITIONAL_OR_KEYWORD, _Kind.KEYWORD_ONLY)}
    by_name = [name for name in slot.gives if name in named and name not in places[:1]]
    places = [name for name in places if name not in by_name]
    gives = [] if by_name or (slot is _NESTED_SCHEDULER and "optimizer" not in places) else slot.gives
    given = [*gives, *spec.get("_args_", [])]
    filled = [*by_name, *places[: len(given)]]
    ours = filled[: len(by_name or gives)]  # what dist_train passes
    if len(given) > len(places) and _Kind.VAR_POSITIONAL not in kinds:
        yield (*key, "_args_"), f"{name} takes {len(places)} positional arguments, found {len(given)}"
    for argument, value in keywords.items():
        if argument in filled and argument in named:
            by = "dist_train passes it" if argument in ours else "it is in _args_ too"
            yield (*key, argument), f"{name} gets {argument} twice: {by}; leave it out here"
        elif argument in named and not (key[0] == "scheduler" and is_schedule_number(value)):
            yield from _value((*key, argument), name, named[argument], value)
    groups = extra["groups"] if isinstance(extra.get("groups"), list) else []
    groups = [(("groups", index), group) for index, group in enumerate(groups) if isinstance(group, dict)]
    for where, options in (((), keywords), *groups):  # torch itself ignores unknown options of groups
        free_form = places[:1] == ["param_groups"] and bool(where)  # its groups have options that no argument names
        for argument in options if _Kind.VAR_KEYWORD not in kinds and not free_form else ():
            if argument not in named and not (where and argument in ("match", "ndim_below")):
                free = [p for p in named if p not in (ours if where else filled)]
                hint = did_you_mean(argument, free) or f"; it takes {', '.join(free) or 'no arguments'}"
                yield (*key, *where, argument), f"{name} has no argument {argument}{hint}"
    required = [p.name for p in parameters if p.default is p.empty and p.name in (*places, *named)]
    missing = [p for p in required if p not in filled and p not in keywords]
    if missing and not (slot.late and not is_class):
        bare = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
        shown = name.rpartition(".")[2] + textwrap.shorten(str(bare), 120, placeholder=" ...)")
        yield key, f"{name} requires {', '.join(missing)}; its signature is {shown}"


def _value(key: Key, name: str, parameter: inspect.Parameter, value: Any) -> Iterator[Finding]:
    """A string for a parameter of a number, or a number for a string; anything else is left to the target."""
    kinds = components.type_names(parameter.annotation) - {"None", "NoneType"}
    wanted = "a number" if kinds <= {"int", "float", "bool", "complex", "Tensor"} else "a string"
    wrong = isinstance(value, str) if wanted == "a number" else kinds == {"str"} and isinstance(value, int | float)
    if kinds and wrong:
        hint = "; put it in quotes" if wanted == "a string" else ""
        yield key, f"{name} expects {wanted} for {parameter.name}, found {describe(value)}{hint}"
