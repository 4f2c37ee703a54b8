"""The table of runs: the state and progress of each, and where their configs differ. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from dist_train.config.changes import differing
from dist_train.config.errors import mask, visible
from dist_train.config.fields import better_is_lower
from dist_train.files import StorageError
from dist_train.runtime.lease import look_at_owner
from dist_train.runtime.sidefiles import SideFileError, read_lines, read_mapping, read_whole
from dist_train.runtime.storage import Storage
from dist_train.text import aligned, format_number, format_seconds
from dist_train.tracking.records import parse
from dist_train.views.curves import metric_names

DEPTH = 8  # a run's name may hold slashes; the limit ends circles of links
COLUMNS = 6  # keys shown side by side
TAIL = 8192  # bytes of metrics.jsonl in which the last train row is looked for
REASON = 60  # characters of a reason in the table
UNSHOWN = ("run.", "checkpoint.resume", "checkpoint.accept_changes")
HEAD = ("run", "state", "step", "epoch", "best", "samples/s", "age", "attempts", "reason")


@dataclass
class RunRow:
    """What is shown of a run.

    Attributes:
        state: that of status.json, or `starting`, `never started`, `dead`, `unreadable`.
        best: metric, value and step of the best evaluation.
        age_seconds: since the run last wrote something. reason: why it stopped, and which files can't be read.
    """

    run: str
    state: str = "unreadable"
    step: int = 0
    epoch: int = 0
    best: dict[str, Any] | None = None
    samples_per_s: float | None = None
    age_seconds: int | None = None
    attempts: int = 0
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """The line of the table, by `HEAD`."""
        best, speed, age = self.best, self.samples_per_s, self.age_seconds
        reason = " ".join(visible(mask(self.reason)).split())
        return [
            self.run,
            self.state,
            f"{self.step:,}",
            f"{self.epoch:,}",
            f"{best['metric']} {format_number(best['metric'], best['value'])} (step {best['step']:,})" if best else "-",
            f"{speed:,.0f}" if speed is not None else "-",
            format_seconds(age) if age is not None else "-",
            f"{self.attempts:,}",
            reason if len(reason) <= REASON else reason[: REASON - 3] + "...",
        ]


def runs_page(root: Storage, as_json: bool) -> str:
    """A table of the runs below `root` and one of the keys in which their configs differ, or both as JSON."""
    rows = [read_run(root, name) for name in find_runs(root)]
    found = _differences(rows)
    if as_json:
        shown = [{name: value for name, value in asdict(row).items() if name != "config"} for row in rows]
        return json.dumps({"runs": shown, "differences": found}, indent=2)
    if not rows:
        return f"{root.location} holds no runs"
    lines = aligned([HEAD, *(row.cells() for row in rows)])
    if found:
        lines += ["", *aligned(_by_run(found) if len(found) <= COLUMNS else _by_key(found))]
    return "\n".join(lines)


def find_runs(root: Storage, name: str = "") -> list[str]:
    """Names of the directories that hold a run, sorted; an empty one where `root` itself does."""
    inside = set(root.list(name))
    if inside & {"status.json", ".lease"}:
        return [name]
    found: list[str] = []
    for inner in sorted(inside) if name.count("/") < DEPTH else ():
        if not inner.startswith("."):
            with contextlib.suppress(NotADirectoryError, StorageError):  # a file, or a directory without permission
                found += find_runs(root, f"{name}/{inner}".lstrip("/"))
    return found


def read_run(root: Storage, name: str) -> RunRow:
    """The row of a run; one that can't be read has its reason, and doesn't hide the others."""
    row = RunRow(name or root.location.rpartition("/")[2])
    try:
        _read_into(row, root.sub(name))
    except Exception as error:
        return RunRow(row.run, reason=f"{type(error).__name__}: {error}")
    return row


def _read_into(row: RunRow, run: Storage) -> None:
    faults: list[str] = []

    def found(read: Callable[[Storage, str], Any], name: str) -> Any:
        try:
            return read(run, name)
        except SideFileError as error:
            faults.append(str(error))
            return None

    row.config, status = found(read_mapping, "config.yaml") or {}, found(read_mapping, "status.json") or {}
    unreadable = bool(faults)
    attempts, fault = read_lines(run, "attempts.jsonl")
    records = found(read_whole, "metrics.jsonl") or b""
    faults = [text.removeprefix(f"{run.location}/") for text in (*faults, fault) if text]
    tail = (b"\n" + records)[-TAIL:].partition(b"\n")[2]
    if any(line and not line.startswith(b"{") for line in tail.split(b"\n")):
        faults.append("metrics.jsonl: lines that are no rows")
    last = (_rows(tail, "train") or [{}])[-1]
    alive, renewed = look_at_owner(run)
    row.state = status.get("state") or ("starting" if alive else "never started")
    reason = status.get("error") or next((line["cause"] for line in reversed(attempts) if line.get("cause")), "")
    if unreadable:
        row.state = "unreadable"
    elif row.state == "running":
        reason = "" if alive else "killed, or its host went down: run the same command again to resume"
        row.state = "running" if alive else "dead"
    times = [_time(text) for text in (status.get("updated_at"), last.get("time"), renewed)]
    seen = [time for time in times if time is not None]
    row.step = max(status.get("step", 0), last.get("step", 0))  # status.json is written only every few seconds
    row.epoch = status.get("epoch", 0)
    row.best = best_of(_rows(records, "val"), row.config)
    speed = last.get("samples_per_s")
    row.samples_per_s = speed if isinstance(speed, int | float) else None
    row.age_seconds = max(0, round((datetime.now(UTC) - max(seen)).total_seconds())) if seen else None
    row.attempts = sum(line["event"] == "start" for line in attempts)
    row.reason = "; ".join(filter(None, [*faults, str(reason)]))


def _rows(lines: bytes, split: str) -> list[dict[str, Any]]:
    """The rows of a split in lines of metrics.jsonl. Only lines that hold its name are parsed: there may be millions."""
    word = f'"{split}"'.encode()
    rows = [parse(line) for line in lines.splitlines(keepends=True) if word in line]
    return [row for row in rows if row is not None]


def _time(text: Any) -> datetime | None:
    """A time with its zone; None for anything else."""
    with contextlib.suppress(ValueError, TypeError):
        time = datetime.fromisoformat(text)
        return time if time.tzinfo is not None else None
    return None


def best_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any] | None:
    """Metric, value and step of the best evaluation, by the metric of `checkpoint.keep_best`."""
    choice = str((config.get("checkpoint") or {}).get("keep_best") or "auto")
    mode, _, metric = choice.rpartition(" ")
    if metric == "auto":
        metric = f"val/{next(iter(metric_names(rows)), 'loss')}"
    name = metric.removeprefix("val/")
    values = [(row[name], row["step"]) for row in rows if isinstance(row.get(name), int | float)]  # null: not finite
    if not values:
        return None
    lower = mode == "min" if mode else better_is_lower(metric)
    value, step = min(values, key=lambda pair: pair[0] if lower else -pair[0])
    return {"metric": metric, "value": value, "step": step}


def _differences(rows: Sequence[RunRow]) -> dict[str, dict[str, str]]:
    """key -> run -> value, of the keys in which the configs differ."""
    with_config = [row for row in rows if row.config]
    found = differing([row.config for row in with_config]) if len(with_config) > 1 else []
    every = {row.run: "-" for row in rows}
    return {
        key: every | {row.run: value for row, value in zip(with_config, values, strict=True)}
        for key, *values in found
        if not key.startswith(UNSHOWN)
    }


def _by_run(found: dict[str, dict[str, str]]) -> list[list[str]]:
    """One line per run, as for a sweep."""
    runs = next(iter(found.values()))
    return [["run", *found], *([run, *(values[run] for values in found.values())] for run in runs)]


def _by_key(found: dict[str, dict[str, str]]) -> list[list[str]]:
    """One line per key with each of its values, for runs that have little in common."""
    lines = []
    for key, values in found.items():
        groups = {value: [run for run in values if values[run] == value] for value in values.values()}
        lines.append([key, "   ".join(f"{value} ({', '.join(runs)})" for value, runs in groups.items())])
    return lines
