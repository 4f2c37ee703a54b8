"""The kinds of value that the schema is made of: how each is checked, named in messages, and written out again."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from .durations import Duration
from .errors import describe


def _declare(change: str, default: Any, description: str, **limits: Any) -> Any:
    extra: Any = {"change": change}
    if isinstance(default, list):
        return Field(default_factory=lambda: list(default), description=description, json_schema_extra=extra, **limits)
    return Field(default, description=description, json_schema_extra=extra, **limits)


def harmless(default: Any, description: str, **limits: Any) -> Any:
    """A key that a run may be continued with under another value; the difference is logged."""
    return _declare("harmless", default, description, **limits)


def consent(default: Any, description: str, **limits: Any) -> Any:
    """A key whose change needs `checkpoint.accept_changes=true` (or another `run.name`)."""
    return _declare("consent", default, description, **limits)


def refused(default: Any, description: str, **limits: Any) -> Any:
    """A key that can't change within one run."""
    return _declare("refused", default, description, **limits)


# The metrics that have a name; tests hold this equal to dist_train.engine.metrics.NAMED.
METRICS = ("accuracy", "top5", "binary_accuracy", "mae", "mse", "rmse", "r2")


class Says:
    """What a type is called in messages and in the reference: `expected <text>, found ...`."""

    def __init__(self, text: str) -> None:
        self.text = text


_OTHER_SPELLINGS = ("target", "class_path", "_component_", "class", "type", "name")


def _component(value: Any) -> Any:
    form = "write a component as {_target_: package.module.Name, argument: value, ...}"
    if isinstance(value, dict):
        if "_live_" in value:
            raise ValueError(
                f"this was an object made in Python ({value['_live_']}), which a file can't hold: continue from Python "
                "with the same object, or name it by _target_"
            )
        target = value.get("_target_")
        if target is None:
            other = next((key for key in _OTHER_SPELLINGS if key in value), None)
            raise ValueError(f"_target_ is missing; {f'{other} is called _target_ here' if other else form}")
        if not isinstance(target, str) and not callable(target):
            raise ValueError(f"_target_ must be a dotted path, found {describe(target)}; {form}")
        if not isinstance(value.get("_args_", []), list):
            raise ValueError(f"_args_ must be a list of positional arguments, found {describe(value['_args_'])}")
        return value
    if value is None or isinstance(value, str | bool | int | float | list):
        if isinstance(value, str) and "." in value:
            form = f"write {{_target_: {value}}}, with its arguments beside it"
        raise ValueError(f"expected a component, found {describe(value)}; {form}")
    return value


def _metric(value: Any) -> Any:
    return value if isinstance(value, str) and value else _component(value)


def _one_or_more(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


_COMPONENT_SCHEMA = {
    "type": "object",
    "required": ["_target_"],
    "properties": {
        "_target_": {"type": "string", "description": "Import path of a class or function, e.g. torch.optim.SGD"},
        "_args_": {"type": "array", "description": "Positional arguments"},
    },
    "additionalProperties": True,
}
_DURATION_SCHEMA = {
    "type": "string",
    "pattern": r"^\s*[0-9.eE+]+\s*[A-Za-z]+\s*$",
    "examples": ["20ep", "500step"],
}
_NAMED_OR_COMPONENT = {"anyOf": [{"type": "string", "enum": list(METRICS)}, _COMPONENT_SCHEMA]}

Component = Annotated[Any, BeforeValidator(_component), WithJsonSchema(_COMPONENT_SCHEMA), Says("a component")]
Metric = Annotated[
    Any, BeforeValidator(_metric), WithJsonSchema(_NAMED_OR_COMPONENT), Says("the name of a metric or a component")
]
Length = Annotated[
    Duration,
    BeforeValidator(Duration.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(_DURATION_SCHEMA),
    Says("a duration like 20ep, 500step or 10min"),
]
Lengths = Annotated[
    list[Length],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"anyOf": [_DURATION_SCHEMA, {"type": "array", "items": _DURATION_SCHEMA}]}),
    Says("a duration or a list of durations"),
]
Patterns = Annotated[
    list[Annotated[str, Field(min_length=1), Says("a name pattern")]],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    Says("a name pattern or a list of them"),
]
Whole = Annotated[int, Says("a whole number")]
Count = Annotated[int, Field(ge=1), Says("a whole number of at least 1")]
NonNegative = Annotated[int, Field(ge=0), Says("a whole number of at least 0")]
Seed = Annotated[int, Field(ge=0, lt=2**63), Says("a whole number from 0 to 2**63 - 1")]
Number = Annotated[float, Field(allow_inf_nan=False), Says("a number (like 0.1)")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Says("a number above 0 (like 0.1)")]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False), Says("a number of at least 0 (like 0.1)")]
Decay = Annotated[float, Field(gt=0, lt=1), Says("a number between 0 and 1 (like 0.999)")]
Text = Annotated[str, Field(min_length=1), Says("a string")]
# A name may look like a number: run.name=2024.
Name = Annotated[
    str, BeforeValidator(lambda v: str(v) if type(v) in (int, float) else v), Field(min_length=1), Says("a string")
]
Auto = Literal["auto"]


class Section(BaseModel):
    """A mapping of known keys; any other key is an error. Sections don't change once they are read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


def plain(value: Any) -> Any:
    """The YAML-safe copy of any value of a config."""
    if isinstance(value, Section):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Duration):
        return str(value)
    if isinstance(value, dict):
        return {key if type(key) is int else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    named = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    return {"_live_": f"{named.__module__}.{named.__qualname__}"}


def any_live(value: Any) -> bool:
    """Whether a plain value holds a live object."""
    if isinstance(value, dict):
        return "_live_" in value or any(any_live(item) for item in value.values())
    return isinstance(value, list) and any(any_live(item) for item in value)


# --- reading the schema itself ----------------------------------------------------------------------------------------


def bare(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without Annotated, and its metadata."""
    metadata: tuple[Any, ...] = ()
    while get_origin(annotation) is Annotated:
        metadata = (*annotation.__metadata__, *metadata)
        annotation = annotation.__origin__
    return annotation, metadata


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds (or may hold), or None for a leaf."""
    annotation = bare(annotation)[0]
    for branch in get_args(annotation) if is_union(annotation) else (annotation,):
        if isinstance(branch, type) and issubclass(branch, Section):
            return branch
    return None


def is_union(annotation: Any) -> bool:
    """Whether an annotation is a union."""
    return get_origin(annotation) in (Union, UnionType)


def choices(annotation: Any) -> list[str]:
    """The words that a type allows: of a Literal, `true` and `false`, `null`."""
    annotation = bare(annotation)[0]
    if is_union(annotation):
        return [word for branch in get_args(annotation) for word in choices(branch)]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    words: dict[Any, list[str]] = {bool: ["true", "false"], type(None): ["null"]}
    return words.get(annotation, []) if isinstance(annotation, type) else []


def says(annotation: Any) -> str:
    """What a type is called, for messages and the reference: `a whole number of at least 1 or auto`."""
    annotation, metadata = bare(annotation)
    for mark in reversed(metadata):
        if isinstance(mark, Says):
            return mark.text
    if is_union(annotation):
        branches = [says(branch) for branch in get_args(annotation)]
        return ", ".join(branches[:-1]) + " or " + branches[-1]
    if get_origin(annotation) is Literal:
        values = [str(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " or " + values[-1]
    if get_origin(annotation) is list:
        return "a list, each entry " + says(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a mapping of keys"
    return {type(None): "null", bool: "true or false", str: "a string"}.get(annotation, str(annotation))
