"""Whether every component of a config can be made: it is found, its arguments fit, and it is of its slot's kind.

This imports what the config names (so torch too) and builds nothing.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import components
from .errors import ConfigError, Problem, describe, did_you_mean
from .schema import Config
from .source import Key, Place, as_problems, dotted, nearest

Finding = tuple[Key, str]


@dataclass(frozen=True)
class Slot:
    """What a slot wants: how many positional arguments it gives, its own keys, and a test of kind.

    `late` slots (loss, collate) take functions that are called later with more arguments.
    `fits` gets the class of the component, or the live object's class; functions are taken as they are.
    """

    wants: str
    fits: Callable[[type], bool]
    gives: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    late: bool = False


def _is(path: str) -> Callable[[type], bool]:
    return lambda kind: issubclass(kind, components.locate(path))


def _has(*names: str) -> Callable[[type], bool]:
    return lambda kind: all(hasattr(kind, name) for name in names)


def _is_callable(kind: type) -> bool:
    # hasattr(kind, "__call__") is true of every class: calling it builds an instance
    return any("__call__" in base.__dict__ for base in kind.__mro__)


def _is_dataset(kind: type) -> bool:
    if issubclass(kind, components.locate("torch.nn.Module")):
        return False  # torch.nn.Sequential has __getitem__ and __len__ too
    return (hasattr(kind, "__getitem__") and hasattr(kind, "__len__")) or hasattr(kind, "__iter__")


def _is_callback(kind: type) -> bool:
    return any(name.startswith("on_") for name in dir(kind))


def _is_metric(kind: type) -> bool:
    return hasattr(kind, "sums") or (hasattr(kind, "update") and hasattr(kind, "compute"))


_DATASET = Slot("a dataset, with __getitem__ and __len__", _is_dataset)
SLOTS: dict[str, Slot] = {
    "data.train": _DATASET,
    "data.val": _DATASET,
    "data.test": _DATASET,
    "data.collate": Slot("a function from a list of samples to a batch", _is_callable, late=True),
    "data.augment": Slot("an augmentation, called with (inputs, targets, draws)", _is_callable),
    "model": Slot("a torch.nn.Module", _is("torch.nn.Module")),
    "model_init": Slot("a function that fills a tensor, of torch.nn.init say", _is_callable, ("tensor",), ("match",)),
    "transfer.append.module": Slot("a torch.nn.Module", _is("torch.nn.Module")),
    "task": Slot("a task, with step(model, batch) and predict(model, batch)", _has("step", "predict")),
    "loss": Slot("a loss, called with (output, target)", _is_callable, late=True),
    "metrics": Slot("a metric, with sums and result (dist_train.metrics.Metric) or update and compute", _is_metric),
    "optimizer": Slot("a torch.optim.Optimizer", _is("torch.optim.Optimizer"), ("params",), ("groups",)),
    "scheduler": Slot(
        "a scheduler of torch.optim.lr_scheduler",
        _is("torch.optim.lr_scheduler.LRScheduler"),
        ("optimizer",),
        ("every", "metric", "horizon"),
    ),
    "callbacks": Slot("a callback, with on_... hooks (dist_train.callbacks.Callback)", _is_callback),
}


def specs(config: Config) -> Iterator[tuple[Key, Slot, Any]]:
    """Every component of a config with its key and slot; metrics given by name are left out."""
    for name, slot in SLOTS.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        key: Key = tuple(name.split("."))
        for item_key, item in (
            [((*key, i), v) for i, v in enumerate(value)] if isinstance(value, list) else [(key, value)]
        ):
            if item is not None and not isinstance(item, str):
                yield item_key, slot, item


def check(config: Config) -> list[Problem]:
    """Every problem of every component, by place. User code is looked for in run.code_paths."""
    components.add_code_paths(config.run.code_paths)
    noted: list[tuple[Place, str, str]] = []
    for key, slot, spec in specs(config):
        findings = _spec(key, slot, spec) if components.is_spec(spec) else _live(key, slot, spec)
        noted += [(nearest(config.places, where), dotted(where), message) for where, message in findings]
    return as_problems(noted)


def check_sources(config: Config) -> Iterator[Finding]:
    """The wrong arguments that can be seen without importing anything: see `static.py`."""
    from .static import read_signature

    def look(key: Key, slot: Slot | None, spec: Any) -> Iterator[Finding]:
        if components.is_spec(spec):
            own, _ = components.reserved(spec, slot.own if slot else ())
            found = read_signature(str(spec["_target_"]), config.run.code_paths)
            if found is not None:
                yield from _arguments(key, slot, str(spec["_target_"]), *found, own)
        if isinstance(spec, dict | list):
            for name, item in spec.items() if isinstance(spec, dict) else enumerate(spec):
                yield from look((*key, name), None, item)

    for key, slot, spec in specs(config):
        yield from look(key, slot, spec)


def _live(key: Key, slot: Slot, value: Any) -> Iterator[Finding]:
    """An object from Python is of the right kind; where the slot gives arguments, a factory will do."""
    if isinstance(value, type):
        if not slot.gives:
            name = value.__name__
            yield (
                key,
                f"expected {slot.wants}, found the class {name} itself: write {name}(...) or {{'_target_': {name}}}",
            )
        elif not slot.fits(value):
            yield key, f"expected {slot.wants}, found the class {value.__name__}"
    elif slot.gives:
        if not callable(value):
            given = ", ".join(slot.gives)
            yield key, f"expected a factory called with ({given}), such as functools.partial, found {describe(value)}"
    elif not slot.fits(type(value)):
        yield key, f"expected {slot.wants}, found {describe(value)}"


def _spec(key: Key, slot: Slot | None, spec: dict[str, Any]) -> Iterator[Finding]:
    """A spec's target, arguments and kind, then the specs inside its arguments."""
    own, extra = components.reserved(spec, slot.own if slot else ())
    for name, value in own.items():
        if name != "_target_":
            yield from _nested((*key, name), value)
    try:
        target = components.locate(spec["_target_"])
    except ConfigError as error:
        yield (*key, "_target_"), error.problems[0].message
        return
    name = spec["_target_"] if isinstance(spec["_target_"], str) else target.__name__
    if not callable(target):
        yield (*key, "_target_"), f"{name} is {describe(target)}, which can't be called; expected a class or function"
        return
    if slot is not None and isinstance(target, type) and not slot.fits(target):
        yield (*key, "_target_"), f"expected {slot.wants}; {name} is a class of another kind{_belongs(target, slot)}"
        return
    form = components.signature(target)
    if form is not None:
        yield from _arguments(key, slot, name, form, isinstance(target, type), own)
    if slot is not None and "groups" in extra:
        yield from _groups(key, name, target, extra["groups"])


def _nested(key: Key, value: Any) -> Iterator[Finding]:
    if components.is_spec(value):
        yield from _spec(key, None, value)
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _nested((*key, name), item)


def _belongs(target: type, slot: Slot) -> str:
    """The slot that a misplaced component would fit, for those that can be told apart."""
    for name in ("optimizer", "scheduler", "model"):
        if SLOTS[name] is not slot and SLOTS[name].fits(target):
            return f"; it belongs to {name}"
    return ""


def _arguments(
    key: Key, slot: Slot | None, name: str, form: inspect.Signature, is_class: bool, own: dict[str, Any]
) -> Iterator[Finding]:
    given = [*(slot.gives if slot else ()), *own.get("_args_", [])]
    keywords = {name: value for name, value in own.items() if name not in ("_target_", "_args_")}
    kinds = inspect.Parameter
    places = [p for p in form.parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    named = {p.name: p for p in form.parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    open_ended = {p.kind for p in form.parameters.values()}
    if len(given) > len(places) and kinds.VAR_POSITIONAL not in open_ended:
        yield (*key, "_args_"), f"{name} takes {len(places)} positional arguments, found {len(given)}"
    filled = {parameter.name for parameter in places[: len(given)]}
    engine_given = {parameter.name for parameter in places[: len(slot.gives) if slot else 0]}
    for argument, value in keywords.items():
        if argument in filled and argument in named:
            by = "the engine gives it" if argument in engine_given else "it is in _args_ too"
            yield (*key, argument), f"{name} gets {argument} twice: {by}; leave it out here"
        elif argument not in named and kinds.VAR_KEYWORD not in open_ended:
            free = [p for p in named if p not in filled]
            hint = did_you_mean(argument, free) or f"; it takes {', '.join(free) or 'no arguments'}"
            yield (*key, argument), f"{name} has no argument {argument}{hint}"
        elif argument in named:
            yield from _value((*key, argument), name, named[argument], value)
    needed = [p.name for p in (*places, *named.values()) if p.default is kinds.empty and p.name not in filled]
    missing = [p for p in dict.fromkeys(needed) if p not in keywords]
    if missing and not (slot and slot.late and not is_class):
        yield key, f"{name} needs {_listed(missing)}; it is called as {name.rpartition('.')[2]}{_shown(form)}"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _shown(form: inspect.Signature) -> str:
    """A signature without its annotations, cut where it is long."""
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in form.parameters.values()]
    text = str(inspect.Signature(bare))
    return text if len(text) <= 120 else text[:116] + "...)"


_NUMBERS = {"int", "float", "bool", "complex", "Tensor", "None", "NoneType"}


def _value(key: Key, name: str, parameter: inspect.Parameter, value: Any) -> Iterator[Finding]:
    """A string where the signature wants numbers, or the other way round; anything less clear is left to the target."""
    kinds = _names(parameter.annotation)
    if isinstance(value, str) and kinds and kinds <= _NUMBERS:
        if key[0] == "scheduler" and value in ("total_steps", "steps_per_epoch"):
            return
        yield key, f"{name} expects a number for {parameter.name}, found {describe(value)}"
    elif isinstance(value, bool | int | float) and kinds and kinds <= {"str", "None", "NoneType"}:
        yield key, f"{name} expects a string for {parameter.name}, found {describe(value)}"


def _names(annotation: Any) -> set[str]:
    """The names of the types in an annotation or a union of them; empty where there is none."""
    if annotation is inspect.Parameter.empty:
        return set()
    if isinstance(annotation, str):
        return {part.strip().rpartition(".")[2] for part in annotation.split("|")}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_names(part) for part in typing.get_args(annotation)))
    return {getattr(annotation, "__name__", str(annotation))}


def _groups(key: Key, name: str, target: Any, groups: Any) -> Iterator[Finding]:
    """The options of parameter groups are arguments of the optimizer: torch itself ignores unknown ones."""
    form = components.signature(target)
    if form is None or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in form.parameters.values()):
        return
    known = [p for p in form.parameters if p != "params"]
    for index, group in enumerate(groups or []):
        for option in group:
            if option != "match" and option not in known:
                hint = did_you_mean(option, known) or f"; it takes {', '.join(known)}"
                yield (*key, "groups", index, option), f"{name} has no argument {option}{hint}"
