"""The runs below a directory or URL: the state, progress, metrics and config of each. Imports no torch; table.py shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from dist_train.files import StorageError
from dist_train.pages.curves import best_point, judging, lower_is_better, metric_names
from dist_train.runtime.lease import look_at_owner
from dist_train.runtime.sidefiles import SideFileError, read_lines, read_mapping, read_whole
from dist_train.runtime.storage import Storage
from dist_train.tracking.records import FIELDS, parse

DEPTH = 8  # a run's name may hold slashes; the limit ends circles of links
TAIL = 8192  # bytes of metrics.jsonl in which the last train row is looked for


@dataclass
class RunRow:
    """What is shown of a run.

    Attributes:
        state: that of status.json, or `starting`, `never started`, `dead`, `unreadable`.
        best: metric, value and step of the best evaluation.
        metrics: `val/NAME` where the best evaluation was, the last `test/NAME` and `train/loss`; None where it isn't finite.
        judging: the config as `views.curves.best_of` takes it.
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
    metrics: dict[str, float | None] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    judging: dict[str, Any] = field(default_factory=dict)


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
    val = _rows(records, "val")
    row.judging = judging(row.config, attempts)
    row.best = best_of(val, row.judging)
    step = row.best["step"] if row.best else None
    row.metrics = _metrics("val", [one for one in val if step in (None, one["step"])]) | _metrics(
        "test", _rows(records, "test")
    )
    row.metrics |= {"train/loss": last["loss"]} if isinstance(last.get("loss"), int | float) else {}
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


def _metrics(split: str, rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The metrics of the last of a split's rows, by `split/name`."""
    last = rows[-1] if rows else {}
    names = (name for name in last if name not in (*FIELDS, "eval_samples"))
    return {f"{split}/{name}": last[name] for name in names if isinstance(last[name], int | float | None)}


def _time(text: Any) -> datetime | None:
    """A time with its zone; None for anything else."""
    with contextlib.suppress(ValueError, TypeError):
        time = datetime.fromisoformat(text)
        return time if time.tzinfo is not None else None
    return None


def best_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any] | None:
    """Metric, value and step of the best evaluation, by the metric of `checkpoint.keep_best`: the one whose weights are kept."""
    choice = str((config.get("checkpoint") or {}).get("keep_best") or "auto")
    mode, _, metric = choice.rpartition(" ")
    if metric == "auto":
        metric = f"val/{next(iter(metric_names(rows)), 'loss')}"
    name = metric.removeprefix("val/")
    numbers = [row for row in rows if isinstance(row.get(name), int | float) and isfinite(row[name])]
    losses = {row["step"]: row["loss"] for row in rows if isinstance(row.get("loss"), int | float)}
    lower = mode == "min" if mode else lower_is_better(name, config)
    best = best_point(([row["step"] for row in numbers], [row[name] for row in numbers]), lower, losses)
    return None if best is None else {"metric": metric, "value": best[1], "step": best[0]}
