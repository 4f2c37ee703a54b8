"""report.html: one file that shows a run, or several beside each other; no scripts, nothing from the network."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dist_train.config.changes import differing
from dist_train.config.errors import visible
from dist_train.files import replacing
from dist_train.runtime.sidefiles import SideFileError, problems, read_lines, read_mapping
from dist_train.runtime.storage import open_storage
from dist_train.text import format_number, format_seconds
from dist_train.tracking.records import Row, read_rows
from dist_train.views.curves import (
    aside_names,
    draw_panel,
    dress,
    lr_names,
    metric_names,
    new_figure,
    panel_title,
    plain,
    render,
    series,
)
from dist_train.views.figures import Image, Picture, Section

RUN_COLORS = ("#4c78a8", "#e4572e", "#2a9d5c", "#8b5cf6", "#d97706", "#0e7490", "#be185d", "#4d7c0f")


def write_report(
    root: str | os.PathLike[str],
    *,
    pictures: Sequence[Picture] = (),
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Write report.html into a run's directory, from the files there; whatever is missing is left out.

    Read: metrics.jsonl, status.json, result.json, attempts.jsonl, config.yaml. pictures: what the model does, computed by
    the caller. environment: label and value (versions, hosts). Returns the path.
    """
    root = Path(root)
    rows = read_rows(root / "metrics.jsonl")
    known, attempts = _records(root)
    status, result = known["status.json"], known["result.json"]
    kept = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
    for split, metrics in (result.get("metrics") or {}).items():
        kept |= {f"{split} {name}": text for name, text in _numbers(metrics)}
    panels = ["loss", *metric_names(rows), *aside_names(rows)]
    config = root / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if known["config.yaml"] else ""
    sections = [
        Section("Error", str(status.get("error") or ""), "text"),
        Section("Files that can't be read", problems(open_storage(root)), "table"),
        Section("Curves", [_panel(rows, name) for name in panels if rows], "panels"),
        Section("The model that was kept", list(kept.items()), "table"),
        *(section for picture in pictures for section in picture.sections()),
        Section("Starts and ends", list(_attempts(attempts)), "table", ("time (UTC)", "")),
        Section("Config", text, "text"),
        Section("Environment", list((environment or {}).items()), "table"),
    ]
    return _write(root / "report.html", root.resolve().name, sections, _tiles(rows, {**result, **status}))


def write_comparison(roots: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Lay the curves of several runs over each other, with results and the keys in which their configs differ."""
    paths = [Path(root) for root in roots]
    names = [root.resolve().name for root in paths]
    if len(set(names)) < len(names):
        names = [str(root) for root in paths]
    every = {name: read_rows(root / "metrics.jsonl") for name, root in zip(names, paths, strict=True)}
    panels = [
        "loss",
        *dict.fromkeys(name for of in (metric_names, lr_names) for rows in every.values() for name in of(rows)),
    ]
    records = [_records(root)[0] for root in paths]
    outcome = []
    for name, known in zip(names, records, strict=True):
        result = known["result.json"]
        metrics, time = result.get("metrics") or {}, result.get("seconds")
        step = result.get("step") or max((row["step"] for row in every[name]), default=0)
        values = (", ".join(map(" ".join, _numbers(metrics.get(split) or {}))) for split in ("val", "test"))
        spent = format_seconds(time) if time is not None else ""
        outcome.append((name, result.get("state", "not completed"), f"{step:,}", spent, *values))
    keys = differing([known["config.yaml"] for known in records])
    sections = [
        Section("Results", outcome, "table", ("run", "state", "step", "time", "val", "test")),
        Section("Curves", [_overlay(every, name) for name in panels], "panels"),
        Section("Where the configs differ", keys or [("nowhere",)], "table", ("key", *names) if keys else ()),
    ]
    return _write(Path(path), " / ".join(names), sections)


def _tiles(rows: list[Row], known: dict[str, Any]) -> dict[str, str]:
    """The headline values."""
    state = str(known.get("state") or "unknown")
    tiles = {"state": state}
    for split in ("test", "val"):
        metrics = (known.get("metrics") or {}).get(split) or {}
        tiles |= {f"{split} {name}": text for name, text in _numbers(metrics) if name != "eval_samples"}
    for name, label in (("step", "step"), ("epoch", "epoch"), ("world_size", "processes")):
        if known.get(name) is not None:
            tiles[label] = format_number(name, known[name])
    if "seconds" in known and state == "completed":  # result.json's: not of a run that was resumed since
        tiles["time"] = format_seconds(known["seconds"])
    for name, label, mean in (("samples_per_s", "samples/s", median), ("data_wait", "waiting for data", fmean)):
        values = [row[name] for row in rows if row.get(name, nan) == row.get(name, nan)]
        if values:
            tiles[label] = f"{mean(values):.0%}" if name == "data_wait" else format_number(name, mean(values))
    return tiles


def _panel(rows: list[Row], name: str) -> Image:
    figure = new_figure(4.4, 3.1)
    draw_panel(figure.subplots(), rows, name)
    return Image(f"{name} over the steps", render(figure, "svg"))


def _overlay(every: Mapping[str, list[Row]], metric: str) -> Image:
    """One metric of all runs: val (the train rows where there is no val), one color per run."""
    figure = new_figure(5.2, 3.6)
    axis = figure.subplots()
    for color, (name, rows) in zip(itertools.cycle(RUN_COLORS), every.items(), strict=False):
        split = "val" if metric != "lr" and series(rows, "val", metric)[0] else "train"
        steps, values = series(rows, split, metric)
        if steps:
            label = plain(name).lstrip("_") + (f"  {values[-1]:.4g}" if metric != "lr" else "")
            axis.plot(steps, values, color=color, linewidth=1.6, label=label)
            axis.legend(frameon=False, fontsize=8.5)
    dress(axis, panel_title(metric))
    return Image(f"{metric} of all runs", render(figure, "svg"))


def _attempts(records: Iterable[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    """attempts.jsonl as rows of a table."""
    for record in records:
        time, event = str(record.pop("time", ""))[:19].replace("T", " "), record.pop("event", "")
        inner = [
            fact for value in record.values() if isinstance(value, dict) for fact in value.items()
        ]  # versions, code
        outer = [(key, value) for key, value in record.items() if not isinstance(value, dict)]
        facts = [f"{key} {value}" for key, value in (*outer, *inner) if value not in (None, "")]
        yield time, ", ".join([event, *facts])


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers among them, as people read them."""
    return [(name, format_number(name, value)) for name, value in metrics.items() if type(value) in (int, float)]


def _write(path: Path, title: str, sections: Sequence[Section], tiles: Mapping[str, str] | None = None) -> Path:
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    state = (tiles or {}).get("state")
    css = state if state in ("completed", "failed", "preempted", "running") else ""
    text = visible(page.render(title=title, sections=sections, tiles=tiles, css=css))
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _records(root: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The mappings in config.yaml, status.json and result.json, {} where one can't be read, and the starts and ends."""
    storage, known = open_storage(root), dict[str, dict[str, Any]]()
    for name in ("config.yaml", "status.json", "result.json"):
        try:
            known[name] = read_mapping(storage, name, whole=False) or {}
        except SideFileError:
            known[name] = {}  # listed among the problems
    return known, read_lines(storage, "attempts.jsonl")[0]
