"""The types of the schema: durations, paths, components, ...: how each is checked, and written as YAML."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.fields import FieldInfo

from .errors import describe

Key = tuple[str | int, ...]  # a dotted key in parts; entries of a list are counted from 0

# In a run's name: `{time}`, `{job}` or a key of the config.
PLACEHOLDER = re.compile(r"\{([\w.]+)\}")


def dotted(key: Key) -> str:
    """The key as it is written on a command line."""
    return ".".join(map(str, key))


def keyed(text: str) -> Key:
    """A dotted key in parts, with the numbers of list entries as ints."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("."))


_DURATION = re.compile(r"\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_SECONDS = {"s": 1, "min": 60, "h": 3600}
UNITS = "ep (epochs), step (optimizer steps), s, min or h"


@dataclass(frozen=True)
class Duration:
    """`value` epochs (`ep`, an int), optimizer steps (`step`, an int) or seconds (`s`, a float); always above 0."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read `20ep`, `20 ep`, `500step`, `1.5h`. Raises ValueError that names the units."""
        if isinstance(text, Duration):
            return text
        match = _DURATION.fullmatch(str(text)) if isinstance(text, int | float | str) else None
        try:
            number, unit = match.groups() if match is not None else ("", "")
            value = float(number)
        except ValueError:
            raise ValueError(f"expected a number and a unit, like 20ep, 500step or 10min, found {text!r}") from None
        if not unit:
            raise ValueError(f"{text} has no unit; the units are {UNITS}, for example {number}ep")
        if unit not in ("ep", "step", *_SECONDS):
            raise ValueError(f"unknown unit {unit!r} in {text!r}; the units are {UNITS}")
        if not 0 < value < float("inf"):
            raise ValueError(f"a duration must be above 0, found {text!r}")
        if unit in _SECONDS:
            return cls(value * _SECONDS[unit], "s")
        if value != int(value):
            raise ValueError(f"{unit} counts whole {'epochs' if unit == 'ep' else 'steps'}, found {text!r}")
        return cls(int(value), unit)

    @classmethod
    def parse_time(cls, text: object) -> Duration:
        """The same for a key that is a time."""
        if not (length := cls.parse(text)).is_time:
            raise ValueError(f"expected a time like 10min, found {length}")
        return length

    @classmethod
    def parse_count(cls, text: object) -> Duration:
        """The same for a key that counts epochs or steps."""
        if (length := cls.parse(text)).is_time:
            raise ValueError(f"expected epochs or steps, like 5ep or 500step, found {length}")
        return length

    @property
    def is_time(self) -> bool:
        """Whether it is measured by the clock, in seconds."""
        return self.unit == "s"

    def __str__(self) -> str:
        """The shortest exact spelling: parses back to an equal Duration."""
        if self.is_time:
            for unit in ("h", "min"):
                amount, rest = divmod(self.value, _SECONDS[unit])
                if amount and not rest:
                    return f"{int(amount)}{unit}"
        value = int(self.value) if self.value == int(self.value) else self.value
        return f"{value!r}{self.unit}"


def in_steps(duration: Duration | None, steps_per_epoch: int) -> int | None:
    """A duration as optimizer steps; None for a time (which the control thread watches) or for nothing."""
    if duration is None or duration.is_time:
        return None
    return int(duration.value) * (steps_per_epoch if duration.unit == "ep" else 1)


_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand_path(path: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` filled in from the environment; `$$` is a dollar sign.

    Raises:
        ValueError: a variable isn't set.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is not None and name not in os.environ:
            hint = "which isn't set ($$ is a plain dollar sign)"
            raise ValueError(f"{path} needs the environment variable {name}, {hint}")
        return "$" if name is None else os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(fill, path))


def expand_argument(text: str) -> str:
    """An argument of a component; a path with a variable (`$DATA`, `$DATA/x`, `a/${B}`) has it filled in.

    Raises:
        ValueError: a variable isn't set.
    """
    named = next((match for match in _VARIABLE.finditer(text) if match[0] != "$$"), None)
    return expand_path(text) if named is not None and (named.start() == 0 or "/" in text) else text


_LOWER = ("loss", "error", "mae", "mse", "mape", "perplexity", "nll", "distance", "divergence")
_LOWER_WORDS = {"wer", "cer", "eer", "fid", "kid", "lpips", "ece", "brier", "ppl", "crps"}


def better_is_lower(metric: str) -> bool:
    """Whether a lower value of a metric is better, by its name, as for `mode: auto`."""
    *above, name = metric.lower().split("/")
    if {"loss", "raw_loss"} & set(above):  # one of several losses
        return True
    if name.startswith("neg_"):  # as scikit-learn turns errors into scores
        return False
    return any(part in name for part in _LOWER) or bool(_LOWER_WORDS & set(name.split("_")))


def _declare(change: str, default: Any, description: str) -> Any:
    extra: Any = {"change": change} if default is ... else {"change": change, "default": plain(default)}
    return Field(default, description=description, json_schema_extra=extra)


# What happens when the value differs from the one that a run was started with. harmless: applied, and the difference logged;
# consent: requires `checkpoint.accept_changes=true` (or another `run.name`); refused: can't change within one run.
harmless = partial(_declare, "harmless")
consent = partial(_declare, "consent")
refused = partial(_declare, "refused")

# Metrics that have names, with the component that each is short for.
METRICS: dict[str, dict[str, Any]] = {
    "accuracy": {"_target_": "dist_train.metrics.Accuracy"},
    "top5": {"_target_": "dist_train.metrics.Accuracy", "top": 5},
    "binary_accuracy": {"_target_": "dist_train.metrics.BinaryAccuracy"},
    "mae": {"_target_": "dist_train.metrics.MeanError"},
    "mse": {"_target_": "dist_train.metrics.MeanError", "power": 2},
    "rmse": {"_target_": "dist_train.metrics.MeanError", "power": 2, "root": True},
    "r2": {"_target_": "dist_train.metrics.R2"},
    "f1": {"_target_": "dist_train.metrics.F1"},
    "miou": {"_target_": "dist_train.metrics.MeanIoU"},
    "auroc": {"_target_": "dist_train.metrics.AUROC"},
    "perplexity": {"_target_": "dist_train.metrics.Perplexity"},
    "map": {"_target_": "dist_train.metrics.MAP"},
}
RECORD_FIELDS = ("time", "step", "epoch", "samples", "split")  # of every row of metrics.jsonl


def component(value: Any) -> Any:
    """A component as it is. Raises ValueError: it isn't written as one."""
    form = "write a component as {_target_: package.module.Name, argument: value, ...}"
    if isinstance(value, dict):
        if "_live_" in value:
            hint = "resume from Python with the same object, or name it by _target_"
            raise ValueError(f"this was an object made in Python ({value['_live_']}), which a file can't hold: {hint}")
        if "_target_" not in value:
            raise ValueError(f"_target_ is missing; {form}")
        if not isinstance(value["_target_"], str) and not callable(value["_target_"]):
            raise ValueError(f"_target_ must be a dotted path, found {describe(value['_target_'])}; {form}")
        if not isinstance(value.get("_args_", []), list):
            raise ValueError(f"_args_ must be a list of positional arguments, found {describe(value['_args_'])}")
    elif value is None or isinstance(value, str | bool | int | float | list):
        if isinstance(value, str) and "." in value:
            form = f"write {{_target_: {value}}}, with its arguments beside it"
        raise ValueError(f"expected a component, found {describe(value)}; {form}")
    return value


def is_named(value: Any) -> bool:
    """Whether a value holds several components by name, instead of one."""
    return isinstance(value, dict) and bool(value) and "_target_" not in value and "_live_" not in value


def _one_or_named(value: Any) -> Any:
    if isinstance(value, list):
        raise ValueError(
            "several are written by name, not as a list: {generator: {_target_: ...}, discriminator: {...}}"
        )
    if not is_named(value) or not all(isinstance(item, dict) for item in value.values()):
        return component(value)
    for name, item in value.items():
        if not re.fullmatch(r"[A-Za-z]\w*", str(name)):
            raise ValueError(f"expected a name of letters, digits and _, found {describe(name)}")
        try:
            component(item)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return value


_MOST_IN_A_LIST = 100_000  # weights: every config.yaml and manifest holds them


def _sample_weights(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value  # an array, a tensor
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list):
        return component(value)
    wrong = next((k for k, x in enumerate(value) if isinstance(x, bool) or not isinstance(x, int | float)), None)
    if wrong is not None or not value:
        found = "an empty list" if wrong is None else f"{describe(value[wrong])} for sample {wrong}"
        raise ValueError(f"expected a number for each sample, found {found}")
    if len(value) > _MOST_IN_A_LIST:
        hint = "write them into a .npy file, and give its path"
        raise ValueError(
            f"expected at most {_MOST_IN_A_LIST:,} weights in the config itself, found {len(value):,}: {hint}"
        )
    return value


COMPONENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["_target_"],
    "properties": {
        "_target_": {"type": "string", "description": "Import path of a class or function, e.g. torch.optim.SGD"},
        "_args_": {"type": "array", "description": "Positional arguments"},
    },
    "additionalProperties": True,
}
_NAMED_SCHEMA = {"anyOf": [COMPONENT_SCHEMA, {"type": "object", "additionalProperties": COMPONENT_SCHEMA}]}
_LENGTH_SCHEMA: dict[str, Any] = {
    "type": "string",
    "pattern": r"^\s*[0-9.eE+]+\s*[A-Za-z]+\s*$",
    "examples": ["20ep", "500step"],
    "errorMessage": "Expected a number and a unit, like 20ep, 500step or 10min.",  # of yaml-language-server
}
_AS_TEXT = (PlainSerializer(str, return_type=str), WithJsonSchema(_LENGTH_SCHEMA))


def _one_or_more(item: Any) -> BeforeValidator:
    return BeforeValidator(lambda v: v if isinstance(v, list) else [v], json_schema_input_type=item | list[item])


Component = Annotated[Any, BeforeValidator(component), WithJsonSchema(COMPONENT_SCHEMA)]
SampleWeights = Annotated[
    Any,
    BeforeValidator(_sample_weights),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}, COMPONENT_SCHEMA]}),
]
Optimizer = Annotated[Any, BeforeValidator(_one_or_named), WithJsonSchema(_NAMED_SCHEMA)]
Scheduler = Optimizer
Length = Annotated[Duration, BeforeValidator(Duration.parse), *_AS_TEXT]
Time = Annotated[Duration, BeforeValidator(Duration.parse_time), *_AS_TEXT]
EpochsOrSteps = Annotated[Duration, BeforeValidator(Duration.parse_count), *_AS_TEXT]
Lengths = Annotated[list[Length], _one_or_more(Length)]
Text = Annotated[str, Field(min_length=1)]
Paths = Text | list[Text]  # dotted paths into a batch
Patterns = Annotated[list[Text], _one_or_more(Text)]
# From a Python dict a name may be a number; from YAML it is text already (see `source.Node.plain`).
Name = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Numbers = Annotated[list[Number], _one_or_more(Number)]
Positives = Annotated[list[Positive], _one_or_more(Positive)]
Decay = Annotated[float, Field(gt=0, lt=1)]
Auto = Literal["auto"]


class Section(BaseModel):
    """A mapping of known keys; any other key is an error. Sections are immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


def about(section: type[Section]) -> str:
    """A section's docstring, the same on every Python: 3.13 strips the indentation at compile time."""
    return inspect.cleandoc(section.__doc__ or "")


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or None for a leaf."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def walk(section: type[Section], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a section and of the sections in it, with its field."""
    for name, field in section.model_fields.items():
        yield above + name, field
        inner = section_of(field)
        if inner is not None:
            yield from walk(inner, f"{above}{name}.")


def leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Everything in sections, dicts and lists that is none of these, or is empty, with its key."""
    value = dict(value) if isinstance(value, Section) else value
    if not isinstance(value, dict | list | tuple) or not value:
        yield key, value
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*key, name))


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of sections, dicts and lists as dicts and lists, with `change(x)` for every x that is none of these."""
    if isinstance(value, Section):
        value = dict(value)
    if isinstance(value, dict):
        return {name if type(name) is int else str(name): map_leaves(inner, change) for name, inner in value.items()}
    return [map_leaves(inner, change) for inner in value] if isinstance(value, list | tuple) else change(value)


_PLAIN = (type(None), bool, int, float, str)


def live_objects(value: Any) -> Iterator[tuple[str, Any]]:
    """Every object in a value of a config that no file can name, with its dotted key."""
    for key, leaf in leaves(value):
        if type(leaf) not in (*_PLAIN, Duration) and not isinstance(leaf, dict | list | tuple):
            yield dotted(key), leaf


def plain(value: Any) -> Any:
    """A copy of any value of a config that YAML can hold; a live object is {"_live_": its class}."""

    def change(leaf: Any) -> Any:
        if type(leaf) in (*_PLAIN, Duration):
            return str(leaf) if type(leaf) is Duration else leaf
        named = leaf if hasattr(leaf, "__qualname__") else type(leaf)
        return {"_live_": f"{named.__module__}.{named.__qualname__}"}

    return map_leaves(value, change)


def to_json(value: Any) -> Any:
    """A plain value as strict JSON, which has no inf and nan: {"_float_": "inf"}."""

    def change(leaf: Any) -> Any:
        return {"_float_": str(leaf)} if isinstance(leaf, float) and not math.isfinite(leaf) else leaf

    return map_leaves(value, change)


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, dict):
        return float(value["_float_"]) if "_float_" in value else {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value
