"""What differs between the config that a run was started with and the one that it resumes with, and what that means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .fields import dotted, leaves, section_of, walk
from .schema import Config

# How to start, not what to train; nor is a run's directory (`run`) a property of its training.
IGNORED = ("checkpoint.resume", "checkpoint.accept_changes")


MOST_LISTED = 50  # entries of a longer list aren't told apart


@dataclass(frozen=True)
class Change:
    """A key whose value differs: `old` and `new` are plain values (None where the key is absent)."""

    key: str
    old: Any
    new: Any
    kind: Literal["harmless", "consent", "refused"]

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every difference between two `Config.to_dict()`, in the order of the schema.

    A key that `old` doesn't have (a run of an earlier version) has its default.
    """
    found: list[Change] = []
    bitwise = _get(old, "distributed.reproducibility", "fast") == "bitwise"  # what its sums are taken over
    for key, field in walk(Config):
        marks: Any = field.json_schema_extra  # see fields._declare
        if section_of(field) is None and key not in IGNORED and not key.startswith("run."):
            default = marks.get("default")
            kind = "consent" if key == "trainer.micro_batch_size" and bitwise else marks["change"]
            found += _value(key, _get(old, key, default), _get(new, key, default), kind)
    return found


def not_default(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a `Config.to_dict()` that isn't the default; the run's name and directory are left out."""
    found: dict[str, Any] = {}
    for key, field in walk(Config):
        marks: Any = field.json_schema_extra
        value = _get(config, key, default := (marks or {}).get("default"))
        if section_of(field) is None and not key.startswith("run.") and value != default:
            *above, name = key.split(".")
            section = found
            for part in above:
                section = section.setdefault(part, {})
            section[name] = value
    return found


def _get(data: Any, key: str, default: Any) -> Any:
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return default
        data = data[part]
    return data


def _value(key: str, old: Any, new: Any, kind: Any) -> Iterator[Change]:
    """Differences inside a leaf: arguments and entries one by one. nan is nan and 1 is 1.0, but true isn't 1."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("_target_") == new.get("_target_"):
        for name in dict.fromkeys((*old, *new)):
            yield from _value(f"{key}.{name}", old.get(name), new.get(name), kind)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) <= MOST_LISTED:
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _value(f"{key}.{index}", before, after, kind)
    elif isinstance(old, bool) != isinstance(new, bool) or (old != new and (old == old or new == new)):
        yield Change(key, old, new, kind)


def refusal_message(changes: Sequence[Change], location: str) -> str:
    """Why a run can't resume with a changed config: every difference that prevents it, and the fixes."""
    refused = [change for change in changes if change.kind == "refused"]
    asked = [change for change in changes if change.kind == "consent"]
    lines = [f"the config differs from the one that {location} was trained with so far:"]
    width = max((len(change.key) for change in changes), default=0)
    for change in (*refused, *asked):
        note = "  (can't change within a run)" if change.kind == "refused" else ""
        lines.append(f"    {change.key:<{width}}  {_shown(change.old)} -> {_shown(change.new)}{note}")
    if refused:
        lines.append("  restore the old value, or start another run: run.name=ANOTHER_NAME")
    else:
        lines.append("  either start another run: run.name=ANOTHER_NAME")
        lines.append("  or resume with the new values from the newest checkpoint: checkpoint.accept_changes=true")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        arguments = ", ".join(f"{key}={_shown(item)}" for key, item in value.items() if key != "_target_")
        return f"{value['_target_']}({arguments})"
    if isinstance(value, dict) and "_live_" in value:
        return f"an object of class {value['_live_']}"
    if isinstance(value, list) and len(value) > MOST_LISTED:
        return f"a list of {len(value):,}"
    return value if isinstance(value, str) else json.dumps(value)


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """(key, value in each config) of the dotted keys that aren't the same in all; `-` where there is none."""
    flat = [{dotted(key): str(value) for key, value in leaves(config)} for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, *(config.get(key, "-") for config in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
