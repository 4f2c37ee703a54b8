"""One page that shows several runs beside each other: a table that sorts, and their curves in the same charts."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

from dist_train.config.changes import differing
from dist_train.config.errors import visible
from dist_train.pages.charts import chart
from dist_train.pages.curves import (
    POINTS,
    Horizontal,
    Line,
    Rows,
    averaged,
    best_of,
    fitted,
    horizontal_of,
    lower_is_better,
    lr_names,
    metric_names,
    panel_title,
    series,
    thinned,
)
from dist_train.pages.figures import Cell, Section
from dist_train.pages.report import read_records, write_html
from dist_train.text import format_number, format_seconds
from dist_train.tracking.records import Row, read_rows

RUN_COLORS = ("#4c78a8", "#e4572e", "#2a9d5c", "#8b5cf6", "#d97706", "#0e7490", "#be185d", "#4d7c0f")
COLUMNS = 6  # differing keys that are columns of the table of results at most
UNSHOWN = ("run.", "tracking.", "debug.", "checkpoint.", "trainer.log_every", "trainer.stop_at")  # not what is trained


def write_comparison(roots: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Lay the curves of several runs over each other, with a table of results, the best of them marked; reads files only."""
    paths = list(dict.fromkeys(Path(root) for root in roots))
    names = [root.resolve().name for root in paths]
    if len(set(names)) < len(names):
        names = [str(root) for root in paths]
    every = {name: Rows(read_rows(root / "metrics.jsonl")) for name, root in zip(names, paths, strict=True)}
    records = [read_records(root)[0] for root in paths]
    configs = [known["config.yaml"] for known in records]
    found: dict[str, None] = dict.fromkeys(name for rows in every.values() for name in metric_names(rows))
    lrs: dict[str, None] = dict.fromkeys(name for rows in every.values() for name in lr_names(rows))
    keys = differing(configs)
    beside = [row for row in keys if not row[0].startswith(UNSHOWN)]
    head, outcome = _outcome(every, records, ["loss", *found], beside if len(beside) <= COLUMNS else [])
    axis = common_axis(list(every.values()))
    curves = [
        overlay(list(every.items()), name, axis, [known["judging"] for known in records])
        for name in ("loss", *found, *lrs)
    ]
    sections = [
        Section("Results", outcome, "sorts", head),
        Section("Curves", curves, "charts", note=" of each run"),
        Section("Where the configs differ", keys or [("nowhere",)], "table", ("key", *names) if keys else ()),
    ]
    return write_html(Path(path), " / ".join(names), sections, axis)


def _outcome(
    every: Mapping[str, list[Row]],
    records: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    keys: Sequence[tuple[str, ...]],
) -> tuple[list[str], list[list[str | Cell]]]:
    """The table of results: one row per run, a column for each differing key and metric, the best of each marked."""
    columns: list[tuple[str, list[Cell]]] = []
    for split in ("val", "test"):
        for name in metrics:
            columns.append((f"{split} {name}", _ranked(every, records, split, name)))
    columns = [(name, cells) for name, cells in columns if any(cell.text for cell in cells)]
    columns += [(key, [Cell(text) for text in values]) for key, *values in keys]
    rows: list[list[str | Cell]] = []
    for k, (name, known) in enumerate(zip(every, records, strict=True)):
        result, status = known["result.json"], known["status.json"]
        step = result.get("step") or max((row["step"] for row in every[name]), default=0)
        time = result.get("seconds")
        state = result.get("state") or status.get("state") or "not completed"
        spent = Cell("" if time is None else format_seconds(time), time)
        shown = visible(name, keep="")
        rows.append(
            [Cell(shown, shown, run=shown), state, Cell(f"{step:,}", step), spent, *(cells[k] for _, cells in columns)]
        )
    return ["run", "state", "step", "time", *(name for name, _ in columns)], rows


def _ranked(every: Mapping[str, list[Row]], records: Sequence[Mapping[str, Any]], split: str, name: str) -> list[Cell]:
    """A metric of each run: the best of val, that of test; the best of all marked."""
    points = [best_of(rows, split, name, known["judging"]) for rows, known in zip(every.values(), records, strict=True)]
    values = [point[1] for point in points if point is not None]
    lower = lower_is_better(name, records[0]["judging"]) if records else True
    best = (min if lower else max)(values, default=nan)
    return [
        Cell("") if point is None
        else Cell(format_number(name, point[1]), point[1], point[1] == best and len(values) > 1, f"at step {point[0]:,}")
        for point in points
    ]  # fmt: skip


def common_axis(every: Sequence[list[Row]]) -> Horizontal:
    """The steps of several runs, and their epochs where a step is the same epoch in all of them."""
    axis = horizontal_of([row for rows in every for row in rows])
    lengths = {round(step / epoch, 6) for rows in every for step, epoch in horizontal_of(rows).epochs[1:]}
    return axis if len(lengths) == 1 else Horizontal(axis.first, axis.last)


def overlay(
    every: Sequence[tuple[str, list[Row]]],
    name: str,
    axis: Horizontal,
    configs: Sequence[Mapping[str, Any]],
    hidden: Collection[str] = (),
    most: int = POINTS,
) -> str:
    """One metric of runs, given as (label, rows): val (the train rows where there is no val), one color per label.

    Those `hidden` are drawn, in at most about `most` points, but shown only once a box of the page asks for them.
    """
    lines, colors = [], dict[str, str]()
    for (run, rows), config in zip(every, configs, strict=True):
        split = "val" if name not in lr_names(rows) and series(rows, "val", name)[0] else "train"
        points = series(rows, split, name)
        if any(value == value for value in points[1]):
            k = len(colors)
            color = colors.setdefault(run, RUN_COLORS[k] if k < len(RUN_COLORS) else f"hsl({k * 137 % 360} 60% 50%)")
            best = best_of(rows, split, name, config) if name not in lr_names(rows) else None
            line = Line(
                visible(run, keep=""), color, thinned(points, most), len(points[0]) == 1, averaged(points, most), best
            )
            lines.append(replace(line, hidden=run in hidden))
    return chart(fitted(panel_title(name), lines, name), axis)
