"""`runs`: the runs in a directory or under a URL, how far they are, and where their configs differ; imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import Parser

if TYPE_CHECKING:
    from dist_train.runtime.storage import Storage

DEPTH = 3  # a run's name may hold slashes
COLUMNS = 6  # keys that are shown side by side
UNTOLD = ("run.", "checkpoint.resume", "checkpoint.accept_changes")


def main(arguments: Sequence[str]) -> int:
    """Print a table of runs and one of the keys in which they differ, or both as JSON."""
    parser = Parser("runs", "The runs in a directory: state, step, best metric, age, starts; and where they differ.")
    parser.add_argument("dir", nargs="?", default="runs", metavar="DIR", help="by default runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(arguments))
    from dist_train.config.errors import ConfigError
    from dist_train.runtime.storage import Storage

    root = Storage(options.dir)
    if root.is_local and not os.path.isdir(options.dir):
        raise ConfigError.single("DIR", f"expected a directory with runs, found no directory {options.dir}")
    runs = [read_run(root, name) for name in find_runs(root)]
    differing = _differing(runs)
    if options.json:
        print(json.dumps({"runs": [run["shown"] for run in runs], "differences": differing}, indent=2))
        return 0
    if not runs:
        print(f"{options.dir} holds no runs")
        return 0
    head = ("run", "state", "step", "epoch", "best", "age", "starts")
    print(*_aligned([head, *(_cells(run["shown"]) for run in runs)]), sep="\n")
    if differing:
        print("", *_aligned(_by_run(differing) if len(differing) <= COLUMNS else _by_key(differing)), sep="\n")
    return 0


def _by_run(differing: dict[str, dict[str, str]]) -> list[list[str]]:
    """A line a run, as for a sweep."""
    runs = next(iter(differing.values()))
    return [["run", *differing], *([run, *(values[run] for values in differing.values())] for run in runs)]


def _by_key(differing: dict[str, dict[str, str]]) -> list[list[str]]:
    """A line a key with each of its values, for runs that have little in common."""
    lines = []
    for key, values in differing.items():
        groups = {value: [run for run in values if values[run] == value] for value in values.values()}
        lines.append([key, "   ".join(f"{value} ({', '.join(runs)})" for value, runs in groups.items())])
    return lines


def find_runs(root: Storage) -> list[str]:
    """Names of the directories that hold a run, sorted; an empty one where `root` itself does."""
    found: list[str] = []

    def look(name: str, depth: int) -> None:
        try:
            inside = root.list(name)
        except NotADirectoryError:
            return
        if "config.yaml" in inside or "status.json" in inside:
            found.append(name)
        elif depth < DEPTH:
            for inner in inside:
                if not inner.startswith("."):
                    look(f"{name}/{inner}".lstrip("/"), depth + 1)

    look("", 0)
    return found


def read_run(root: Storage, name: str) -> dict[str, Any]:
    """`shown`, what is told of a run, and `config`, its config."""
    import yaml

    def text(file: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return root.read_bytes(f"{name}/{file}".lstrip("/")).decode()
        return ""

    config = yaml.safe_load(text("config.yaml")) or {}
    status = json.loads(text("status.json") or "{}")
    starts = [line for line in _lines(text("attempts.jsonl")) if line.get("event") == "start"]
    age = None
    if status.get("updated_at"):
        age = round((datetime.now(UTC) - datetime.fromisoformat(status["updated_at"])).total_seconds())
    shown = {
        "run": name or root.location.rstrip("/").rpartition("/")[2],
        "state": status.get("state", "never started"),
        "step": status.get("step", 0),
        "epoch": status.get("epoch", 0),
        "best": best_of(_lines(text("metrics.jsonl"), holding='"val"'), config),
        "age_seconds": age,
        "starts": len(starts),
        "error": status.get("error"),
    }
    return {"shown": shown, "config": config}


def best_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any] | None:
    """The best evaluation by the metric that decides which checkpoint is kept: its metric, value and step."""
    from dist_train.engine.stopping import better_is_lower
    from dist_train.tracking.curves import metric_names

    choice = str((config.get("checkpoint") or {}).get("keep_best") or "auto")
    mode, _, metric = choice.rpartition(" ")
    evaluated = [row for row in rows if row.get("split") == "val"]
    if metric == "auto":
        metric = f"val/{next(iter(metric_names(evaluated)), 'loss')}"
    name = metric.removeprefix("val/")
    values = [(row[name], row["step"]) for row in evaluated if row.get(name) is not None]  # null: it wasn't finite
    if not values:
        return None
    lower = mode == "min" if mode else better_is_lower(metric)
    value, step = min(values, key=lambda pair: pair[0] if lower else -pair[0])
    return {"metric": metric, "value": value, "step": step}


def _differing(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """key -> run -> value, of the keys in which the configs differ."""
    from dist_train.tracking.report import differences

    with_config = [run for run in runs if run["config"]]
    rows = differences([run["config"] for run in with_config]) if len(with_config) > 1 else []
    values = {row[0]: row[1:] for row in rows if not row[0].startswith(UNTOLD)}
    names = [run["shown"]["run"] for run in with_config]
    every = {run["shown"]["run"]: "-" for run in runs}
    return {key: every | dict(zip(names, row, strict=True)) for key, row in values.items()}


def _cells(shown: dict[str, Any]) -> tuple[str, ...]:
    from dist_train.tracking.text import format_number, format_seconds

    best, age = shown["best"], shown["age_seconds"]
    figure = f"{best['metric']} {format_number(best['metric'], best['value'])} (step {best['step']:,})" if best else ""
    step, epoch, starts = (f"{shown[key]:,}" for key in ("step", "epoch", "starts"))
    return shown["run"], shown["state"], step, epoch, figure, format_seconds(age) if age is not None else "", starts


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _lines(text: str, holding: str = "") -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that hold a word; a kill may have torn the last one."""
    return [json.loads(line) for line in text.splitlines() if holding in line and line.endswith("}")]
