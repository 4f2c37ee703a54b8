"""From YAML files, `extends` and overrides to one tree of nodes, each with the place where it was written.

YAML is read by its 1.2 core rules: `1e-3` is a number, only `true` and `false` are booleans, `off` and `12:30` are
strings; what a number can't hold as it is written (`007`, `12e4567`) is a string too. A key given twice is an error.
Nothing here knows the schema, so a scalar keeps its text beside its value: see `Node.plain`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import ConfigError, Problem, describe, did_you_mean, mask
from .fields import Key, dotted, expand_path

COMMAND_LINE = "command line"
DICT = "dict"


class Place(NamedTuple):
    """Where a key was written. `rank` orders sources (a file before the overrides); line 0: the source has no lines."""

    rank: int
    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line and self.source != COMMAND_LINE else self.source


def nearest(places: Mapping[Key, Place], key: Key) -> Place:
    """Where `key`, or the nearest key that holds it, was written."""
    return next((places[key[:end]] for end in range(len(key), -1, -1) if key[:end] in places), Place(0, DICT, 0))


def as_problems(found: Iterable[tuple[Place, Key, str]]) -> list[Problem]:
    """Problems in the order of their places, each once."""
    ordered = sorted((place, dotted(key), message) for place, key, message in found)
    return list(dict.fromkeys(Problem(str(place), key, message) for place, key, message in ordered))


@dataclass(frozen=True)
class Node:
    """A value and its place. `value` is a dict of nodes, a list of nodes, or anything that is neither dict nor list."""

    value: Any
    place: Place
    text: str | None = None  # a scalar as it was written, without quotes

    def _items(self) -> Iterable[tuple[Any, Node]]:
        if type(self.value) is dict:
            return self.value.items()
        return enumerate(self.value) if type(self.value) is list else ()

    def walk(self, key: Key = ()) -> Iterator[tuple[Key, Node]]:
        """This node, whose key is `key`, and every node in it."""
        yield key, self
        for name, node in self._items():
            yield from node.walk((*key, name))

    def plain(self, is_text: Callable[[Key], bool] = lambda key: False, key: Key = ()) -> Any:
        """The value without places, in new containers; scalars of keys that hold text as they were written: 001, 1e5, #1."""
        if type(self.value) is dict:
            return {name: node.plain(is_text, (*key, name)) for name, node in self._items()}
        if type(self.value) is list:
            return [node.plain(is_text, (*key, index)) for index, node in self._items()]
        return self.value if self.text is None or not is_text(key) else self.text

    def over(self, base: Node | None) -> Node:
        """This node merged over another: mappings deeply; anything else, and the arguments of another `_target_`, replaces it."""
        if base is None or type(base.value) is not dict or type(self.value) is not dict:
            return self
        if "_target_" in self.value and self._target() != base._target():
            return self
        merged = {name: node.over(base.value.get(name)) for name, node in self._items()}
        return replace(self, value=base.value | merged)

    def put(self, key: Key, node: Node) -> Node:
        """This node with another one at `key`, which replaces what is there; the rest of a mapping or list stays.

        Raises:
            ValueError: the key is no entry of a list.
        """
        if not key:
            return node
        name, rest = key[0], key[1:]
        empty = Node({}, node.place)
        if type(self.value) is list:
            items, size = list(self.value), len(self.value)
            index = int(name) if str(name).isdigit() else size + 1
            if index > size:
                raise ValueError(f"this is a list of {size}; its entries are numbered from 0, and {size} appends one")
            items[index : index + 1] = [(items[index] if index < size else empty).put(rest, node)]
            return replace(self, value=items)
        holder = self if type(self.value) is dict else empty
        if name == "_target_" and self._target() != node.value:
            holder = empty
        return replace(holder, value=holder.value | {name: holder.value.get(name, empty).put(rest, node)})

    def _target(self) -> Any:
        return self.value["_target_"].value if type(self.value) is dict and "_target_" in self.value else None


# --- YAML ------------------------------------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_WHOLE = "(0|[1-9][0-9]*)"
_NUMBER = rf"[-+]?(\.[0-9]+|{_WHOLE}(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
# What a plain scalar may be, tried in this order, and how it is read.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": ("~|null|Null|NULL|", lambda text: None),
    "bool": ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (f"[-+]?{_WHOLE}|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10)),
    "float": (_NUMBER, lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower()))),
    "str": (r"(?s:.*)", str),
}


def _kind(text: str) -> str:
    kind = next(kind for kind, (pattern, _) in _SCALARS.items() if re.fullmatch(pattern, text))
    overflows = kind == "float" and "." not in text[:2] and math.isinf(float(text))  # not .inf itself
    return "str" if overflows else kind


class _Loader(yaml.BaseLoader):
    """PyYAML's parser with the scalar rules of YAML 1.2."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _TAG + _kind(value)
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""

    def represent_str(self, value: str) -> yaml.ScalarNode:
        # Line separators and control characters are kept only as escapes between double quotes.
        quoted = not value.isprintable() or _kind(value) != "str"
        return self.represent_scalar(_TAG + "str", value, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(data: Any) -> str:
    """Plain data as YAML that any reader, of version 1.1 or 1.2, reads back to equal data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return text


class Reader:
    """Reads files, mappings and overrides into nodes. Mistakes are collected, so that all are reported at once."""

    def __init__(self) -> None:
        self.noted: list[tuple[Place, Key, str]] = []
        self.incomplete = False  # something couldn't be read, so keys may be missing that were written

    def note(self, place: Place, key: Key, message: str) -> None:
        self.noted.append((place, key, message))

    def parse(self, text: str, start: Place, key: Key = ()) -> Node | None:
        """The content of one YAML text, whose first line is at `start`; None where its syntax is wrong."""
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError as error:
            what = getattr(error, "problem", None) or str(error).splitlines()[0]
            what = "a tab; YAML is indented by spaces" if "\\t" in what else what
            found = f" in {mask(text)!r}" if start.source == COMMAND_LINE else ""
            self.note(_at(start, getattr(error, "problem_mark", None)), key, f"this is not valid YAML: {what}{found}")
            return None
        return self._build(node, start, key, ()) if node is not None else Node(None, start)

    def _build(self, node: yaml.Node, start: Place, key: Key, above: tuple[yaml.Node, ...]) -> Node:
        place = _at(start, node.start_mark)
        tag = node.tag.removeprefix(_TAG)
        if node in above:
            self.note(place, key, "an alias (*) refers to something that contains it")
        elif isinstance(node, yaml.MappingNode) and tag == "map":
            return Node(self._mapping(node, start, key, (*above, node)), place)
        elif isinstance(node, yaml.SequenceNode) and tag == "seq":
            items = enumerate(node.value)
            return Node([self._build(item, start, (*key, i), (*above, node)) for i, item in items], place)
        elif isinstance(node, yaml.ScalarNode) and tag in _SCALARS and re.fullmatch(_SCALARS[tag][0], node.value):
            text = node.value if node.style is None and tag not in ("null", "str") else None
            return Node(_SCALARS[tag][1](node.value), place, text=text)
        else:
            tag = node.tag.replace(_TAG, "!!")
            self.note(place, key, f"unknown tag {tag}; name a Python object by _target_: package.module.Name")
        return Node(None, place)

    def _mapping(self, node: yaml.MappingNode, start: Place, key: Key, above: tuple[yaml.Node, ...]) -> dict[Any, Node]:
        result: dict[Any, Node] = {}
        for name_node, value_node in node.value:
            place = _at(start, name_node.start_mark)
            if not isinstance(name_node, yaml.ScalarNode):
                self.note(place, key, "a key must be a plain word")
                continue
            name = int(name_node.value) if _kind(name_node.value) == "int" else name_node.value
            if name in result:
                self.note(place, (*key, name), f"this key is given twice (first in line {result[name].place.line})")
                continue
            result[name] = replace(self._build(value_node, start, (*key, name), above), place=place)
        return result

    def file(self, path: str, chain: tuple[str, ...] = ()) -> Node:
        """A file, merged over everything that it extends. Messages name files as `path` does.

        Raises:
            ConfigError: the file can't be read.
        """
        start = Place(0, path, 1)
        root = self.parse(_contents(path), start)
        if root is not None and type(root.value) is dict:
            return self._over_bases(root, os.path.dirname(path), (*chain, path))
        if root is not None:
            found = "the file is empty" if root.value is None else f"found {describe(root.plain())}"
            self.note(start, (), f"expected a mapping of keys, {found}")
        self.incomplete = True
        return Node({}, start)

    def mapping(self, source: Mapping[str, Any]) -> Node:
        """A Python mapping; containers are copied, objects are not. `extends` is relative to the working directory."""
        return self._over_bases(_from_python(dict(source)), "", ())

    def _over_bases(self, root: Node, folder: str, chain: tuple[str, ...]) -> Node:
        extends = root.value.pop("extends", Node([], root.place))
        bases = [extends.value] if isinstance(extends.value, str) else extends.plain()
        merged, wrong = Node({}, root.place), list[str]()
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            wrong, bases = [f"expected a file or a list of files, found {describe(bases)}"], []
        for base in bases:
            try:
                path = os.path.normpath(os.path.join(folder, expand_path(base)))
                if any(os.path.realpath(path) == os.path.realpath(other) for other in chain):
                    raise ValueError(f"circular extends: {' -> '.join((*chain, path))}")
                merged = self.file(path, chain).over(merged)
            except ValueError as error:
                wrong.append(str(error))
            except ConfigError as error:
                wrong += [f"{problem.where}: {problem.message}" for problem in error.problems]
        self.incomplete |= bool(wrong)
        for message in wrong:
            self.note(extends.place, ("extends",), message)
        return root.over(merged)

    def overrides(self, root: Node, overrides: Sequence[str]) -> Node:
        """`a.b.c=value` merged over it in order, but a `_target_` before the arguments beside it. Values are YAML."""
        numbered = enumerate(overrides, start=1)
        for number, override in sorted(numbered, key=lambda item: not item[1].partition("=")[0].endswith("_target_")):
            place = Place(1, COMMAND_LINE, number)
            name, equals, text = override.partition("=")
            key: Key = tuple(name.strip().lstrip("-").split("."))
            try:
                if not equals or not all(key):
                    key, example = (), "write key.path=value, for example optimizer.lr=0.05"
                    raise ValueError(f"expected key=value, found {mask(override)!r}; {example}")
                node = self._override_value(text.strip(), place, key)
                root = root.put(key, node) if node is not None else root
            except ValueError as error:
                self.note(place, key, str(error))
        return root

    def _override_value(self, text: str, place: Place, key: Key) -> Node | None:
        if text.startswith(("'", '"', "!", "&")):  # by YAML's rules
            return self.parse(text, place, key)
        is_template = re.search(r"\{[\w.]+\}", text)  # such as {time}: not a YAML mapping
        node = Node(text, place) if is_template else self.parse(text, place, key)
        is_null = re.fullmatch(_SCALARS["null"][0], text or "-")
        return node if node is None or is_null else replace(node, text=text)


def _at(start: Place, mark: yaml.Mark | None) -> Place:
    return start if mark is None or start.source == COMMAND_LINE else start._replace(line=mark.line + 1)


def _contents(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = Path(path).parent
        hint = did_you_mean(path, map(str, folder.glob("*.y*ml")))
        hint = hint if folder.is_dir() else f"; there is no directory {folder.absolute()}"
        raise ConfigError.single("", f"no such file{hint}", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
        raise ConfigError.single("", f"can't be read: {reason}", where=path) from None


def _from_python(value: Any) -> Node:
    place = Place(0, DICT, 0)
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections", "types"):
        result = {key if type(key) is int else str(key): _from_python(item) for key, item in value.items()}
        target = result["_target_"].value if "_target_" in result else None
        module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "<")
        if module not in (None, "__main__") and "<" not in name:  # it can be imported again under this path
            result["_target_"] = Node(f"{module}.{name}", place)
        return Node(result, place)
    if type(value) in (list, tuple):
        return Node([_from_python(item) for item in value], place)
    if isinstance(value, os.PathLike):
        return Node(os.fspath(value), place)
    # numpy's float64, enums of strings, ... are their plain value
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return Node(value if kind is None else kind(value), place)
