"""`load_config`: from a file, a mapping or nothing to a checked `Config`, or to one error with every mistake."""

from __future__ import annotations

import functools
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from . import checks, slots
from .errors import ConfigError, describe, did_you_mean
from .fields import Key, dotted
from .schema import KEYS, Config
from .source import Reader, as_problems, nearest

DEFAULT = Path(__file__).with_name("default.yaml")


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read, merge and check a config. Neither torch nor a component is imported (see `slots.check_components`).

    Args:
        source: a YAML file; a mapping, in which any component may be a live object (kept as it is, never copied); None
            for the built-in default.
        overrides: `a.b.c=value`, as on the command line; they take precedence over the source.

    Raises:
        ConfigError: with every mistake, sorted by place.
    """
    reader = Reader()
    path = None if source is None or isinstance(source, Mapping) else os.fspath(source)
    root = reader.mapping(source) if isinstance(source, Mapping) else reader.file(path or str(DEFAULT))
    root = reader.overrides(root, overrides)
    data = root.plain(lambda key: dotted(key) in _TEXTS or dotted(key[:-1]) in _TEXTS)
    places = {key: node.place for key, node in root.walk()}
    for key, message in checks.check_values(data):
        reader.note(nearest(places, key), key, message)

    config: Config | None
    broken: list[Key] = []
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        reported = {key for _, key, _ in reader.noted}  # a key whose text is wrong needs no other message
        for key, message in list(_translate(data, error, reader.incomplete)):
            broken.append(key)
            if key not in reported:
                reader.note(nearest(places, key), key, message)
        config = _repaired(data)
    if config is not None:
        config = config.from_source(path, places, "digits" if source is None else "run")
        findings = [] if reader.incomplete else list(checks.cross_checks(config))
        if reader.noted or findings:
            findings += slots.check_sources(config)
        for key, message in findings:
            if not any(key[: len(bad)] == bad or bad[: len(key)] == key for bad in broken):
                reader.note(nearest(places, key), key, message)
    if reader.noted or config is None:
        raise ConfigError(as_problems(reader.noted))
    return config


def _kinds(annotation: Any) -> set[Any]:
    """The types and literals in an annotation."""
    inside = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
    return set().union(*map(_kinds, inside)) if inside else {annotation}


# Keys that hold text and nothing else, or a list of texts.
_TEXTS = {key for key, field in KEYS.items() if _kinds(field.annotation) - {type(None)} == {str}}


def _repaired(data: Any) -> Config | None:
    """The config with something valid in place of what is wrong, so that the other checks can run; `data` is changed."""
    tried: Counter[Key] = Counter()
    for _ in range(5):
        try:
            return Config.model_validate(data)
        except ValidationError as error:
            broken = {_key(data, item) for item in error.errors()}
        tried.update(broken)
        # First a stand-in that is valid wherever a component is; then the key is left out, then what holds it.
        keys = {key[:-1] if tried[key] > 2 or (tried[key] == 2 and type(key[-1]) is int) else key for key in broken}
        for key in sorted(filter(None, keys), key=len, reverse=True):
            holder = functools.reduce(operator.getitem, key[:-1], data)
            if tried[key] == 1:
                holder[key[-1]] = {"_target_": "builtins.object"}
            else:
                holder.pop(key[-1], None)
    return None


# --- pydantic's errors: each once, at its key, with a fix --------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": "a string that isn't empty",
    "list_type": "a list",
    "model_type": "a mapping of keys",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
}


def _translate(data: Any, error: ValidationError, incomplete: bool) -> Iterator[tuple[Key, str]]:
    by_key: dict[Key, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_key(data, item), []).append(item)
    for key, items in by_key.items():
        if isinstance(items[0]["input"], dict) and any(key == other[: len(key)] != other for other in by_key):
            continue  # a mapping is right there, and what is wrong in it is reported
        kinds = {item["type"]: item for item in items}
        if "value_error" in kinds:  # ours
            yield key, f"{kinds['value_error']['ctx']['error']}{_target(key, items[0]['input'])}"
        elif kinds.keys() & {"extra_forbidden", "invalid_key"}:
            yield key, f"unknown key{_advice(key, items[0]['input'])}"
        elif "missing" not in kinds:
            yield key, _mismatch(key, items)
        elif not incomplete:  # else it may be in the part that couldn't be read
            yield key, f"this key is required: {KEYS[dotted(key)].description}"


def _key(data: Any, item: ErrorDetails) -> Key:
    """The key that an error is about: its loc continues into the branches of unions."""
    key: Key = ()
    for part in item["loc"]:
        if str(part).startswith("dict["):  # the branch of a union that takes a mapping
            continue
        inside = part in data if type(data) is dict else type(data) is list and type(part) is int
        if not inside:
            return (*key, part) if item["type"] == "missing" and type(data) is dict else key
        key, data = (*key, part), data[part]
    return key


def _target(key: Key, value: Any) -> str:
    """What `adam`, `cross_entropy` or `StepLR` is as a component, by the JSON Schema's names; an empty string if it isn't one."""
    slot = str(key[0]) if len(key) == 1 else ""
    if not isinstance(value, str) or slot not in ("optimizer", "scheduler", "loss", "model"):
        return ""
    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    word = value.lower().replace("_", "").replace("-", "")
    for kind in schema["$defs"][slot]["properties"]["_target_"]["anyOf"]:
        for name in kind.get("enum", ()):
            if name.rpartition(".")[2].lower() in (word, f"{word}loss", f"{word}lr"):
                return f"; here {{_target_: {name}}}, on the command line {slot}._target_={name}"
    return ""


def _mismatch(key: Key, items: list[ErrorDetails]) -> str:
    """`expected X, found Y`, with a hint for common mistakes in YAML. `items` are the branches of a union."""
    value, kinds = items[0]["input"], {item["type"] for item in items}
    told = [item for item in items if item["type"] != "dict_type"] or items  # by optimizer: docs/config.md has it
    wanted = [_EXPECTED.get(item["type"], item["msg"]).format(**item.get("ctx", {})) for item in told]
    words = re.findall("'([^']*)'", " ".join(wanted)) + ["true", "false"] * ("bool_type" in kinds)
    if type(None) in get_args(KEYS[dotted(key)].annotation if dotted(key) in KEYS else None):
        wanted, words = [*wanted, "null"], [*words, "null"]
    hint = ""
    if isinstance(value, str):
        number = value.replace("_", "").replace(",", ".").strip()
        word = foreign()[1].get(value.lower())
        if kinds & {"int_type", "float_type"} and re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", number.lower()):
            hint = f"; write it as a number: {number}"
        else:
            hint = f"; write {word}" if word in words else did_you_mean(value, words)
            hint = f"; write [{value}]" if "list_type" in kinds and re.fullmatch(r"[\w.]+", value) else hint
    elif "string_type" in kinds and isinstance(value, bool | int | float):
        hint = "; put it in quotes"
    elif "string_type" in kinds and isinstance(value, dict) and None in value.values():
        hint = "; braces make a mapping in YAML: put the text in quotes"
    return f"expected {' or '.join(wanted)}, found {describe(value)}{hint}"


def _advice(key: Key, value: Any) -> str:
    """What to write instead of an unknown key."""
    name, above = str(key[-1]), dotted((*key[:-1], ""))
    if name in foreign()[0]:
        named = foreign()[0][name].replace("{key}", name)
        simple = isinstance(value, int | float | str) and not isinstance(value, bool) and str(value).strip()
        return "; " + (named.replace("{value}", str(value)) if simple else example_of(named))
    homes = [path for path in KEYS if path.rpartition(".")[2] == name]
    if homes:
        return f"; {name} belongs to another section: {homes[0]}"
    beside = [path[len(above) :] for path in KEYS if path.startswith(above) and "." not in path[len(above) :]]
    return did_you_mean(name, beside, prefix=above) or f"; the keys here are {', '.join(beside)}"


@functools.cache
def foreign() -> tuple[dict[str, str], dict[str, str]]:
    """Names that people know from other tools (foreign.yaml): the answer for each key, and the word for each value."""
    tables = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text(encoding="utf-8"))
    kinds = (tables["answers"], tables["synonyms"])
    answers, synonyms = ({name: word for word, names in kind.items() for name in names.split()} for kind in kinds)
    return answers, synonyms


def example_of(answer: str) -> str:
    """An answer of `foreign` with an example for the value."""
    answer = answer.replace("{value}ep", "20ep").replace("{value}step", "500step")
    return answer.replace("={value}", "").replace("{key}", "...")
