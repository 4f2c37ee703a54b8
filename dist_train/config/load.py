"""`load_config`: from a file, a dict or nothing to a checked `Config`, or to one error that names every mistake."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from . import checks, slots
from .errors import describe, did_you_mean
from .fields import Section, bare, choices, says, section_of
from .foreign import FOREIGN, SYNONYMS, example_of
from .schema import Config
from .source import COMMAND_LINE, DICT, Key, Tree, apply_overrides, dotted, read_file, read_mapping

DEFAULT = Path(__file__).with_name("default.yaml")


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read, merge and check a config. torch isn't imported, and no component either (see `check_components`).

    Args:
        source: a YAML file; a mapping, in which any component may be a live object (kept as it is, never copied); None
            for the built-in default.
        overrides: `a.b.c=value`, as on the command line.

    Raises:
        ConfigError: with every mistake, sorted by place.
    """
    if isinstance(source, Mapping):
        path, tree = None, read_mapping(source)
    else:
        path = None if source is None else os.fspath(source)
        tree = read_file(path if path is not None else str(DEFAULT))
    apply_overrides(tree, overrides)
    return _finish(tree, path, "digits" if source is None else "run")


def _finish(tree: Tree, path: str | None, default_name: str) -> Config:
    _rename(tree, ("data", "multiprocessing_context"), ("data", "worker_start_method"))
    config: Config | None = None
    broken: list[Key] = []
    try:
        config = Config.model_validate(tree.data)
    except ValidationError as error:
        broken = list(_translate(tree, error))
        config = _without(tree, broken)
    if config is not None:
        config = _resolve(config, tree, path, default_name)
        findings = [] if tree.incomplete else list(checks.cross_checks(config))
        if tree.problems or findings:
            findings += slots.check_sources(config)
        for key, message in findings:
            if not any(key[: len(bad)] == bad or bad[: len(key)] == key for bad in broken):
                tree.report(key, message)
    tree.raise_problems()
    assert config is not None
    return config


def _rename(tree: Tree, old: Key, new: Key) -> None:
    section = tree.data.get(str(old[0]))
    if not isinstance(section, dict) or old[1] not in section:
        return
    if new[1] in section:
        tree.report(old, f"this is another spelling of {dotted(new)}, which is given too; keep one")
        del section[old[1]]
        return
    section[new[1]] = section.pop(old[1])
    tree.places[new] = tree.places.pop(old, tree.place(old))


def _resolve(config: Config, tree: Tree, path: str | None, default_name: str) -> Config:
    """Fill in what depends on where the config came from: the run's name, and where user code is looked for."""
    base = os.path.dirname(os.path.abspath(path)) if path is not None else os.getcwd()
    name = config.run.name or (Path(path).stem if path is not None else default_name)
    paths: Sequence[str] = config.run.code_paths
    if paths:
        written = tree.place(("run", "code_paths")).source
        origin = os.getcwd() if written in (COMMAND_LINE, DICT) else os.path.dirname(os.path.abspath(written))
        paths = [os.path.normpath(os.path.join(origin, os.path.expanduser(entry))) for entry in paths]
    else:
        paths = list(dict.fromkeys([base, os.getcwd()]))
    where = {"name": name, "dir": os.path.expanduser(config.run.dir), "code_paths": paths}
    config = config.model_copy(update={"run": config.run.model_copy(update=where)})
    config._source = path
    config._places = tree.places
    return config


def _without(tree: Tree, broken: list[Key]) -> Config | None:
    """The config with its broken keys left out and missing components stood in for, so that other checks can go on."""

    absent = {"_target_": "builtins.object"}

    def copy(value: Any, key: Key) -> Any:
        if key in broken:  # only asked of what other rules look at
            return absent
        if isinstance(value, dict):
            inside = {name: (*key, name) for name in value}
            return {n: copy(value[n], k) for n, k in inside.items() if k not in broken or k == ("data", "val")}
        if isinstance(value, list):
            inside = {index: (*key, index) for index in range(len(value))}
            return [copy(value[i], k) for i, k in inside.items() if k not in broken or k[0] == "metrics"]
        return value

    for _ in range(3):
        data = copy(tree.data, ())
        if isinstance(data.setdefault("data", {}), dict):
            data["data"].setdefault("train", absent)
        for name in ("model", "optimizer", "loss"):
            data.setdefault(name, absent)
        try:
            return Config.model_validate(data)
        except ValidationError as error:  # a key that is missing can't be left out: leave out what lacks it
            broken = broken + [_find(item["loc"])[0][:-1] for item in error.errors()]
            if () in broken:
                return None
    return None


# --- pydantic's errors in the words of this project ------------------------------------------------------------------


def _translate(tree: Tree, error: ValidationError) -> Iterator[Key]:
    """Note each mistake once, at its key; yields the keys that are wrong."""
    known = {name for _, name, _ in tree.problems}
    seen: set[Key] = set()
    for item in sorted(error.errors(include_url=False), key=lambda item: item["type"] != "value_error"):
        key, annotation, section = _find(item["loc"])
        if key in seen:
            continue  # the other branches of a union
        seen.add(key)
        if dotted(key) in known or (item["type"] == "missing" and tree.incomplete):
            pass  # what was wrong with its text has been said; or it may be in the part that couldn't be read
        elif item["type"] in ("extra_forbidden", "invalid_key"):
            tree.report(key, f"unknown key{_advice(key, item['input'], section)}")
        elif item["type"] == "missing":
            tree.report(key, f"this key is missing; give it {says(annotation)}")
        elif item["type"] == "value_error":
            tree.report(key, str(item["ctx"]["error"]))
        else:
            tree.report(key, mismatch(annotation, _at(tree.data, key)))
        yield key


def mismatch(annotation: Any, value: Any) -> str:
    """`expected X, found Y`, with a hint for the slips that YAML invites."""
    expected, words = says(annotation), choices(annotation)
    hint = ""
    if isinstance(value, str):
        text, lower = value.strip().replace("_", ""), value.lower()
        if "number" in expected and text.count(",") == 1 and text.replace(",", "").lstrip("+-").isdigit():
            hint = f"; the decimal sign is a point: {text.replace(',', '.')}"
        elif "number" in expected and _is_number(text):
            hint = f"; write it without quotes or underscores: {text}"
        elif "true" in words and lower in ("yes", "no", "on", "off", "y", "n"):
            hint = f"; write {'true' if lower in ('yes', 'on', 'y') else 'false'}"
        elif lower in ("none", "nil") and "null" in words:
            hint = "; write null"
        elif SYNONYMS.get(lower) in words:
            hint = f"; write {SYNONYMS[lower]}"
        else:
            hint = did_you_mean(value, words)
    elif isinstance(value, dict) and "a string" in expected and None in value.values():
        hint = "; braces make a mapping in YAML: put the text in quotes"
    elif isinstance(value, bool | int | float) and "a string" in expected:
        hint = "; put it in quotes"
    return f"expected {expected}, found {describe(value)}{hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _find(loc: tuple[int | str, ...]) -> tuple[Key, Any, type[Section]]:
    """The key that an error is about (its loc goes on into union branches), its annotation and its section."""
    section: type[Section] = Config
    annotation: Any = Config
    key: Key = ()
    for part in loc:
        model = section_of(annotation)
        if model is not None:
            section = model
            key = (*key, part)
            known = model.model_fields.get(str(part))
            if known is None:
                break
            annotation = known.rebuild_annotation()
        elif isinstance(part, int) and _item_of(annotation) is not None:
            key, annotation = (*key, part), _item_of(annotation)
        else:
            break
    return key, annotation, section


def _item_of(annotation: Any) -> Any:
    annotation = bare(annotation)[0]
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else None


def _at(data: Any, key: Key) -> Any:
    for part in key:
        if type(data) not in (dict, list):
            break  # the short form of a section, as in `head: 10`
        data = data[part]
    return data


def _advice(key: Key, value: Any, section: type[Section]) -> str:
    """What to write instead of an unknown key."""
    name = str(key[-1])
    if name in FOREIGN:
        named = FOREIGN[name].replace("{key}", name)
        simple = isinstance(value, int | float | str) and not isinstance(value, bool) and str(value).strip()
        return "; " + (named.replace("{value}", str(value)) if simple else example_of(named))
    homes = [path for path in _leaves(Config, ()) if path[-1] == name]
    if homes:
        return f"; {name} belongs to another section: {'.'.join(homes[0])}"
    near = did_you_mean(name, section.model_fields, prefix="".join(f"{part}." for part in key[:-1]))
    return near or f"; the keys here are {', '.join(section.model_fields)}"


def _leaves(section: type[Section], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, known in section.model_fields.items():
        inner = section_of(known.annotation)
        if inner is not None:
            yield from _leaves(inner, (*above, name))
        yield (*above, name)
