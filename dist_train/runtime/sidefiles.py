"""Reading the files beside a run's checkpoints: anybody may have edited, truncated or replaced them, so all is checked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from dist_train.runtime.storage import Storage
from dist_train.tracking.records import parse_line

# Bytes, where it isn't 64 MiB: records may grow without limit, and PyYAML takes 10 s for a MiB.
_MOST: dict[str, int | None] = {"metrics.jsonl": None, "config.yaml": 4 << 20}
_NESTED = 2000  # marks that may nest, in YAML that libyaml is given
_NUMBER = (int, float)
# The fields that readers rely on. Others may be missing or of any type.
_FIELDS: dict[str, dict[str, Any]] = {
    "status.json": {"state": str, "step": int, "epoch": int},
    "result.json": {"state": str, "reason": str, "step": int, "epoch": int, "kept_step": int, "world_size": int}
    | {"metrics": dict, "seconds": _NUMBER, "weights_sha256": str},
    "attempts.jsonl": {"event": str},
    "metrics.jsonl": {"step": int, "split": str},
    "micro_batches.json": {"micro_batch_size": int},
}
_TYPES = {str: "text", int: "a whole number", dict: "a mapping", _NUMBER: "a number"}


class SideFileError(Exception):
    """A file of a run without the content that it should have; the message names it and says what is wrong."""


def read_mapping(storage: Storage, name: str, *, whole: bool = True) -> dict[str, Any] | None:
    """The content of a JSON file, or of a YAML file by its name; None if it doesn't exist.

    If `whole`, it must have all the fields that resuming relies on; else only those that it has are checked.
    Raises SideFileError if it isn't a file or not a mapping, or has a field of another type.
    """
    raw = read_whole(storage, name)
    if raw is None:
        return None
    content = _parsed(storage.join(name), lambda: _yaml(raw) if name.endswith(".yaml") else json.loads(raw))
    return _checked(storage, name, content, whole)


def read_lines(storage: Storage, name: str) -> tuple[list[dict[str, Any]], str]:
    """The mappings in a JSONL file without torn lines, and what is wrong with the other lines ("" if nothing)."""
    rows, wrong = [], ""
    try:
        lines = (read_whole(storage, name) or b"").split(b"\n")
    except SideFileError as error:
        return [], str(error)
    for number, line in enumerate(lines, 1):
        try:
            if (row := _parsed(storage.join(name), lambda line=line: parse_line(line))) is not None:  # type: ignore[misc]
                rows.append(_checked(storage, name, row))
        except SideFileError as error:
            wrong = wrong or f"{error} (line {number})"
    return rows, wrong


def problems(storage: Storage) -> list[tuple[str, str]]:
    """Name and problem of each of a run's side files that can't be read."""
    found = []
    for name in ("config.yaml", *_FIELDS):
        try:
            wrong = read_lines(storage, name)[1] if name.endswith(".jsonl") else read_mapping(storage, name) and ""
        except SideFileError as error:
            wrong = str(error)
        if wrong:
            found.append((name, wrong.removeprefix(f"{storage.join(name)}: ")))
    return found


def read_whole(storage: Storage, name: str) -> bytes | None:
    """The bytes of a file; None if it doesn't exist. Raises SideFileError where it isn't one."""
    try:
        return storage.read_bytes(name, most=_MOST.get(name, 64 << 20))
    except FileNotFoundError:
        return None
    except OSError as error:  # a directory, a FIFO, or the run's directory is a file
        raise SideFileError(f"{storage.join(name)}: {error.strerror or error}") from None


def _yaml(raw: bytes) -> Any:
    """By libyaml, which takes a tenth of the time; it recurses on the C stack, so what nests deeply is left to Python."""
    with contextlib.suppress(
        yaml.YAMLError, AttributeError
    ):  # Python's message is the known one; or libyaml isn't there
        if sum(map(raw.count, (b"[", b"{", b"-", b"?"))) < _NESTED:
            return yaml.load(raw, yaml.CSafeLoader)
    return yaml.safe_load(raw)


def _parsed(place: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "YAML" if place.endswith(".yaml") else "JSON"
        raise SideFileError(f"{place}: not {kind} ({' '.join(str(error).split())[:200]})") from None


def _checked(storage: Storage, name: str, content: Any, whole: bool = True) -> dict[str, Any]:
    def wrong(what: str, expected: str, found: str) -> SideFileError:
        return SideFileError(f"{storage.join(name)}: {what}expected {expected}, found {found[:40]}")

    if not isinstance(content, dict):
        raise wrong("", "a mapping", type(content).__name__)
    for field, kind in _FIELDS.get(name, {}).items():
        if field not in content and whole:
            raise wrong(f"{field}: ", _TYPES[kind], "nothing")
        if field in content and (not isinstance(content[field], kind) or isinstance(content[field], bool)):
            raise wrong(f"{field}: ", _TYPES[kind], repr(content[field]))
    for split, metrics in content.get("metrics", {}).items() if name == "result.json" else ():
        if not isinstance(metrics, Mapping) or not all(v is None or isinstance(v, _NUMBER) for v in metrics.values()):
            raise wrong(f"metrics.{split}: ", "numbers by name", str(metrics))
    return content
