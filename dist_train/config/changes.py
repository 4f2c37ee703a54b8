"""What differs between the config that a run was begun with and the one it is to go on with, and what that means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .fields import Section, plain, section_of
from .schema import Config

Kind = Literal["harmless", "consent", "refused"]

# Where a run lives isn't a property of it; and these say how to start, not what to train.
IGNORED = ("run", "checkpoint.resume", "checkpoint.accept_changes")


@dataclass(frozen=True)
class Change:
    """A key whose value differs: `old` and `new` are plain values (None where the key is absent)."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every difference between two `Config.to_dict()`, in the order of the schema.

    A key that `old` doesn't have (a run of an earlier version) counts as its default.
    """
    return list(_section(Config, "", old, new))


def _section(section: type[Section], above: str, old: Any, new: Any) -> Iterator[Change]:
    for name, known in section.model_fields.items():
        key = above + name
        if key in IGNORED:
            continue
        default = None if known.is_required() else plain(known.get_default(call_default_factory=True))
        before, after = old.get(name, default), new.get(name, default)
        inner = section_of(known.annotation)
        if inner is not None and isinstance(before, dict) and isinstance(after, dict):
            yield from _section(inner, key + ".", before, after)
            continue
        extra = known.json_schema_extra
        yield from _value(key, before, after, str(extra["change"]) if isinstance(extra, dict) else "harmless")


def _value(key: str, old: Any, new: Any, kind: Any) -> Iterator[Change]:
    """Differences inside a leaf: a component's arguments one by one, all else as a whole."""
    if _same(old, new):
        return
    if isinstance(old, dict) and isinstance(new, dict) and old.get("_target_") == new.get("_target_"):
        for name in dict.fromkeys((*old, *new)):
            yield from _value(f"{key}.{name}", old.get(name), new.get(name), kind)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _value(f"{key}.{index}", before, after, kind)
    else:
        yield Change(key, old, new, kind)


def _same(old: Any, new: Any) -> bool:
    """Equality in which nan is itself and 1 is 1.0, but true isn't 1."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return bool(old == new or (old != old and new != new)) and isinstance(old, bool) == isinstance(new, bool)


def refusal_message(changes: Sequence[Change], location: str) -> str:
    """Why a run can't go on under a changed config, with every difference that stands in the way, and the cures."""
    refused = [change for change in changes if change.kind == "refused"]
    asked = [change for change in changes if change.kind == "consent"]
    lines = [f"the config differs from the one that {location} was trained with so far:"]
    width = max((len(change.key) for change in changes), default=0)
    for change in (*refused, *asked):
        note = "  (can't change within a run)" if change.kind == "refused" else ""
        lines.append(f"    {change.key:<{width}}  {_shown(change.old)} -> {_shown(change.new)}{note}")
    if refused:
        lines.append("  put the old value back, or begin another run: run.name=ANOTHER_NAME")
    else:
        lines.append("  either begin another run: run.name=ANOTHER_NAME")
        lines.append("  or go on with the new values from the newest checkpoint: checkpoint.accept_changes=true")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        arguments = ", ".join(f"{key}={_shown(item)}" for key, item in value.items() if key != "_target_")
        return f"{value['_target_']}({arguments})"
    if isinstance(value, dict) and "_live_" in value:
        return f"an object of class {value['_live_']}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
