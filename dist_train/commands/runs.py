"""`runs`: the runs in a directory, how far they are, and where their configs differ. Reads files, imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_train.commands.arguments import Parser

DEPTH = 3  # a run's name may hold slashes
UNTOLD = ("run.", "checkpoint.resume", "checkpoint.accept_changes")


def main(arguments: Sequence[str]) -> int:
    """Print a table of runs and one of the keys in which they differ, or both as JSON."""
    parser = Parser("runs", "The runs in a directory: state, step, best metric, age, starts; and where they differ.")
    parser.add_argument("dir", nargs="?", default="runs", metavar="DIR", help="by default runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(arguments))
    from dist_train.config.errors import ConfigError

    root = Path(options.dir)
    if not root.is_dir():
        raise ConfigError.single("DIR", f"expected a directory with runs, found no directory {options.dir}")
    runs = [read_run(path, root) for path in find_runs(root)]
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
        names = list(differing)
        rows = [[run["shown"]["run"], *(differing[key][run["shown"]["run"]] for key in names)] for run in runs]
        print("", *_aligned([["run", *names], *rows]), sep="\n")
    return 0


def find_runs(root: Path) -> list[Path]:
    """Directories that hold a run, sorted; `root` itself may be one."""
    found: list[Path] = []

    def look(folder: Path, depth: int) -> None:
        if (folder / "config.yaml").is_file() or (folder / "status.json").is_file():
            found.append(folder)
        elif depth < DEPTH:
            for inner in sorted(folder.iterdir()):
                if inner.is_dir() and not inner.name.startswith("."):
                    look(inner, depth + 1)

    look(root, 0)
    return found


def read_run(path: Path, root: Path) -> dict[str, Any]:
    """`shown`, what is told of a run, and `config`, its config."""
    from dist_train.tracking.records import read_rows

    config = _yaml(path / "config.yaml")
    status = _json(path / "status.json")
    name = str(path.relative_to(root)) if path != root else path.resolve().name
    starts = [line for line in _lines(path / "attempts.jsonl") if line.get("event") == "start"]
    age = None
    if status.get("updated_at"):
        age = round((datetime.now(UTC) - datetime.fromisoformat(status["updated_at"])).total_seconds())
    shown = {
        "run": name,
        "state": status.get("state", "never started"),
        "step": status.get("step", 0),
        "epoch": status.get("epoch", 0),
        "best": best_of(read_rows(path / "metrics.jsonl"), config),
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
    values = [(row[name], row["step"]) for row in evaluated if math.isfinite(row.get(name, math.nan))]
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


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a kill may have torn the last one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
