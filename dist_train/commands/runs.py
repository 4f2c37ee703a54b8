"""`runs`: the runs below a directory or URL, how far they are, and where their configs differ; imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import Parser
from dist_train.config.errors import mask, visible

if TYPE_CHECKING:
    from dist_train.runtime.storage import Storage

DEPTH = 8  # a run's name may hold slashes; links that go round in circles have an end
COLUMNS = 6  # keys that are shown side by side
TAIL = 8192  # characters of metrics.jsonl in which the last train row is looked for
REASON = 60  # characters of it that a table shows
PAUSE = 2.0  # seconds between two looks with --watch, at least
UNTOLD = ("run.", "checkpoint.resume", "checkpoint.accept_changes")
HEAD = ("run", "state", "step", "epoch", "best", "samples/s", "age", "attempts", "reason")


def main(arguments: Sequence[str]) -> int:
    """Print a table of runs and one of the keys in which they differ, or both as JSON; with --watch again and again."""
    parser = Parser("runs", "The runs below a directory or URL, how each one is, and where their configs differ.")
    parser.add_argument("dir", nargs="?", default="runs", metavar="DIR", help="by default runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", action="store_true", help="look again every two seconds, until Ctrl-C")
    options = parser.parse_args(list(arguments))
    from dist_train.config.errors import ConfigError
    from dist_train.runtime.storage import open_storage

    root = open_storage(options.dir)
    if root.is_local and not os.path.isdir(root.location):
        raise ConfigError.single("DIR", f"expected a directory with runs, found no directory {options.dir}")
    if not options.watch:
        print(_page(root, options.json))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            began = time.monotonic()
            page = _page(root, options.json)
            print("\x1b[H\x1b[2J" + page if sys.stdout.isatty() else page + "\n", flush=True)
            time.sleep(max(PAUSE, 5 * (time.monotonic() - began)))  # a store with many runs isn't kept busy by this
    return 0


def _page(root: Storage, as_json: bool) -> str:
    runs = [read_run(root, name) for name in find_runs(root)]
    differing = _differing(runs)
    if as_json:
        return json.dumps({"runs": [run["shown"] for run in runs], "differences": differing}, indent=2)
    if not runs:
        return f"{root.location} holds no runs"
    lines = _aligned([HEAD, *(_cells(run["shown"]) for run in runs)])
    if differing:
        lines += ["", *_aligned(_by_run(differing) if len(differing) <= COLUMNS else _by_key(differing))]
    return "\n".join(lines)


def find_runs(root: Storage) -> list[str]:
    """Names of the directories that hold a run, sorted; an empty one where `root` itself does."""
    from dist_train.files import StorageError

    found: list[str] = []

    def look(name: str) -> None:
        inside = set(root.list(name))
        if inside & {"status.json", ".lease"}:
            found.append(name)
        elif name.count("/") < DEPTH:
            for inner in sorted(inside):
                if not inner.startswith("."):
                    with contextlib.suppress(
                        NotADirectoryError, StorageError
                    ):  # a file, or a directory of somebody else
                        look(f"{name}/{inner}".lstrip("/"))

    look("")
    return found


def read_run(root: Storage, name: str) -> dict[str, Any]:
    """`shown`, what is told of a run, and `config`, its config."""
    shown = {
        "run": name or root.location.rpartition("/")[2],
        "state": "unreadable",
        "step": 0,
        "epoch": 0,
        "best": None,
    }
    shown |= {"samples_per_s": None, "age_seconds": None, "attempts": 0, "reason": ""}
    try:
        facts, config = _read(root.sub(name))
    except Exception as error:  # a run that can't be read doesn't hide the others
        facts, config = {"reason": f"{type(error).__name__}: {error}"}, {}
    return {"shown": shown | facts, "config": config}


def _read(run: Storage) -> tuple[dict[str, Any], dict[str, Any]]:
    from dist_train.runtime.lease import look_at_owner
    from dist_train.runtime.sidefiles import SideFileError, read_lines, read_mapping

    wrong: list[str] = []

    def mapping(name: str) -> dict[str, Any]:
        try:
            return read_mapping(run, name) or {}
        except SideFileError as error:
            wrong.append(str(error).removeprefix(f"{run.location}/"))
            return {}

    config, status = mapping("config.yaml"), mapping("status.json")
    attempts, torn = read_lines(run, "attempts.jsonl")
    wrong += [torn.removeprefix(f"{run.location}/")] if torn else []
    records = ""
    try:
        records = run.read_bytes("metrics.jsonl").decode(errors="replace")
    except FileNotFoundError:
        pass
    except OSError as error:
        wrong.append(f"metrics.jsonl: {error.strerror}")
    tail = ("\n" + records)[-TAIL:].partition("\n")[2]
    if any(line and not line.startswith("{") for line in tail.split("\n")):
        wrong.append("metrics.jsonl: lines that are no rows")
    last = (_lines(tail, holding='"train"') or [{}])[-1]
    alive, renewed = look_at_owner(run)
    state = status.get("state") or ("starting" if alive else "never started")
    reason = status.get("error") or next((line["cause"] for line in reversed(attempts) if line.get("cause")), "")
    if any(told.startswith(("config.yaml", "status.json")) for told in wrong):
        state = "unreadable"
    if state == "running":
        state, reason = ("running", "") if alive else ("dead", "killed, or its host went down: run it again to go on")
    signs = [*map(_moment, (status.get("updated_at"), last.get("time"), renewed))]
    seen = [sign for sign in signs if sign is not None]
    speed = last.get("samples_per_s")
    return {
        "state": state,
        "step": max(status.get("step", 0), last.get("step", 0)),  # a status is written every few seconds only
        "epoch": status.get("epoch", 0),
        "best": best_of(_lines(records, holding='"val"'), config),
        "samples_per_s": speed if isinstance(speed, int | float) else None,
        "age_seconds": max(0, round((datetime.now(UTC) - max(seen)).total_seconds())) if seen else None,
        "attempts": sum(line["event"] == "start" for line in attempts),
        "reason": "; ".join([*wrong, str(reason)] if reason else wrong),
    }, config


def _moment(text: Any) -> datetime | None:
    """A time as records have it; None for anything else."""
    with contextlib.suppress(ValueError, TypeError):
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo is not None else None
    return None


def best_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any] | None:
    """The best evaluation by the metric that decides which checkpoint is kept: its metric, value and step."""
    from dist_train.config.fields import better_is_lower
    from dist_train.views.curves import metric_names

    choice = str((config.get("checkpoint") or {}).get("keep_best") or "auto")
    mode, _, metric = choice.rpartition(" ")
    if metric == "auto":
        metric = f"val/{next(iter(metric_names(rows)), 'loss')}"
    name = metric.removeprefix("val/")
    values = [
        (row[name], row["step"]) for row in rows if isinstance(row.get(name), int | float)
    ]  # null: it wasn't finite
    if not values:
        return None
    lower = mode == "min" if mode else better_is_lower(metric)
    value, step = min(values, key=lambda pair: pair[0] if lower else -pair[0])
    return {"metric": metric, "value": value, "step": step}


def _differing(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """key -> run -> value, of the keys in which the configs differ."""
    from dist_train.config.changes import differing

    with_config = [run for run in runs if run["config"]]
    rows = differing([run["config"] for run in with_config]) if len(with_config) > 1 else []
    values = {row[0]: row[1:] for row in rows if not row[0].startswith(UNTOLD)}
    names = [run["shown"]["run"] for run in with_config]
    every = {run["shown"]["run"]: "-" for run in runs}
    return {key: every | dict(zip(names, row, strict=True)) for key, row in values.items()}


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


def _cells(shown: dict[str, Any]) -> list[str]:
    from dist_train.text import format_number, format_seconds

    best, speed, age = shown["best"], shown["samples_per_s"], shown["age_seconds"]
    reason = " ".join(visible(mask(shown["reason"])).split())
    return [
        shown["run"],
        shown["state"],
        f"{shown['step']:,}",
        f"{shown['epoch']:,}",
        f"{best['metric']} {format_number(best['metric'], best['value'])} (step {best['step']:,})" if best else "-",
        f"{speed:,.0f}" if speed is not None else "-",
        format_seconds(age) if age is not None else "-",
        f"{shown['attempts']:,}",
        reason if len(reason) <= REASON else reason[: REASON - 3] + "...",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _lines(text: str, holding: str = "") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in whole lines that hold a word; a kill may have torn the last one."""
    from dist_train.tracking.records import parse

    rows = [parse(line.encode()) for line in text.splitlines(keepends=True) if holding in line]
    return [row for row in rows if row is not None]
