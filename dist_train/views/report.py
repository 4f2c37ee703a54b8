"""report.html: one file that shows a run, or several beside each other; no scripts, nothing from the network."""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dist_train.config.errors import visible
from dist_train.files import replacing
from dist_train.runtime.sidefiles import SideFileError, problems, read_lines, read_mapping
from dist_train.runtime.storage import open_storage
from dist_train.text import format_number, format_seconds
from dist_train.tracking.records import Row, read_rows
from dist_train.views.curves import ASIDE, TITLES, draw_panel, dress, metric_names, new_figure, plain, render, series
from dist_train.views.figures import (
    Boundary,
    Confusion,
    Regression,
    boundary_gif,
    draw_confusion,
    draw_regression,
    picture_png,
)

Picture = Confusion | Regression | Boundary
RUN_COLORS = ("#4c78a8", "#e4572e", "#2a9d5c", "#8b5cf6", "#d97706", "#0e7490", "#be185d", "#4d7c0f")
STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans CJK SC",sans-serif;color:#1f2937;background:#f3f4f6;margin:0}
main{max-width:1180px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;margin:.4rem 0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:0 0 .6rem}
section{background:#fff;border:1px solid #e5e7eb;border-radius:10px;padding:14px 16px;margin:12px 0}
.tiles,.panels,.worst{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(140px,1fr))}
.panels{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.worst{grid-template-columns:repeat(auto-fill,minmax(118px,1fr))}
.tile{border-left:3px solid #4c78a8;padding:2px 10px}.tile b{display:block;font-size:1.25rem;overflow-wrap:anywhere}
.tile span,figcaption,.quiet{color:#6b7280;font-size:.85rem}
img{max-width:100%;height:auto;display:block}.panels img{width:100%}
figure{margin:0}.worst img{image-rendering:pixelated;background:#000}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid #e5e7eb;vertical-align:top}
td{overflow-wrap:anywhere;min-width:5em}td:first-child{white-space:nowrap}th{color:#6b7280;font-weight:600}
pre{font-size:.82rem;overflow-x:auto;background:#f9fafb;padding:10px;border-radius:6px;margin:0;white-space:pre-wrap}
.completed{border-color:#2a9d5c}.failed{border-color:#b91c1c}.preempted,.running{border-color:#d97706}
h2{break-after:avoid}img,tr{break-inside:avoid}section>img{max-height:34rem;width:auto}
@media print{body{background:#fff;font-size:11pt}section{border:none;padding:0}pre{overflow:visible}}
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1>
{body}
</main></body></html>
"""


def write_report(
    root: str | os.PathLike[str],
    *,
    pictures: Sequence[Picture] = (),
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Writes report.html into a run's directory, from the files there; whatever is missing is left out.

    Read: metrics.jsonl, status.json, result.json, attempts.jsonl, config.yaml (as DESIGN section 4 has them). pictures:
    what the model does, computed by the caller. environment: label and value (versions, hosts). Returns the path.
    """
    root = Path(root)
    rows = read_rows(root / "metrics.jsonl")
    known, attempts = _records(root)
    status, result = known["status.json"], known["result.json"]
    kept = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
    for split, metrics in (result.get("metrics") or {}).items():
        kept |= {f"{split} {name}": text for name, text in _figures(metrics)}
    panels = ["loss", *metric_names(rows), *(name for name in ASIDE if any(name in row for row in rows))]
    body = [
        f'<section><div class="tiles">{_tiles(rows, {**result, **status})}</div></section>',
        _section("Error", _code(str(status.get("error") or ""))),
        _section("Files that can't be read", _table(("", ""), problems(open_storage(root)))),
        _section("Curves", _panels(_panel(rows, name) for name in panels if rows)),
        _section("The model that was kept", _table(("", ""), kept.items())),
        *(_picture(picture) for picture in pictures),
        _section("Starts and ends", _table(("time (UTC)", ""), _attempts(attempts))),
        _section("Config", _code(_text(root / "config.yaml") if known["config.yaml"] else "")),
        _section("Environment", _table(("", ""), (environment or {}).items())),
    ]
    return _write(root / "report.html", root.resolve().name, body)


def write_comparison(roots: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Lays the curves of several runs over each other, with results and the keys in which their configs differ."""
    paths = [Path(root) for root in roots]
    names = [root.resolve().name for root in paths]
    if len(set(names)) < len(names):
        names = [str(root) for root in paths]
    every = {name: read_rows(root / "metrics.jsonl") for name, root in zip(names, paths, strict=True)}
    panels = ["loss", *dict.fromkeys(name for rows in every.values() for name in metric_names(rows)), "lr"]
    records = [_records(root)[0] for root in paths]
    configs = [known["config.yaml"] for known in records]
    outcome = []
    for name, known in zip(names, records, strict=True):
        result = known["result.json"]
        metrics, time = result.get("metrics") or {}, result.get("seconds")
        step = result.get("step") or max((row["step"] for row in every[name]), default=0)
        figures = (", ".join(map(" ".join, _figures(metrics.get(split) or {}))) for split in ("val", "test"))
        spent = format_seconds(time) if time is not None else ""
        outcome.append((name, result.get("state", "not completed"), f"{step:,}", spent, *figures))
    body = [
        _section("Results", _table(("run", "state", "step", "time", "val", "test"), outcome)),
        _section("Curves", _panels(_overlay(every, name) for name in panels)),
        _section(
            "Where the configs differ",
            _table(("key", *names), differences(configs)) or "nowhere",
        ),
    ]
    return _write(Path(path), " / ".join(names), body)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """(key, value in each config) of the dotted keys that aren't the same in all; `-` where there is none."""
    flat = [dict(_flatten(config)) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, *(str(config.get(key, "-")) for config in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flatten(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield key, value
        return
    for name, part in items:
        yield from _flatten(part, f"{key}.{name}" if key else str(name))


def _tiles(rows: list[Row], known: dict[str, Any]) -> str:
    """The figures that a person looks for first."""
    state = str(known.get("state") or "unknown")
    tiles = {"state": state}
    for split in ("test", "val"):
        metrics = (known.get("metrics") or {}).get(split) or {}
        tiles |= {f"{split} {name}": text for name, text in _figures(metrics) if name != "eval_samples"}
    for name, label in (("step", "step"), ("epoch", "epoch"), ("world_size", "processes")):
        if known.get(name) is not None:
            tiles[label] = format_number(name, known[name])
    if "seconds" in known and state == "completed":  # result.json's: not of a run that went on since
        tiles["time"] = format_seconds(known["seconds"])
    for name, label, mean in (("samples_per_s", "samples/s", median), ("data_wait", "waiting for data", fmean)):
        values = [row[name] for row in rows if row.get(name, nan) == row.get(name, nan)]
        if values:
            tiles[label] = f"{mean(values):.0%}" if name == "data_wait" else format_number(name, mean(values))
    css = state if state in ("completed", "failed", "preempted", "running") else ""
    return "".join(
        f'<div class="tile {css}"><span>{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in tiles.items()
    )


def _panel(rows: list[Row], name: str) -> str:
    figure = new_figure(4.4, 3.1)
    draw_panel(figure.subplots(), rows, name)
    return _image(render(figure, "svg"), f"{name} over the steps")


def _overlay(every: Mapping[str, list[Row]], metric: str) -> str:
    """One metric of all runs: val (the train rows where there is no val), a color a run."""
    figure = new_figure(5.2, 3.6)
    axis = figure.subplots()
    for color, (name, rows) in zip(itertools.cycle(RUN_COLORS), every.items(), strict=False):
        split = "val" if metric != "lr" and series(rows, "val", metric)[0] else "train"
        steps, values = series(rows, split, metric)
        if steps:
            label = plain(name).lstrip("_") + (f"  {values[-1]:.4g}" if metric != "lr" else "")
            axis.plot(steps, values, color=color, linewidth=1.6, label=label)
            axis.legend(frameon=False, fontsize=8.5)
    dress(axis, TITLES.get(metric, metric))
    return _image(render(figure, "svg"), f"{metric} of all runs")


def _picture(picture: Picture) -> str:
    if isinstance(picture, Regression):
        return _section(
            "Predicted against true", _image(render(draw_regression(picture), "svg"), "predicted over true")
        )
    if isinstance(picture, Boundary):
        stills = sorted({round(k * (len(picture.pngs) - 1) / 3) for k in range(4)})
        frames = [_image(boundary_gif(picture), "the decision boundary as it moved", "gif")]
        frames += [_image(picture.pngs[i], f"boundary, frame {i}", "png") for i in stills]
        return _section("Decision boundary", _panels(frames))
    cells = ""
    for one in picture.worst:
        shown = _image(picture_png(one.picture), f"sample {one.index}", "png") if one.picture is not None else ""
        caption = f"{one.truth} taken for {one.prediction}, {one.probability:.0%}; sample {one.index}"
        cells += f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"
    worst = f'<h2>Most wrong</h2><div class="worst">{cells}</div>' if cells else ""
    return _section("Confusion matrix", _image(render(draw_confusion(picture), "svg"), "confusion matrix") + worst)


def _attempts(records: Iterable[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    """attempts.jsonl as rows of a table."""
    for record in records:
        time, event = str(record.pop("time", ""))[:19].replace("T", " "), record.pop("event", "")
        yield time, ", ".join([event, *(f"{key} {value}" for key, value in record.items() if value not in (None, ""))])


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers among them, as people read them."""
    return [(name, format_number(name, value)) for name, value in metrics.items() if type(value) in (int, float)]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head) if any(head) else ""
    lines = ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>' if lines else ""


def _panels(images: Iterable[str]) -> str:
    inside = "".join(images)
    return f'<div class="panels">{inside}</div>' if inside else ""


def _code(text: str | None) -> str:
    return f"<pre>{escape(text)}</pre>" if text else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _image(data: bytes, text: str, kind: str = "svg+xml") -> str:
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _write(path: Path, title: str, body: Sequence[str]) -> Path:
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, body)))
    with replacing(path) as part:
        part.write_text(visible(page), encoding="utf-8")
    return path


def _records(root: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The mappings in config.yaml, status.json and result.json, {} where one can't be read, and the starts and ends."""
    storage, known = open_storage(root), dict[str, dict[str, Any]]()
    for name in ("config.yaml", "status.json", "result.json"):
        try:
            known[name] = read_mapping(storage, name, whole=False) or {}
        except SideFileError:
            known[name] = {}  # told among the problems
    return known, read_lines(storage, "attempts.jsonl")[0]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
