"""Reading what stands beside a run's checkpoints: anybody may have edited, cut or replaced it, so nothing is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from dist_train.runtime.storage import Storage

# Bytes, where it isn't 64 MiB: records may grow for ever, and PyYAML takes 10 s for a MiB.
_MOST: dict[str, int | None] = {"metrics.jsonl": None, "config.yaml": 4 << 20}
_NUMBER = (int, float)
# What whoever reads a file relies on. An attribute that isn't named here may be missing or of any kind.
_FORMS: dict[str, dict[str, Any]] = {
    "status.json": {"state": str, "step": int, "epoch": int},
    "result.json": {"state": str, "reason": str, "step": int, "epoch": int, "kept_step": int, "world_size": int}
    | {"metrics": dict, "seconds": _NUMBER, "weights_sha256": str},
    "attempts.jsonl": {"event": str},
    "metrics.jsonl": {"step": int, "split": str},
    "micro_batches.json": {"micro_batch_size": int},
}
_KINDS = {str: "text", int: "a whole number", dict: "a mapping", _NUMBER: "a number"}


class SideFileError(Exception):
    """A file of a run that can't be read as what it should be; the message names it and says what is wrong."""


def read_mapping(storage: Storage, name: str, *, whole: bool = True) -> dict[str, Any] | None:
    """The content of a JSON file, or of a YAML file by its name; None if it isn't there.

    Args:
        whole: it must have all the fields that whoever goes on with the run relies on; else those that it has must be right.

    Raises:
        SideFileError: it isn't a file, not a mapping, or has other fields than it should.
        StorageError: the storage fails.
    """
    raw = _read(storage, name)
    if raw is None:
        return None
    if name.endswith(".yaml"):
        return _checked(storage, name, lambda: yaml.safe_load(raw), whole)
    return _checked(storage, name, lambda: json.loads(raw), whole)


def read_lines(storage: Storage, name: str) -> tuple[list[dict[str, Any]], str]:
    """The mappings in a JSONL file, and what is wrong with the rest ("" if nothing). A kill may have torn its last line.

    Raises:
        StorageError: the storage fails.
    """
    rows, wrong = [], ""
    try:
        lines = (_read(storage, name) or b"").split(b"\n")
    except SideFileError as error:
        return [], str(error)
    for number, line in enumerate(lines, 1):
        torn = line.startswith(b'{"') and not line.endswith(b"}")  # the next record was begun on a line of its own
        if torn or (number == len(lines) and not line):
            continue
        try:
            rows.append(_checked(storage, name, lambda line=line: json.loads(line)))  # type: ignore[misc]
        except SideFileError as error:
            wrong = wrong or f"{error} (line {number})"
    return rows, wrong


def problems(storage: Storage) -> list[tuple[str, str]]:
    """Name and fault of each side file of a run that can't be read."""
    found = []
    for name in ("config.yaml", *_FORMS):
        try:
            wrong = read_lines(storage, name)[1] if name.endswith(".jsonl") else read_mapping(storage, name) and ""
        except SideFileError as error:
            wrong = str(error)
        if wrong:
            found.append((name, wrong.removeprefix(f"{storage.join(name)}: ")))
    return found


def _read(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read_bytes(name, most=_MOST.get(name, 64 << 20))
    except FileNotFoundError:
        return None
    except OSError as error:  # a directory, a FIFO, or the run's directory is a file
        raise SideFileError(f"{storage.join(name)}: {error.strerror or error}") from None


def _checked(storage: Storage, name: str, parse: Callable[[], Any], whole: bool = True) -> dict[str, Any]:
    try:
        content = parse()
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "YAML" if name.endswith(".yaml") else "JSON"
        raise SideFileError(f"{storage.join(name)}: not {kind} ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise SideFileError(f"{storage.join(name)}: expected a mapping, found {type(content).__name__}")
    for field, kind in _FORMS.get(name, {}).items():
        if not whole and field not in content:
            continue
        if not isinstance(content.get(field), kind) or isinstance(content[field], bool):
            found = repr(content[field])[:40] if field in content else "nothing"
            raise SideFileError(f"{storage.join(name)}: {field}: expected {_KINDS[kind]}, found {found}")
    for split, figures in content.get("metrics", {}).items() if name == "result.json" else ():
        if not isinstance(figures, Mapping) or not all(v is None or isinstance(v, _NUMBER) for v in figures.values()):
            raise SideFileError(
                f"{storage.join(name)}: metrics.{split}: expected numbers by name, found {str(figures)[:40]}"
            )
    return content
