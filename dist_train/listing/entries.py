"""Runs as the lines of a table: what is known of each by name, and means over runs that differ in their seed alone."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from dist_train.config.errors import mask, visible
from dist_train.listing.runs import RunRow
from dist_train.text import format_number, format_seconds

FACTS = ("run", "state", "step", "epoch", "best", "best_step", "samples/s", "age", "attempts", "reason", "n")
UNSHOWN = ("run.", "checkpoint.resume", "checkpoint.accept_changes")
LONGEST = 200  # characters of a cell, however wide the output is


@dataclass
class Entry:
    """One line of the table: a run, or several that differ in their seed alone.

    Attributes:
        facts: what is known of it by the name of its column; a config's keys are dotted. keys, metrics: which of them are these.
        metric: what `best` is the best of. runs: the runs that it stands for. spread: standard deviations over these.
        judging: the config as `lower_is_better` takes it.
    """

    facts: dict[str, Any]
    keys: list[str]
    metrics: list[str]
    metric: str
    runs: list[str]
    spread: dict[str, float] = field(default_factory=dict)
    judging: dict[str, Any] = field(default_factory=dict)

    def cell(self, name: str) -> str:
        """What is shown in a column: one line without control characters and secrets."""
        value: Any = self.facts.get(name)
        spread = self.spread.get(name)
        if value is None and name in ("samples/s", "age", "best", "best_step", *self.metrics):
            text = "-"
        elif name == "age":
            text = format_seconds(value)
        elif name in ("best", "samples/s", *self.metrics):
            about = {"best": self.metric, "samples/s": "_per_s"}.get(name, name)
            text = format_number(about, value) + (
                f" \u00b1{format_number(about, spread)}" if spread is not None else ""
            )
        elif isinstance(value, str):
            text = value
        elif name in ("step", "epoch", "best_step", "attempts"):
            text = f"{value:,}"
        else:
            text = "-" if name not in self.facts else json.dumps(value, ensure_ascii=False, default=str)
        text = " ".join(visible(mask(text)).split())
        longest = LONGEST if name in FACTS else LONGEST // 3
        return text if len(text) <= longest else text[: longest - 3] + "..."


def entries_of(rows: Sequence[RunRow]) -> list[Entry]:
    """An entry for each run."""
    found = []
    for row in rows:
        best = row.best or {}
        facts: dict[str, Any] = {
            "run": row.run, "state": row.state, "step": row.step, "epoch": row.epoch, "best": best.get("value"),
            "best_step": best.get("step"), "samples/s": row.samples_per_s, "age": row.age_seconds, "attempts": row.attempts,
            "reason": row.reason,
        }  # fmt: skip
        config = dict(_flat(row.config)) if row.config else {}
        found.append(
            Entry(
                {**config, **facts, **row.metrics},
                list(config),
                list(row.metrics),
                best.get("metric", ""),
                [row.run],
                judging=row.judging,
            )
        )
    return found


def _flat(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config by their dotted keys; a list without mappings is one value."""
    inner: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inner = enumerate(value)
    if not inner:
        yield above, value
    for name, item in inner:
        yield from _flat(item, f"{above}.{name}" if above else str(name))


def over_seeds(entries: Sequence[Entry]) -> list[Entry]:
    """Runs whose configs differ in `seed` alone as one entry: means and standard deviations of those that are completed.

    `n` is how many these are, of how many; where none is completed, all count. A seed that was run again isn't one more: it is
    a line of its own.
    """
    groups: dict[tuple[str, int], list[Entry]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        config = {key: entry.facts[key] for key in entry.keys if key != "seed" and not key.startswith(UNSHOWN)}
        alone = entry.facts["run"] if not config else ""  # of a run without a config nothing is known
        same = json.dumps([config, alone], default=str, sort_keys=True)
        seed = same, str(entry.facts.get("seed"))
        groups.setdefault((same, seen[seed]), []).append(entry)
        seen[seed] += 1
    return [_joined(group) for group in groups.values()]


def _joined(group: list[Entry]) -> Entry:
    counted = [entry for entry in group if entry.facts["state"] == "completed"] or group
    states = [entry.facts["state"] for entry in group]
    several = len(group) > 1
    facts = {key: value for key, value in group[0].facts.items() if not (several and key == "seed")}
    names = [entry.facts["run"] for entry in group]
    n = str(len(counted)) if len(counted) == len(group) else f"{len(counted)} of {len(group)}"
    facts |= {
        "run": _pattern(names),
        "n": n,
        "reason": "; ".join(dict.fromkeys(filter(None, (e.facts["reason"] for e in group)))),
    }
    facts["state"] = ", ".join(f"{states.count(s)} {s}" if len(set(states)) > 1 else s for s in dict.fromkeys(states))
    joined = Entry(
        facts,
        [key for key in group[0].keys if key in facts],
        group[0].metrics,
        group[0].metric,
        names,
        judging=group[0].judging,
    )
    joined.metrics = list(dict.fromkeys(name for entry in group for name in entry.metrics))
    for name in ("best", "best_step", "step", "epoch", "samples/s", *joined.metrics):
        values: list[Any] = [entry.facts.get(name) for entry in counted]
        if any(value is None or not math.isfinite(value) for value in values):
            facts[name] = None  # a mean without the seed that diverged would mislead
        elif name in ("step", "epoch", "best_step"):
            facts[name] = round(fmean(values))
        else:
            facts[name] = fmean(values)
            joined.spread |= {name: stdev(values)} if len(values) > 1 and name != "samples/s" else {}
    facts |= {"age": min((e.facts["age"] for e in group if e.facts["age"] is not None), default=None)}
    facts |= {"attempts": sum(e.facts["attempts"] for e in group)}
    return joined


def _pattern(names: Sequence[str]) -> str:
    """`sweep-lr0.1-s*`: what the names have in common; else the first, and how many more."""
    if len(names) == 1:
        return names[0]
    left = len(os.path.commonprefix(names))  # noqa: RUF071  (characters it is)
    right = len(os.path.commonprefix([name[left:][::-1] for name in names]))  # noqa: RUF071
    common = f"{names[0][:left]}*{names[0][len(names[0]) - right :]}"
    return common if left + right > 2 else f"{names[0]} and {len(names) - 1} more"


def differing(entries: Sequence[Entry]) -> list[str]:
    """The keys in which the configs differ, those that all have first."""
    configs = [entry for entry in entries if entry.keys]
    every = dict.fromkeys(key for entry in configs for key in entry.keys if not key.startswith(UNSHOWN))
    found = [key for key in every if len({str(entry.facts.get(key, "-")) for entry in configs}) > 1]
    return sorted(found, key=lambda key: any(key not in entry.facts for entry in configs))
