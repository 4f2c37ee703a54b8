"""The entries of `metrics`: a name, a component, or one of these with the reserved keys `name` and `of`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from .errors import describe, did_you_mean
from .fields import COMPONENT_SCHEMA, METRICS, Key, component

RESERVED = ("name", "of")  # keys of an entry that aren't arguments of its class
FORM = "{metric: accuracy, name: ..., of: ...}"
OF = (
    "argmax, softmax, softmax.1, sigmoid, a dotted path into the outputs (logits, 0, out.argmax), "
    "{outputs: PATH, targets: PATH}, or a function as {_target_: ...}"
)
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class MetricSpec:
    """An entry of `metrics` in its parts.

    Attributes:
        component: a spec, or a live object. alias: its name in METRICS, if it was named so.
        name: what it is recorded as. of: how its arguments are taken from outputs and targets. Both None where not given.
        place: the key of the component inside the entry.
    """

    component: Any
    alias: str | None = None
    name: Any = None
    of: Any = None
    place: Key = ()


def metric_spec(entry: Any, parameters: Collection[str] = ()) -> MetricSpec:
    """The parts of a valid entry.

    Args:
        parameters: names of what its class takes, where it is written as a component: a parameter called `name` or `of` gets the
            key of that name (`{metric: {_target_: ...}, of: ...}` has both).
    """
    if isinstance(entry, str):
        return MetricSpec(dict(METRICS[entry]), entry)
    if not isinstance(entry, dict):
        return MetricSpec(entry)
    own = [key for key in RESERVED if "metric" in entry or key not in parameters]
    reserved = {key: entry[key] for key in own if key in entry}
    rest = {key: value for key, value in entry.items() if key not in (*reserved, "metric")}
    inner = entry.get("metric")
    if inner is None:
        return MetricSpec(rest, **reserved)
    if isinstance(inner, str):
        return MetricSpec({**METRICS[inner], **rest}, inner, **reserved)
    return MetricSpec(inner, place=("metric",), **reserved)


# What metrics with names record besides, when they are asked for it.
_MORE = {"miou": ("iou_*",), "map": ("map_50", "map_75", "ap_*"), "f1": ("f1_*",), "auroc": ("auroc_*",)}


def metric_records(entry: Any) -> list[str]:
    """Patterns of what an entry is recorded as; [] if only its class knows."""
    spec = metric_spec(entry)
    if spec.alias is None or (spec.name is None and spec.component != METRICS[spec.alias] and spec.alias not in _MORE):
        return []  # with `top: 3`, say, accuracy has another name
    more = _MORE.get(spec.alias, ())
    if spec.name is not None:
        more = tuple(f"{spec.name}_{record.removeprefix(f'{spec.alias}_')}" for record in more)
    return [spec.name or spec.alias, *more]


def wrong_reserved(spec: MetricSpec) -> Iterator[tuple[Key, str]]:
    """What is wrong with the values of `name` and `of`, by key."""
    name, of = spec.name, spec.of
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        yield ("name",), f"expected a name of letters, digits, _, - and dots, found {describe(name)}"
    if isinstance(of, dict) and "_target_" not in of:
        parts = of.items()
        if not of or not of.keys() <= {"outputs", "targets"}:
            yield ("of",), f"expected {OF}; found the keys {', '.join(map(str, of)) or '(none)'}"
            return
        for side, path in parts:
            if not _is_path(path):
                yield ("of", side), f"expected a dotted path like logits or 0.argmax, found {describe(path)}"
    elif of is not None and not (_is_path(of) or isinstance(of, dict) or callable(of)):
        yield ("of",), f"expected {OF}; found {describe(of)}"


def _is_path(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return False
    return all(part for part in str(value).split(".")) and not str(value).startswith("-")


def _entry(value: Any) -> Any:
    if isinstance(value, str):
        _known(value)
        return value
    if not isinstance(value, dict) or "metric" not in value:
        return component(value)
    inner = value["metric"]
    if "_target_" in value:
        raise ValueError("metric and _target_ are both given; keep one of them")
    if isinstance(inner, str):
        _known(inner)
    else:
        component(inner)
        if extra := [key for key in value if key not in ("metric", *RESERVED)]:
            raise ValueError(
                f"{', '.join(extra)} is no key here: a component's arguments stand beside its _target_; beside metric are "
                "only name and of"
            )
    for key, message in wrong_reserved(metric_spec(value)):
        raise ValueError(f"{'.'.join(map(str, key))}: {message}")
    return value


def _known(name: str) -> None:
    if name not in METRICS:
        known = f"; there are {', '.join(METRICS)}, and any class by {{_target_: ...}}"
        raise ValueError(f"there is no metric {name}{did_you_mean(name, METRICS) or known}")


_RESERVED_SCHEMA: dict[str, Any] = {
    "name": {"type": "string", "pattern": r"^[\w.-]+$", "description": "What it is recorded as"},
    "of": {"description": f"What it is computed of: {OF}"},
}
_COMPONENT = {**COMPONENT_SCHEMA, "properties": {**COMPONENT_SCHEMA["properties"], **_RESERVED_SCHEMA}}
_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "enum": list(METRICS)},
        _COMPONENT,
        {
            "type": "object",
            "minProperties": 1,
            "properties": {
                "metric": {"anyOf": [{"type": "string", "enum": list(METRICS)}, COMPONENT_SCHEMA]},
                **_RESERVED_SCHEMA,
            },
            "additionalProperties": True,
        },
    ]
}
Metric = Annotated[Any, BeforeValidator(_entry), WithJsonSchema(_SCHEMA)]
