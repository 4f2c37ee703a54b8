"""report.html: one file that shows a run; nothing from the network, and only our own script."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from dist_train.config.changes import not_default
from dist_train.config.errors import visible
from dist_train.files import replacing
from dist_train.pages.charts import NUMBERED, Mark, chart, script
from dist_train.pages.curves import (
    Horizontal,
    Rows,
    aside_names,
    best_of,
    horizontal_of,
    judging,
    metric_names,
    panel_of,
    series,
)
from dist_train.pages.figures import Cell, Picture, Section
from dist_train.runtime.lease import look_at_owner
from dist_train.runtime.sidefiles import SideFileError, problems, read_lines, read_mapping
from dist_train.runtime.storage import open_storage
from dist_train.text import format_number, format_seconds
from dist_train.tracking.records import Row, read_rows

BEST = ("metric", "best of val", "at", "last of val", "test")


def write_report(
    root: str | os.PathLike[str],
    *,
    pictures: Sequence[Picture] = (),
    environment: Mapping[str, str] | None = None,
    rows: Rows | None = None,
) -> Path:
    """Write report.html into a run's directory, from the files there; whatever is missing is left out.

    Read: metrics.jsonl, status.json, result.json, attempts.jsonl, config.yaml. pictures: what the model does, computed by
    the caller. environment: label and value, beside what attempts.jsonl says of the last start. rows: of metrics.jsonl,
    where they have been read. Returns the path.
    """
    root = Path(root)
    rows = Rows(read_rows(root / "metrics.jsonl")) if rows is None else rows
    known, attempts = read_records(root)
    status, result, config = known["status.json"], known["result.json"], known["config.yaml"]
    if status.get("state") == "running" and (root / ".lease").is_dir() and not look_at_owner(open_storage(root))[0]:
        status = {**status, "state": "dead"}  # as `runs` calls a run that was killed
    text = (root / "config.yaml").read_text(encoding="utf-8", errors="replace") if config else ""
    changed = yaml.safe_dump(not_default(config), sort_keys=False, allow_unicode=True) if config else ""
    axis, marks = horizontal_of(rows), _marks(attempts, result)
    panels = ["loss", *metric_names(rows), *aside_names(rows)]
    noted = ", ".join(["", *(["dotted: kept, or resumed (Starts and ends)"] if marks else [])])
    sections = [
        Section("Error", str(status.get("error") or ""), "text"),
        Section("Files that can't be read", problems(open_storage(root)), "table"),
        Section("Environment", _environment(attempts, environment or {}), "table"),
        Section(
            "Curves",
            [chart(panel_of(rows, name, known["judging"]), axis, marks) for name in panels if rows],
            "charts",
            note=noted,
        ),
        Section("Best and last", list(best_rows(rows, known["judging"])), "table", BEST),
        Section("The model that was kept", list(_kept(result).items()), "table"),
        *(section for picture in pictures for section in picture.sections()),
        Section("Starts and ends", list(_attempts(attempts)), "table", _STARTS),
        Section(
            "Config: what differs from the defaults",
            changed,
            "text",
            more=("the whole config.yaml", text) if text else None,
        ),
    ]
    return write_html(
        root / "report.html", root.resolve().name, sections, axis, _tiles(rows, {**result, **status}, known["judging"])
    )


def _tiles(rows: list[Row], known: dict[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline values: label, value, and where it was."""
    state = str(known.get("state") or "unknown")
    tiles = [("state", state, "")]
    for name in ["loss", *metric_names(rows)]:
        best = best_of(rows, "val", name, config)
        if best is not None:
            tiles.append((f"best val {name}", format_number(name, best[1]), _where(rows, best[0])))
    for name, text in _numbers((known.get("metrics") or {}).get("test") or {}):
        tiles += [(f"test {name}", text, "")] if name != "eval_samples" else []
    for name, label in (("step", "step"), ("epoch", "epoch"), ("world_size", "processes")):
        if known.get(name) is not None:
            tiles.append((label, format_number(name, known[name]), ""))
    if "seconds" in known and state == "completed":  # result.json's: not of a run that was resumed since
        tiles.append(("time", format_seconds(known["seconds"]), ""))
    for name, label, mean in (("samples_per_s", "samples/s", median), ("data_wait", "waiting for data", fmean)):
        values = [row[name] for row in rows if row.get(name, nan) == row.get(name, nan)]
        if values:
            text = f"{mean(values):.0%}" if name == "data_wait" else format_number(name, mean(values))
            tiles.append((label, text, ""))
    return tiles


def _where(rows: Sequence[Row], step: int) -> str:
    epoch = next((row.get("epoch") for row in rows if row["step"] == step and row.get("epoch")), None)
    return f"step {step:,}" + (f", epoch {epoch:,}" if isinstance(epoch, int) else "")


def best_rows(rows: Sequence[Row], config: Mapping[str, Any]) -> Iterator[Sequence[str | Cell]]:
    """Of each metric that was evaluated: the best and where, the last, and the test's."""
    for name in ["loss", *metric_names(rows)]:
        best = best_of(rows, "val", name, config)
        last, test = ([v for v in series(rows, split, name)[1] if v == v][-1:] for split in ("val", "test"))
        texts = ["".join(format_number(name, value) for value in values) for values in (last, test)]
        if best is not None:
            yield name, Cell(format_number(name, best[1]), best=True), _where(rows, best[0]), *texts
        elif test:
            yield name, "", "", *texts


def _kept(result: Mapping[str, Any]) -> dict[str, str]:
    """What result.json says of the weights, and whatever else is in it; metrics have a table of their own."""
    return {key: str(value) for key, value in result.items() if not isinstance(value, dict | list)}


def _environment(attempts: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> list[tuple[str, str]]:
    """How the last start was run: command, code, versions, devices, hosts."""
    start: Mapping[str, Any] = next((one for one in reversed(attempts) if one.get("event") == "start"), {})
    git, numerics, versions = (
        {**found} if isinstance(found := start.get(key), dict) else {} for key in ("git", "numerics", "versions")
    )
    found = {"command": str(start.get("command") or "")}
    if git:
        changed = _texts(git.get("changed"))
        listed = ", ".join(changed[:10]) + (f" and {len(changed) - 10} more" if len(changed) > 10 else "")
        state = f"with changes that aren't committed in {listed}" if changed else "without changes"
        found["git"] = f"{git.get('commit')} ({git.get('branch')}), {state}"
    versions = {key: value for key, value in given.items() if key in ("dist_train", "torch", "python")} | versions
    found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    size, nodes = start.get("world_size"), start.get("nodes")
    device = str(given.get("device") or numerics.get("device") or "")
    if size:
        ranks = f"{size} process{'es' * (size != 1)}" + (f" on {nodes} nodes" if nodes not in (None, 1) else "")
        details = [
            numerics.get("cuda") and f"CUDA {numerics['cuda']}",
            numerics.get("cpu_capability"),
            numerics.get("threads") and f"{numerics['threads']} thread(s)",
        ]
        device = ", ".join(map(str, filter(None, [ranks, numerics.get("device") or device, *details])))
    found["devices"] = device
    found["host"] = str(start.get("host") or given.get("host") or "")
    found |= {key: value for key, value in given.items() if key not in (*versions, *git, "device", "host")}
    return [(key, value) for key, value in found.items() if value]


def _marks(attempts: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> list[Mark]:
    """Where the run was resumed, with what had changed; and the step whose weights are kept."""
    starts = [
        record for record in attempts if record.get("event") == "start" and type(record.get("resumed_from")) is int
    ]
    resumed = [record for record in starts if record["resumed_from"] > 0]
    marks = []
    for record in resumed:
        changed = _texts(record.get("changed"))
        label = f"{record.get('attempt')}" if len(resumed) <= NUMBERED or changed else ""
        text = f"start {record.get('attempt')}: resumed from step {record['resumed_from']:,}"
        marks.append(Mark(record["resumed_from"], "; ".join([text, *changed]), label))
    if result.get("kept") == "best" and type(result.get("kept_step")) is int:
        marks.append(Mark(result["kept_step"], f"the weights of step {result['kept_step']:,} are kept", "kept"))
    return marks


_STARTS = ("time (UTC)", "event", "step", "processes", "host", "what changed, or why it ended")


def _attempts(records: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str | Cell]]:
    """attempts.jsonl as rows of a table."""
    for record in records:
        event, start = str(record.get("event", "")), record.get("event") == "start"
        step = record.get("resumed_from" if start else "step", "")
        facts = [
            *_texts(record.get("changed")),
            *_texts(record.get("bits_may_differ")),
            str(record.get("cause") or ""),
        ]
        name = f"{event} {record.get('attempt', '')}".strip()
        state = str(record.get("state") or "")
        yield (
            str(record.get("time", ""))[:19].replace("T", " "),
            name if start or not state else f"{name}: {state}",
            f"{step:,}" if isinstance(step, int) else str(step),
            str(record.get("world_size", "")),
            str(record.get("host", "")),
            "; ".join(filter(None, facts)),
        )


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers among them, as people read them."""
    return [(name, format_number(name, value)) for name, value in metrics.items() if type(value) in (int, float)]


def write_html(
    path: Path, title: str, sections: Sequence[Section], axis: Horizontal, tiles: Sequence[tuple[str, str, str]] = ()
) -> Path:
    """Write a page of these sections, all in one file, atomically; returns its path.

    Args:
        axis: that of the charts, whose epochs the page can switch to.
        tiles: (label, value, note) at the top, the first one the run's state. Raises OSError: it can't be written.
    """
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    state = tiles[0][1] if tiles else ""
    css = state if state in ("completed", "failed", "preempted", "running", "dead") else ""
    code = script()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    shown = {"title": title, "sections": sections, "tiles": tiles, "css": css, "epochs": json.dumps(axis.epochs)}
    text = visible(page.render(**shown, script=code, digest=digest))
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def read_records(root: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The mappings in config.yaml, status.json and result.json, {} where one can't be read, and the starts and ends.

    `judging` is the config as `best_of` takes it.
    """
    storage, known = open_storage(root), dict[str, dict[str, Any]]()
    for name in ("config.yaml", "status.json", "result.json"):
        try:
            known[name] = read_mapping(storage, name, whole=False) or {}
        except SideFileError:
            known[name] = {}  # listed among the problems
    attempts = read_lines(storage, "attempts.jsonl")[0]
    return {**known, "judging": judging(known["config.yaml"], attempts)}, attempts
