"""The JSON Schema of a config file, for editors: the keys by `config/schema.py`, and what `_target_` can name with its arguments.

Arguments, defaults and descriptions are those of the signatures and docstrings of the installed torch and of this package. Names
outside the lists stay allowed, and so does whatever the loader leaves to the target itself: an editor marks nothing that trains.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from dist_train.config import components
from dist_train.config.fields import METRICS
from dist_train.config.metrics import _RESERVED_SCHEMA as METRIC_KEYS
from dist_train.config.schema import Config
from dist_train.config.slots import SLOTS

Schema = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of components.

    Attributes:
        slot: a key of `SLOTS` that takes them. modules: where they are listed. pattern: of their names. functions: whether
            functions are meant as well as classes.
    """

    slot: str
    modules: tuple[str, ...]
    pattern: str = r"[A-Z]\w*"
    functions: bool = False


KINDS = {
    "dataset": Kind("data.train", ("dist_train.data",)),
    "augment": Kind("data.augment", ("dist_train.data",)),
    "collate": Kind("data.collate", ("dist_train.data",), "collate_.*", functions=True),
    "model": Kind("model", ("dist_train.models",), r"\w+", functions=True),
    "init": Kind("model_init", ("torch.nn.init",), r"[a-z]\w*[a-z]_", functions=True),
    "task": Kind("task", ("dist_train.tasks",)),
    "loss": Kind("loss", ("torch.nn",), r"\w+Loss"),
    "metric": Kind("metrics", ("dist_train.metrics",)),
    "optimizer": Kind("optimizer", ("torch.optim",)),
    "scheduler": Kind("scheduler", ("torch.optim.lr_scheduler", "dist_train.schedules")),
    "callback": Kind("callbacks", ("dist_train.callbacks",)),
}
# Base classes, and what isn't called with (output, target) or isn't a component.
NOT_LISTED = {
    "AdaptiveLogSoftmaxWithLoss", "Augment", "Callback", "Draws", "LRScheduler", "Metric", "Optimizer", "StepOutput", "Task",
    "Training",
}  # fmt: skip
PLACES = {  # keys of the config, by the kind of components that they hold
    "dataset": ("data.train", "data.val", "data.test"),
    "augment": ("data.augment",),
    "collate": ("data.collate",),
    "model": ("model",),
    "init": ("model_init",),
    "task": ("task",),
    "loss": ("loss", "val_loss"),
    "metric": ("metrics",),
    "optimizer": ("optimizer",),
    "scheduler": ("scheduler",),
    "callback": ("callbacks",),
}
# Arguments that are components themselves.
NESTED = {"dataset": "dataset", "augments": "augment", "schedulers": "scheduler", "teacher": "model"}
_NUMBERS = {"int": "number", "float": "number", "complex": "number", "Tensor": "number", "bool": "boolean"}
_DURATION = {"type": "string", "pattern": r"^\s*[0-9.eE+]+\s*[A-Za-z]+\s*$"}
_COUNT = {"type": "string", "pattern": r"^(total_steps|steps_per_epoch|(total_steps\s*-)?\s*\d+\s*(ep|step))$"}
_PATTERNS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_MATCH = {**_PATTERNS, "description": "A pattern, or a list of patterns, of parameters' names, modules or classes."}
_NDIM = {"type": "integer", "minimum": 1, "description": "Parameters with fewer dimensions: 2 for biases and norms."}

# The reserved keys beside `_target_`: what they are is said in config/schema.py, of `optimizer` and `scheduler`.
OWN: dict[str, dict[str, Schema]] = {
    "optimizer": {
        "groups": {
            "type": "array",
            "items": {"type": "object", "properties": {"match": _MATCH, "ndim_below": _NDIM}},
            "description": "Parameters with options of their own: {match: 'head.*', lr: 0.1}, {ndim_below: 2, weight_decay: 0}. "
            "A parameter is in the first group that matches it.",
        },
        "layer_decay": {
            "type": "number",
            "description": "The lr of each layer is that of the next one times this (BEiT, MAE: 0.75).",
        },
        "match": {**_MATCH, "description": "Of several optimizers by name: the parameters that this one gets first."},
        "named_parameters": {"type": "boolean", "description": "Pass (name, parameter) pairs."},
    },
    "scheduler": {
        "every": {
            **_DURATION,
            "examples": ["1step", "1ep"],
            "description": "How often it is stepped: 1step, 1ep. By default 1step for OneCycleLR, CyclicLR, WarmupCosine and "
            "those of transformers, else 1ep. `total_steps` and durations among the arguments are counted in it.",
        },
        "metric": {
            "type": "string",
            "description": "What ReduceLROnPlateau monitors: val/loss, say. By default that of checkpoint.keep_best.",
        },
        "horizon": {
            **_DURATION,
            "description": "The duration that `total_steps` counts. By default trainer.duration at the first start.",
        },
        "warmup": {
            "anyOf": [
                _DURATION,
                {
                    "type": "object",
                    "properties": {"duration": _DURATION, "from": {"type": "number"}},
                    "required": ["duration"],
                    "additionalProperties": False,
                },
            ],
            "description": "500step, 2ep, or {duration: 500step, from: 0.01}: the lr first rises linearly, each step; then the "
            "scheduler begins.",
        },
    },
    "metric": METRIC_KEYS,
    "init": {"match": {**_MATCH, "description": "A pattern, or a list of patterns, of the parameters to fill."}},
}
_TARGET_TEXT = (
    "Import path of a class or function; its arguments stand beside it. Your own: module.Name, beside the config."
)
_ARGS = {"type": "array", "description": "Positional arguments"}


def json_schema() -> Schema:
    """Draft 2020-12, with every key described."""
    schema = Config.model_json_schema()
    made_with = f"Components are those of torch {torch.__version__.partition('+')[0]}."
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": made_with, **schema}
    schema["title"] = "dist_train config"
    schema["properties"] = {
        "extends": {
            "description": "A config file, or several, over which this one is merged; relative to this file.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        **schema["properties"],
    }
    # With `extends`, every key may be in the base: what a file alone must have is checked in one without it.
    schema |= {"if": {"not": {"required": ["extends"]}}, "then": {"properties": _required_alone()}}
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
        part["properties"] = {name: _with_text(value) for name, value in part["properties"].items()}
    for kind, keys in PLACES.items():
        for key in keys:
            properties = (schema["$defs"]["DataConfig"] if key.startswith("data.") else schema)["properties"]
            name = key.rpartition(".")[2]
            properties[name] = _referring(properties[name], kind)
    for kind in KINDS:
        schema["$defs"] |= component_definitions(kind)
    return schema


def _with_text(value: Schema) -> Schema:
    """Keys that hold text take what looks like a number as it is written: `run.name: 001`."""
    if value.get("type") == "string" and not {"enum", "const", "pattern"} & value.keys():
        return {**value, "type": ["string", "number", "boolean"]}
    parts = {name: _with_text(value[name]) for name in ("items",) if isinstance(value.get(name), dict)}
    parts |= {"anyOf": [_with_text(item) for item in value["anyOf"]]} if "anyOf" in value else {}
    return {**value, **parts}


def _required_alone() -> Schema:
    """The required keys of sections, and `_target_` of components that are not several by name."""
    component: Schema = {"required": ["_target_"]}
    sections = {
        "data": {"train": component, "val": component, "test": component, "normalize": {"required": ["mean", "std"]}},
        "trainer": {"stop_when": {"required": ["metric"]}, "profile": {"required": ["steps"]}},
        "transfer": {"head": {"required": ["classes"]}, "append": {"required": ["at", "name", "module"]}},
        "tracking": {"wandb": {"required": ["project"]}},
    }
    alone = dict.fromkeys(("model", "task", "loss", "val_loss"), component)
    return {**alone, **{name: {"properties": parts} for name, parts in sections.items()}}


def _referring(value: Any, kind: str) -> Any:
    """The schema of a key, with a reference to a kind in place of a component, or of what else the key holds of this kind."""
    if isinstance(value, list):
        return [_referring(item, kind) for item in value]
    if not isinstance(value, dict):
        return value
    about = {name: value[name] for name in ("title", "description", "change", "default") if name in value}
    if "_target_" in value.get("properties", {}):
        return {**about, "$ref": f"#/$defs/{kind}"}
    if kind in ("optimizer", "scheduler"):  # one, or several by name
        one = {"$ref": f"#/$defs/{kind}"}
        several = {"properties": {"_target_": {}}, "additionalProperties": {"if": {"type": "object"}, "then": one}}
        return {**about, "type": ["object", "null"], "if": {"required": ["_target_"]}, "then": one, "else": several}
    if kind == "metric" and "items" in value:
        return {**about, "type": "array", "items": _metric_entry()}
    return {name: _referring(item, kind) for name, item in value.items()}


def _metric_entry() -> Schema:
    """An entry of `metrics`: a name, a component, or one of these as `metric` beside the reserved keys."""
    names = {"type": "string", "enum": list(METRICS)}
    inner = {"if": {"type": "object"}, "then": {"$ref": "#/$defs/metric"}, "else": names}
    whole = {
        "type": "object",
        "properties": {"metric": inner, **METRIC_KEYS},
        "if": {"type": "object", "required": ["metric"]},
        "then": {"allOf": [*map(_short_metric, METRICS)]},
        "else": {"$ref": "#/$defs/metric"},
    }
    return {"anyOf": [names, whole]}


def component_definitions(kind: str) -> dict[str, Schema]:
    """The definition of a kind, and one of each target that it lists: `optimizer`, `torch.optim.SGD`, ..."""
    listed = targets(kind)
    own = OWN.get(kind, {})
    definitions = {path: _definition(kind, path, target) for path, target in listed.items()}
    names = {
        "enum": list(listed),
        "enumDescriptions": [definitions[path]["description"] for path in listed],
    }
    whole: Schema = {
        "type": "object",
        "properties": {
            "_target_": {"description": _TARGET_TEXT, "anyOf": [names, {"type": "string"}]},
            "_args_": _ARGS,
            **own,
        },
        "allOf": [
            {
                "if": {"properties": {"_target_": {"const": path}}, "required": ["_target_"]},
                "then": {"$ref": f"#/$defs/{path}"},
            }
            for path in listed
        ],
    }
    return {kind: whole, **definitions}


def targets(kind: str) -> dict[str, Any]:
    """What a kind lists, by import path."""
    about = KINDS[kind]
    fits = SLOTS[about.slot].fits
    found = {}
    for module in map(components.locate, about.modules):
        for name in getattr(module, "__all__", None) or dir(module):
            target = getattr(module, name)
            fitting = fits(target) if isinstance(target, type) else about.functions and inspect.isfunction(target)
            if fitting and name not in NOT_LISTED and re.fullmatch(about.pattern, name):
                found[f"{module.__name__}.{name}"] = target
    return dict(sorted(found.items()))


def _definition(kind: str, path: str, target: Any) -> Schema:
    """A target's arguments, each with its description and default; no others, unless it takes any."""
    slot, form = SLOTS[KINDS[kind].slot], components.signature(target)
    assert form is not None, path
    summary, texts = documentation(target)
    parameters = [p for p in form.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in parameters]
    given = {
        name if name in names else names[0] for name in slot.gives
    }  # by name, else as the first: see slots._arguments
    parameters = [p for p in parameters if p.name not in given and p.name not in slot.own]
    arguments = {p.name: _argument(kind, p, texts.get(p.name, "")) for p in parameters}
    own = _own_of(kind, path, arguments)
    definition: Schema = {"description": summary, "properties": {"_target_": {}, "_args_": {}, **arguments, **own}}
    if all(p.kind is not p.VAR_KEYWORD for p in form.parameters.values()):
        definition["additionalProperties"] = False
    return definition


def _own_of(kind: str, path: str, arguments: dict[str, Schema]) -> dict[str, Schema]:
    """The reserved keys, beside a target's arguments: described by the kind itself, but for the options of groups."""
    own: dict[str, Schema] = {name: {} for name in OWN.get(kind, {})}
    if "groups" in own:
        options = {name: {"$ref": f"#/$defs/{path}/properties/{name}"} for name in arguments}
        own["groups"] = {
            "items": {"properties": {"match": {}, "ndim_below": {}, **options}, "additionalProperties": False}
        }
    return own


def _argument(kind: str, parameter: inspect.Parameter, text: str) -> Schema:
    """The schema of an argument: what the loader itself would refuse (`slots._value`), and the choices of a Literal."""
    schema: Schema = {}
    names = components.type_names(parameter.annotation) - {"None", "NoneType"}
    if parameter.name in NESTED:
        one = {"if": {"type": "object"}, "then": {"$ref": f"#/$defs/{NESTED[parameter.name]}"}}
        schema = {"if": {"type": "array"}, "then": {"items": one}, "else": one}
    elif (choices := _choices(parameter.annotation)) is not None:
        schema = {"anyOf": [{"enum": choices}, {"type": ["object", "null"]}]}
    elif names and names <= _NUMBERS.keys():
        # A component may stand for any value, a list for a tensor; null removes a value of a base.
        kinds = sorted({_NUMBERS[name] for name in names} | {"number"})
        schema = {"type": [*kinds, *["array"] * ("Tensor" in names), "object", "null"]}
        if kind == "scheduler":
            schema = {"anyOf": [schema, {"enum": ["total_steps", "steps_per_epoch"]}, _COUNT]}
    elif names == {"str"}:
        schema = {"type": ["string", "object", "null"]}
    default = parameter.default
    if default is not parameter.empty and default is not None and _plain(default):
        schema["default"] = default
    head = (
        inspect.formatannotation(parameter.annotation).strip("'") if parameter.annotation is not parameter.empty else ""
    )
    head = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", head)  # torch._tensor.Tensor as Tensor
    shown = f"{head}, required" if default is parameter.empty else f"{head} = {default}"
    schema["description"] = f"({shown.removeprefix(', ').removeprefix(' = ')}) {text}".strip()
    return schema


def _plain(value: Any) -> bool:
    """Whether JSON has it."""
    if isinstance(value, float) and value not in (float("inf"), float("-inf")):
        return value == value
    return isinstance(value, bool | int | str)


def _choices(annotation: Any) -> list[Any] | None:
    found = re.fullmatch(
        r"(?:typing\.)?Literal(\[.*\])", annotation if isinstance(annotation, str) else str(annotation)
    )
    return list(ast.literal_eval(found[1])) if found else None


def _short_metric(name: str) -> Schema:
    """`{metric: accuracy, top: 3}`: the arguments of the class that the name is short for."""
    path = METRICS[name]["_target_"]
    form = components.signature(components.locate(path))
    options = {option: {"$ref": f"#/$defs/{path}/properties/{option}"} for option in (form.parameters if form else ())}
    properties = {"metric": {}, "name": {}, "of": {}, **options}
    return {
        "if": {"type": "object", "properties": {"metric": {"const": name}}, "required": ["metric"]},
        "then": {"properties": properties, "additionalProperties": False},
    }


def documentation(target: Any) -> tuple[str, dict[str, str]]:
    """The first paragraph of a docstring, and the text of each argument in its section `Args:` (Google's style)."""
    text = inspect.cleandoc(target.__doc__ or "")
    if isinstance(target, type) and "Args:" not in text:
        text += "\n\n" + inspect.cleandoc(target.__init__.__doc__ or "")
    arguments: dict[str, str] = {}
    _, _, section = text.partition("Args:\n")
    for entry in re.split(r"\n(?=    \S)", re.split(r"\n(?=\S)", section)[0]):
        names, found, said = entry.strip().partition(":")
        for name in re.sub(r" \(.*", "", names, flags=re.S).split(",") if found else ():
            arguments[name.strip(" *`")] = _prose(
                re.sub(r"^.*?\)\s*:", "", entry, flags=re.S) if "(" in names else said
            )
    return _prose(re.split(r"\n\s*\n", text)[0]), arguments


def _prose(text: str, most: int = 240) -> str:
    """One line of plain text from reStructuredText, at most `most` characters long."""
    text = re.sub(r":\w+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"`\1`", text.replace("``", "`"))
    text = " ".join(re.sub(r"\.\. \w+::.*", "", text, flags=re.S).split())
    text = re.sub(r"\s*\(?[Dd]efaults?:? .*?\)?\.?$", "", text) if len(text) < most else text
    return text if len(text) <= most else text[: text.rindex(" ", 0, most - 3)] + " ..."


def to_text() -> str:
    """schema.json: a line for each key, and for each definition."""
    schema = json_schema()
    held = {name: schema[name] for name in ("properties", "$defs")}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in schema.items() if name not in held]
    for name, parts in held.items():
        inner = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items())
        lines.append(f"{json.dumps(name)}: {{\n  {inner}\n }}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"
