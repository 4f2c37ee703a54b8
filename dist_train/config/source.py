"""From YAML files, `extends` and overrides to one plain tree in which the place of every key is known.

YAML is read by its 1.2 core rules: `1e-3` is a number, only `true` and `false` are booleans, `off` and `12:30` are
strings. A key given twice is an error. Nothing here knows the schema.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import ConfigError, Problem, describe, did_you_mean

Key = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a key was written. `rank` orders sources (a file before the overrides); line 0: the source has no lines."""

    rank: int
    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line and self.source != COMMAND_LINE else self.source


COMMAND_LINE = "command line"
DICT = "dict"


def dotted(key: Key) -> str:
    """The key as it is written on a command line."""
    return ".".join(str(part) for part in key)


def nearest(places: Mapping[Key, Place], key: Key) -> Place:
    """Where `key`, or the nearest thing that holds it, was written."""
    for end in range(len(key), -1, -1):
        if key[:end] in places:
            return places[key[:end]]
    return Place(0, DICT, 0)


@dataclass
class Tree:
    """Plain data and the place of each of its keys; `problems` collects what was wrong on the way."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[tuple[Place, str, str]] = field(default_factory=list)
    incomplete: bool = False  # something couldn't be read, so keys may be missing that were written

    def place(self, key: Key) -> Place:
        """Where `key`, or the nearest thing that holds it, was written."""
        return nearest(self.places, key)

    def report(self, key: Key, message: str) -> None:
        """Note a problem with a key."""
        self.problems.append((self.place(key), dotted(key), message))

    def drop(self, key: Key) -> None:
        """Forget the places of a key and of all below it."""
        for other in [other for other in self.places if other[: len(key)] == key]:
            del self.places[other]

    def raise_problems(self) -> None:
        """Raises ConfigError with everything that was noted, by place."""
        if self.problems:
            raise ConfigError(as_problems(self.problems))


def as_problems(noted: Sequence[tuple[Place, str, str]]) -> list[Problem]:
    """Problems in the order of their places, each once."""
    return list(dict.fromkeys(Problem(str(place), key, message) for place, key, message in sorted(noted)))


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalar rules of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))


def _scalar(tag: str, text: str) -> Any:
    kind = tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if kind == "float":
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


class _Builder:
    """Plain data from YAML nodes; notes the place of every key and list item."""

    def __init__(self, tree: Tree, rank: int, source: str) -> None:
        self.tree, self.rank, self.source = tree, rank, source

    def note(self, key: Key, node: yaml.Node, message: str) -> None:
        place = Place(self.rank, self.source, node.start_mark.line + 1)
        self.tree.problems.append((place, dotted(key), message))

    def build(self, node: yaml.Node, key: Key, above: tuple[yaml.Node, ...] = ()) -> Any:
        if node in above:
            self.note(key, node, "an alias (*) refers to something that contains it")
            return None
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.note(key, node, f"the tag {tag} isn't known; name a Python object by _target_: package.module.Name")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.tree.places[(*key, index)] = Place(self.rank, self.source, item.start_mark.line + 1)
                items.append(self.build(item, (*key, index), (*above, node)))
            return items
        return _scalar(node.tag, node.value)

    def mapping(self, node: yaml.MappingNode, key: Key, above: tuple[yaml.Node, ...]) -> dict[str | int, Any]:
        result: dict[str | int, Any] = {}
        lines: dict[str | int, int] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self.note(key, name_node, "a key must be a plain word")
                continue
            name = _scalar(name_node.tag, name_node.value) if name_node.tag.endswith(":int") else name_node.value
            if name in result:
                self.note((*key, name), name_node, f"this key is given twice (first in line {lines[name]})")
                continue
            lines[name] = name_node.start_mark.line + 1
            self.tree.places[(*key, name)] = Place(self.rank, self.source, lines[name])
            result[name] = self.build(value_node, (*key, name), above)
        return result


def _parse(text: str, rank: int, source: str) -> tuple[Any, Tree]:
    """The content of one YAML text, with its places; a mistake in its grammar becomes a problem."""
    tree = Tree(places={(): Place(rank, source, 1)})
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        if "\\t" in what:
            what = "a tab; YAML is indented by spaces"
        tree.problems.append((Place(rank, source, line), "", f"this is not valid YAML: {what}"))
        return None, tree
    return (None if node is None else _Builder(tree, rank, source).build(node, ())), tree


# --- files -----------------------------------------------------------------------------------------------------------


def read_file(path: str, chain: tuple[str, ...] = ()) -> Tree:
    """A file with everything that it extends. Messages name files as `path` does.

    Raises:
        ConfigError: the file can't be read; what else is wrong is in the tree's problems.
    """
    text = _read_text(path)
    content, tree = _parse(text, 0, path)
    if not isinstance(content, dict):
        if not tree.problems:
            found = "the file is empty" if content is None else f"found {describe(content)}"
            tree.report((), f"expected a mapping of keys, {found}")
        tree.incomplete = True
        return tree
    tree.data = content
    return _with_bases(tree, os.path.dirname(path), (*chain, path))


def _with_bases(tree: Tree, folder: str, chain: tuple[str, ...]) -> Tree:
    """The tree, laid over what it extends."""
    bases, key = tree.data.pop("extends", []), ("extends",)
    bases = [bases] if isinstance(bases, str) else bases
    merged = Tree(places={(): tree.place(())})
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        tree.report(key, f"expected a file or a list of files, found {describe(bases)}")
        tree.incomplete, bases = True, []
    for base in bases:
        path = os.path.normpath(os.path.join(folder, base))
        if any(os.path.realpath(path) == os.path.realpath(other) for other in chain):
            tree.report(key, "files extend each other in a circle: " + " -> ".join((*chain, path)))
            tree.incomplete = True
            continue
        try:
            merge(merged, read_file(path, chain))
        except ConfigError as error:
            for problem in error.problems:
                tree.report(key, f"{problem.where}: {problem.message}")
            tree.incomplete = True
    tree.drop(key)
    merge(merged, tree)
    return merged


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        names = (
            [name for name in os.listdir(folder) if name.endswith((".yaml", ".yml"))] if os.path.isdir(folder) else []
        )
        if not os.path.isdir(folder):
            hint = f"; there is no directory {folder} in {os.getcwd()}" if not os.path.isabs(folder) else ""
        else:
            hint = did_you_mean(os.path.basename(path), names, prefix=folder + os.sep if folder != "." else "")
        raise ConfigError([Problem(path, "", f"no such file{hint}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
        raise ConfigError([Problem(path, "", f"can't be read: {reason}")]) from None


def merge(below: Tree, above: Tree) -> None:
    """Lay `above` over `below`, in place: mappings deeply, all else is replaced.

    Another `_target_` drops the arguments of the old one.
    """
    below.problems += above.problems
    below.incomplete |= above.incomplete
    below.places[()] = above.place(())
    _merge(below, above, below.data, above.data, ())


def _merge(below: Tree, above: Tree, old: dict[str, Any], new: dict[str, Any], key: Key) -> None:
    for name, value in new.items():
        here = (*key, name)
        current = old.get(name)
        if isinstance(current, dict) and isinstance(value, dict) and _same_target(current, value):
            below.places[here] = above.place(here)
            _merge(below, above, current, value, here)
            continue
        below.drop(here)
        below.places.update({other: place for other, place in above.places.items() if other[: len(here)] == here})
        old[name] = value


def _same_target(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "_target_" not in new or old.get("_target_") == new["_target_"]


# --- Python dicts and overrides --------------------------------------------------------------------------------------


def read_mapping(source: Mapping[str, Any]) -> Tree:
    """A tree of a Python mapping; containers are new, all else is the same object. `extends` counts from the cwd."""
    place = Place(0, DICT, 0)
    tree = Tree(_containers(source), {(): place})
    return _with_bases(tree, "", ())


def _containers(value: Any) -> Any:
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections", "types"):
        result = {key if type(key) is int else str(key): _containers(item) for key, item in value.items()}
        if "_target_" in result:
            result["_target_"] = _import_path(result["_target_"])
        return result
    if type(value) in (list, tuple):
        return [_containers(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for kind in (bool, int, float, str):  # numpy's float64, enums of strings, ... say the same as the plain value
        if isinstance(value, kind):
            return kind(value)
    return value


def _import_path(target: Any) -> Any:
    """The dotted path of a class or function that can be imported again under it; anything else as it is."""
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    if isinstance(target, str) or module in (None, "__main__") or "<" in name or not name:
        return target
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is target else target


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> None:
    """Set `a.b.c=value` keys in order, but a `_target_` before the arguments beside it. Values are YAML."""
    order = sorted(
        enumerate(overrides, start=1), key=lambda item: item[1].partition("=")[0].endswith("_target_") is False
    )
    for number, override in order:
        place = Place(1, COMMAND_LINE, number)
        name, equals, text = override.partition("=")
        name = name.strip().lstrip("-")
        if not equals or not name or not all(name.split(".")):
            hint = (
                f"write {name}=value" if name and not equals else "write key.path=value, for example optimizer.lr=0.05"
            )
            tree.problems.append((place, "", f"expected key=value, found {override!r}; {hint}"))
            continue
        key: Key = tuple(name.split("."))
        if re.search(r"\{[\w.]+\}", text):  # a template such as {time}, not a YAML mapping
            value, parsed = text, Tree()
        else:
            value, parsed = _parse(text, 1, COMMAND_LINE)
        if parsed.problems:
            tree.problems += [(place, dotted(key), f"{message} in {text!r}") for _, _, message in parsed.problems]
            continue
        _assign(tree, key, value, place)


def _assign(tree: Tree, key: Key, value: Any, place: Place) -> None:
    holder: Any = tree.data
    walked: Key = ()
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(holder, list):
            index = int(part) if str(part).isdigit() else None
            if index is None or index > len(holder) or (index == len(holder) and not last):
                entries = f"a list of {len(holder)}; its entries are numbered from 0, and {len(holder)} appends one"
                tree.problems.append((place, dotted(key), f"{dotted(walked)} is {entries}"))
                return
            if index == len(holder):
                holder.append(None)
            part = index
        elif not isinstance(holder, dict):
            tree.problems.append((place, dotted(key), f"{dotted(walked)} is {describe(holder)}, it has no key {part}"))
            return
        walked = (*walked, part)
        if last:
            if part == "_target_" and isinstance(holder, dict) and holder.get("_target_", value) != value:
                tree.drop(walked[:-1])
                tree.places[walked[:-1]] = place
                holder.clear()
            tree.drop(walked)
            tree.places[walked] = place
            holder[part] = value
            return
        below = holder.get(part) if isinstance(holder, dict) else holder[int(part)]
        if below is None:
            below = holder[part] = {}
            tree.places[walked] = place
        holder = below


class _Dumper(yaml.SafeDumper):
    """Writes what reads the same by YAML 1.1 and 1.2: strings that either takes for something else are quoted."""

    _both = (yaml.SafeDumper.yaml_implicit_resolvers, _Loader.yaml_implicit_resolvers)
    yaml_implicit_resolvers = {
        first: old.get(first, []) + new.get(first, []) for old, new in [_both] for first in {*old, *new}
    }


def _write_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value).replace("inf", ".inf").replace("nan", ".nan")
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _write_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # Line separators and control characters survive only as escapes between double quotes.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _write_float)
_Dumper.add_representer(str, _write_text)


def dump(data: Any) -> str:
    """Plain data as YAML that any reader, of version 1.1 or 1.2, reads back to equal data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return text
