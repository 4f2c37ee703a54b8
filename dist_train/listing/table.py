"""The table of runs: its columns, and how it fits a terminal; and the same as JSON."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dist_train.listing.entries import FACTS, UNSHOWN, Entry, differing
from dist_train.listing.runs import RunRow
from dist_train.listing.selecting import named, sorted_by
from dist_train.tracking.records import finite

KEYS = 6  # of the keys that differ, how many are columns unless others are asked for
NARROWEST = 14  # columns for a reason, or a run's name, that is cropped
WIDEST = 28  # columns for a value of a config on a terminal


def columns_of(entries: Sequence[Entry], asked: Sequence[str] = ()) -> list[str]:
    """The columns to show: those asked for, else what is known of the runs, their metrics and the keys that differ."""
    if asked:
        return list(dict.fromkeys(["run", *(named(entries, name, "--columns") for name in asked)]))
    kinds = {entry.metric for entry in entries if entry.metric}
    best = kinds.pop() if len(kinds) == 1 else "best"
    metrics = dict.fromkeys(name for entry in entries for name in entry.metrics if name.startswith("val/"))
    test = f"test/{best.removeprefix('val/')}"
    more = [
        name
        for name in (*metrics, test)
        if name != best and any(entry.facts.get(name) is not None for entry in entries)
    ]
    more = more[: 1 + (test in more)]
    count = ["n"] if any("n" in entry.facts for entry in entries) else []
    keys = differing(entries)[:KEYS]
    last = ["reason"] if any(entry.facts["reason"] for entry in entries) else []
    return ["run", *count, "state", "step", best, *more, *keys, "epoch", "samples/s", "age", "attempts", *last]


def importance(names: Sequence[str], asked: bool) -> list[str]:
    """Columns, the ones that a narrow terminal keeps longest first."""
    if asked:
        return list(names)
    facts = [name for name in names if name in FACTS]
    metrics = [name for name in names if name.startswith(("val/", "test/"))]
    keys = [name for name in names if name not in (*facts, *metrics)]
    order = [
        "run",
        *metrics[:1],
        "best",
        "state",
        "n",
        *keys,
        "reason",
        "step",
        *metrics[1:],
        "age",
        "samples/s",
        "epoch",
    ]
    return [name for name in dict.fromkeys([*order, *names]) if name in names]


def cells_of(entries: Sequence[Entry], names: Sequence[str]) -> Iterator[list[str]]:
    """The lines of cells; the best value of the first metric has a star."""
    first = next((name for name in names if name == "best" or name.startswith("val/")), "")
    metrics = {entry.metric for entry in entries if entry.metric}
    top = sorted_by(entries, first)[:1] if first and len(metrics) == 1 and len(entries) > 1 else []
    best = top[0].facts.get(first) if top else None
    for entry in entries:
        star = best is not None and entry.facts.get(first) == best
        yield [
            (f"{entry.metric} " if name == "best" and entry.metric else "")
            + entry.cell(name)
            + " *" * (star and name == first)
            for name in names
        ]


def lines_of(entries: Sequence[Entry], asked: Sequence[str], width: int | None) -> list[str]:
    """The table, in at most `width` columns (None: as wide as it is); a last line names the columns that don't fit."""
    names = columns_of(entries, asked)
    cells = list(cells_of(entries, names))
    shown, heads = list(names), list(names)
    if width is not None:
        cells = [
            [cell if name in FACTS else _cropped(cell, WIDEST) for name, cell in zip(names, line)] for line in cells
        ]
        if _total(_widths(heads, cells, names, width)) > width:
            heads = _short(names)
        for name in importance(names, bool(asked))[:0:-1]:
            kept = [k for k, other in enumerate(names) if other in shown]
            if _total([_widths(heads, cells, names, width)[k] for k in kept]) <= width:
                break
            shown.remove(name)
    kept = [k for k, name in enumerate(names) if name in shown]
    rows = [[line[k] for k in kept] for line in [heads, *cells]]
    limits = [max(map(len, column)) for column in zip(*rows)]
    if width is not None:
        for k in [k for k, name in enumerate(shown) if name in ("reason", "run")][::-1]:
            limits[k] = max(min(limits[k], NARROWEST), min(limits[k], limits[k] + width - _total(limits)))
    lines = [_line(row, limits, [_is_number(cells, names.index(name)) for name in shown]) for row in rows]
    hidden = [name for name in names if name not in shown]
    others = [key for key in differing(entries) if key not in names] if not asked else []
    if width is not None and hidden:
        lines += _wrapped(f"not shown: {', '.join(hidden)} (--columns NAME,NAME shows others)", width)
    if others:
        few = ", ".join(others[:KEYS]) + (f" and {len(others) - KEYS} more" if len(others) > KEYS else "")
        lines += _wrapped(f"more keys differ: {few} (--columns NAME,NAME or --json shows them)", width)
    return lines


def _widths(heads: Sequence[str], cells: Sequence[Sequence[str]], names: Sequence[str], width: int) -> list[int]:
    """What each column needs: names of runs and reasons can be cropped."""
    natural = [max(map(len, column)) for column in zip(heads, *cells)]
    limit = {"reason": NARROWEST, "run": max(NARROWEST, width // 3)}
    return [min(size, limit.get(name, size)) for size, name in zip(natural, names)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each name, where no other column has it."""
    last = [re.split(r"[./]", name)[-1] if name not in FACTS else name for name in names]
    return [short if last.count(short) == 1 else name for name, short in zip(names, last)]


def _cropped(text: str, width: int) -> str:
    """Its beginning and its end."""
    if len(text) <= width:
        return text
    right = max(1, (width - 2) // 2)
    return text[: width - 2 - right] + ".." + text[-right:]


def _is_number(cells: Sequence[Sequence[str]], column: int) -> bool:
    return all(re.match(r"[-+]?[\d.]|-$|nan|inf", line[column]) for line in cells)


def _line(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = [_cropped(cell, width) for cell, width in zip(row, widths)]
    return "  ".join(f"{cell:{'>' if r else '<'}{width}}" for cell, width, r in zip(cells, widths, right)).rstrip()


def _wrapped(text: str, width: int | None) -> list[str]:
    return ["", *(textwrap.wrap(text, width) if width is not None else [text])]


def as_json(rows: Sequence[RunRow], entries: Sequence[Entry], seeds: bool) -> str:
    """The runs of these entries in their order, the keys in which they differ, and with `seeds` means and deviations."""
    from dist_train.config.changes import differing  # imports the schema

    known = {row.run: row for row in rows}
    shown = [known[name] for entry in entries for name in entry.runs]
    configured = [row for row in shown if row.config]
    every = {row.run: "-" for row in shown}
    page: dict[str, Any] = {
        "runs": [
            {name: value for name, value in asdict(row).items() if name not in ("config", "judging")} for row in shown
        ],
        "differences": {
            key: every | {row.run: value for row, value in zip(configured, values)}
            for key, *values in (differing([row.config for row in configured]) if len(configured) > 1 else [])
            if not key.startswith(UNSHOWN)
        },
    }
    if seeds:
        page["seeds"] = [
            {"run": entry.facts["run"], "runs": entry.runs, "n": entry.facts["n"], "state": entry.facts["state"]}
            | {"metrics": {name: {"mean": entry.facts[name], "std": entry.spread.get(name)} for name in entry.metrics}}
            for entry in entries
        ]
    return json.dumps(finite(page), indent=2)
