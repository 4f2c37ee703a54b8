"""Which runs are shown, in what order: names of columns, `--where` and `--sort`."""

from __future__ import annotations

import fnmatch
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from dist_train.config.errors import ConfigError, did_you_mean
from dist_train.listing.entries import FACTS, Entry, differing
from dist_train.pages.curves import lower_is_better

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}


def named(entries: Sequence[Entry], name: str, option: str) -> str:
    """The column that a name means: itself, or the one that ends in it, as `lr` for `optimizer.lr`.

    Raises:
        ConfigError: there is none, or several.
    """
    every = dict.fromkeys(key for entry in entries for key in entry.facts)
    if name in every or name in FACTS:
        return name
    ends = [key for key in every if re.split(r"[./]", key)[-1] == name]
    vals = [key for key in ends if key.startswith("val/")]  # rather than test/
    differ = [key for key in ends if key in differing(entries)]
    for found in (vals, differ, ends):
        if len(found) == 1:
            return found[0]
    if ends:
        raise ConfigError.single(option, f"{name} may be any of {', '.join(ends[:8])}; give one of them in full")
    metrics = dict.fromkeys(metric for entry in entries for metric in entry.metrics)
    known = ", ".join([*(fact for fact in FACTS if fact != "n"), *metrics])
    message = (
        f"no run has {name!r}{did_you_mean(name, [*every, *FACTS])}; there are {known}, and the keys of the configs"
    )
    raise ConfigError.single(option, message)


def where(entries: Sequence[Entry], condition: str) -> list[Entry]:
    """The entries of which a condition is true: `optimizer.lr>0.01`, `state=completed`, `run=sweep-*`.

    Raises:
        ConfigError: it is no condition, no run has that name, or text would be compared by size.
    """
    match = re.fullmatch(r"\s*(.+?)\s*(==|!=|<=|>=|=|<|>)\s*(.*?)\s*", condition, re.DOTALL)
    if match is None:
        raise ConfigError.single("--where", f"expected NAME=VALUE, or !=, <, <=, >, >=, found {condition!r}")
    name, sign, text = match.groups()
    if not entries:
        return []
    column = named(entries, name, "--where")
    wanted = _number(text)
    if sign in ("<", "<=", ">", ">="):
        texts = [value for entry in entries if isinstance(value := entry.facts.get(column), str)]
        if wanted is None or (texts and not any(_is_number(entry.facts.get(column)) for entry in entries)):
            found = repr(text) if wanted is None else f"{column} {texts[0]!r}"
            raise ConfigError.single(
                "--where", f"{sign} compares numbers, found {found} in {condition!r}; = and != compare text"
            )

    def holds(entry: Entry) -> bool:
        value = entry.facts.get(column)
        if wanted is not None and _is_number(value):
            return _COMPARE[sign](value, wanted)
        same = fnmatch.fnmatchcase(value if isinstance(value, str) else json.dumps(value, default=str), text)
        return {"=": same, "==": same, "!=": not same}.get(sign, False)

    return [entry for entry in entries if holds(entry)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sorted_by(entries: Sequence[Entry], name: str, reverse: bool = False) -> list[Entry]:
    """Sorted by a column, of a metric the best first; what has no value (or none that is finite) comes last in either order."""
    column = named(entries, name, "--sort") if entries else name
    metric = next((entry.metric for entry in entries if entry.metric), "") if column == "best" else column
    judged = next((entry.judging for entry in entries if metric in entry.metrics), {})
    down = (column == "best" or column.startswith(("val/", "test/", "train/"))) and not lower_is_better(
        metric.partition("/")[2], judged
    )

    def key(entry: Entry) -> tuple[bool, Any]:
        value = entry.facts[column]
        return isinstance(value, str | list | dict), value if _is_number(value) else str(value)

    def known(entry: Entry) -> bool:
        value = entry.facts.get(column)
        return value is not None and (not isinstance(value, float) or math.isfinite(value))

    numbers = [entry for entry in entries if known(entry)]
    return sorted(numbers, key=key, reverse=down != reverse) + [entry for entry in entries if not known(entry)]
