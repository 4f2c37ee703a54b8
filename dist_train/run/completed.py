"""A run that its config asks no more of: its result, for which a start on one process imports neither torch nor user code."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import ConfigError
from dist_train.files import StorageError
from dist_train.pages.result import Result
from dist_train.run.decide import Decision, decide
from dist_train.run.objects import was_seen
from dist_train.runtime.launch import read_placement
from dist_train.runtime.location import FILES, check_place, run_location
from dist_train.runtime.rundir import RunDir
from dist_train.text import format_number, format_seconds
from dist_train.tracking.console import Console

if TYPE_CHECKING:
    from dist_train.config.schema import Config

SETTLED_SECONDS = 60.0  # much longer than processes of one start come apart


def seems_completed(config: Config) -> Decision | None:
    """The decision, if this start will only return a result, so that no user code need be imported; `train_in` decides."""
    if "{time}" in str(config.run.name):  # found by its job only, whose name rank 0 reads
        return None
    try:
        run = RunDir(run_location(config))
        if not run.storage.exists("result.json"):
            return None
        check_place(run.location)
        decision = decide(config, run)
    except (ConfigError, StorageError, OSError):
        return None  # reported once all processes are connected
    return decision if decision.action == "completed" else None


def answer(config: Config, decision: Decision) -> Result | None:
    """The result of a completed run, shown by rank 0; None if there is more to do, or several processes have to agree on it."""
    placement, run = read_placement(os.environ), RunDir(run_location(config))
    if config.has_live_objects or (placement.size > 1 and not _same_for_all(run)):
        return None
    finished = (run.read_json("status.json") or {}).get("state") == "completed"
    if not finished or (config.tracking.report and not run.storage.exists("report.html")):
        return None  # a kill has left something unwritten
    if (result := run.read_json("result.json")) is None:
        return None
    result = with_nan(result)
    if placement.rank == 0:
        console = Console(True)
        try:
            show_completed(result, run, console, decision)
            console.end_block(end_lines(result, run))
        finally:
            console.close()
    return Result(result, run.location)


def _same_for_all(run: RunDir) -> bool:
    """Whether all processes find the same here without asking: they are on this machine, and nothing has changed lately."""
    env = os.environ
    if env.get("LOCAL_WORLD_SIZE", "") != env.get("WORLD_SIZE") or not run.storage.is_local:
        return False
    files = [run.path(name) for name in FILES]
    newest = max((path.stat().st_mtime for path in files if path.exists()), default=math.inf)
    return time.time() - newest > SETTLED_SECONDS


def fresh_name(config: Config, log: Callable[[str], object]) -> Config:
    """For a cell that is run again: where its run is completed, the same config under the next free name, NAME-2 say.

    A run that isn't completed, or that this config trains longer, keeps its name: it is resumed.
    """
    name = str(config.run.name or "run")
    if "{time}" in name or read_placement(os.environ).size > 1:
        return config
    found, number, trained = config, 1, was_seen(config.model)
    while _is_completed(found):
        number += 1
        found = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{name}-{number}"})})
    if number > 1:
        begins = "; it begins with the weights that this model has now" if trained else ""
        log(f"{run_location(config)} is completed: this cell trains again, as {name}-{number}{begins}")
    return found


def _is_completed(config: Config) -> bool:
    run = RunDir(run_location(config))
    result = run.read_json("result.json")
    if result is None or result["state"] != "completed":
        return False
    try:
        return decide(config, run).action == "completed"
    except ConfigError:  # trained with other objects or keys
        return True


def with_nan(result: dict[str, Any]) -> dict[str, Any]:
    """As it was before it was written: a metric that wasn't finite is null in JSON."""
    for metrics in result["metrics"].values():
        metrics.update({name: math.nan for name, value in metrics.items() if value is None})
    return result


def show_completed(result: dict[str, Any], run: RunDir, console: Console, decision: Decision) -> None:
    """Say that nothing is trained, and why."""
    console.note(
        f"{run.location} is completed, after {result['step']:,} steps; a longer trainer.duration resumes it, another "
        "run.name starts over"
    )
    for line in decision.warnings if console.rank0 else ():
        console.warn(line)


def end_lines(result: dict[str, Any], run: RunDir) -> list[tuple[str, str]]:
    """How the run ended, its metrics, and where its files are."""
    lines = [("state", f"{result['state']} at step {result['step']:,}: {result['reason']}")]
    for split, metrics in result.get("metrics", {}).items():
        counted = {name: value for name, value in metrics.items() if name != "eval_samples"}
        values = "  ".join(f"{name} {format_number(name, value)}" for name, value in counted.items())
        lines.append((split, f"{values}  ({metrics.get('eval_samples', 0):,} samples)"))
    lines.append(("time", f"{format_seconds(result['seconds'])} of training, over all starts"))
    completed = result["state"] == "completed"
    if completed:
        kept = f" (step {result['kept_step']:,})" if result["kept_step"] != result["step"] else ""
        lines.append(("model", f"{run.location}/model.pt{kept}"))
    shown = [
        ("report", "report.html", ""),
        ("curves", "curves.png", ""),
        ("board", "tensorboard", "tensorboard --logdir "),
    ]
    for label, name, command in shown:
        if run.path(name).exists():
            lines.append((label, f"{command}{run.location}/{name}"))
    return (
        lines
        if completed
        else [*lines, ("next", f"saved at step {result['step']:,}; the same command resumes from here")]
    )
