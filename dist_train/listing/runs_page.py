"""The page of runs: one file without network, a table that sorts and the curves of the chosen runs in the same charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

from dist_train.config.errors import visible
from dist_train.listing.entries import Entry
from dist_train.listing.runs import RunRow
from dist_train.listing.selecting import sorted_by
from dist_train.listing.table import columns_of, importance
from dist_train.pages.comparison import common_axis, overlay
from dist_train.pages.curves import Rows, metric_names
from dist_train.pages.figures import Cell, Section
from dist_train.pages.report import write_html
from dist_train.runtime.sidefiles import SideFileError, read_whole
from dist_train.runtime.storage import Storage
from dist_train.tracking.records import Row, parse

CHOSEN = 8  # runs whose curves are shown at first
CHARTS = 4  # metrics that have one
POINTS = 16_000  # of all runs in a chart
REASON = 60  # characters of a reason; all of it is said under the pointer


def write_runs(
    root: Storage, rows: Sequence[RunRow], entries: Sequence[Entry], columns: Sequence[str], path: Path
) -> Path:
    """Write the page of these entries; of the curves the first few are shown until others are chosen."""
    order = columns_of(entries, columns)
    names = order if columns else sorted(importance(order, False), key="reason".__eq__)  # that is long: it comes last
    known = {row.run: row for row in rows}
    curves = {run: Rows(_rows(root, run)) for entry in entries for run in entry.runs}
    labeled = [(visible(entry.facts["run"], keep=""), curves[run]) for entry in entries for run in entry.runs]
    hidden = {visible(entry.facts["run"], keep="") for entry in entries[CHOSEN:]}
    axis = common_axis(list(curves.values()))
    metrics = ["loss", *dict.fromkeys(name for found in curves.values() for name in metric_names(found))]
    configs = [known[run].judging for run in curves]
    most = max(40, POINTS // max(1, len(curves)))
    charts = [overlay(labeled, name, axis, configs, hidden, most) for name in metrics[:CHARTS] if any(curves.values())]
    states = Counter(known[run].state for run in curves)
    sections = [
        Section("Runs", _table(entries, names, hidden), "sorts", tuple(names)),
        Section("Curves", charts, "charts", note=" of each run"),
    ]
    tiles = [("runs", f"{len(curves):,}", ""), *((state, f"{count:,}", "") for state, count in states.items())]
    return write_html(path, f"Runs in {root.location}", sections, axis, tiles)


def _rows(root: Storage, run: str) -> list[Row]:
    """The rows of a run; none where they can't be read, which its reason says."""
    name = "" if run == root.location.rpartition("/")[2] and not root.exists(run) else run
    try:
        raw = read_whole(root.sub(name), "metrics.jsonl") or b""
    except SideFileError:
        return []
    rows = [row for row in map(parse, raw.splitlines(keepends=True)) if row is not None]
    for row in rows:
        row.update({key: nan for key, value in row.items() if value is None})
    return rows


def _table(entries: Sequence[Entry], names: Sequence[str], hidden: set[str]) -> list[list[str | Cell]]:
    best = {name: _best(entries, name) for name in names}
    return [[_cell(entry, name, best[name], hidden) for name in names] for entry in entries]


def _best(entries: Sequence[Entry], name: str) -> Any:
    """The best value of a metric's column; None for other columns, and of one run."""
    metrics = {entry.metric for entry in entries if entry.metric}
    compared = name.startswith(("val/", "test/")) or (name == "best" and len(metrics) == 1)
    return sorted_by(entries, name)[0].facts.get(name) if compared and len(entries) > 1 else None


def _cell(entry: Entry, name: str, best: Any, hidden: set[str]) -> Cell:
    text = entry.cell(name)
    value: Any = entry.facts.get(name)
    if name == "run":
        return Cell(text, text, run=(shown := visible(value, keep="")), checked=shown not in hidden)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    short = text if name != "reason" or len(text) <= REASON else text[: REASON - 3] + "..."
    at = f"at step {entry.facts['best_step']:,}" if name.startswith("val/") and entry.facts["best_step"] else ""
    return Cell(short, value if number else None, best is not None and value == best, text if short != text else at)
