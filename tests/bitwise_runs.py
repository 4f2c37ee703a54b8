"""Runs of one config on several numbers of processes, and whether all that they leave behind has the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from oracle.comparing import different
from runs import ROOT, environment, result, rows

from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import open_storage

WORLDS = (1, 2, 3, 4, 5, 8)
PLACES = [str(ROOT / "tests" / place) for place in ("oracle", "run/programs", "commands/programs")]
# By number of processes: (name of the run, config, overrides).
Jobs = dict[int, list[tuple[str, dict[str, Any], list[str]]]]


def train_all(folder: Path, jobs: Jobs, timeout: float) -> Path:
    """Train configs on so many processes, in this order; where the runs are."""
    lines: dict[int, list[list[str]]] = {}
    for processes, of_world in jobs.items():
        for name, config, overrides in of_world:
            path = folder / f"{name}.yaml"
            run = {"name": name, "dir": str(folder / "runs"), "code_paths": PLACES}
            path.write_text(yaml.safe_dump({"run": run, **config}, sort_keys=False))
            lines.setdefault(processes, []).append([path.name, *overrides])
    command = [sys.executable, str(ROOT / "tests" / "oracle" / "forked_ranks.py"), json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder / "runs"


def states(place: Path) -> dict[str, Any]:
    """All parts of the last checkpoint, without what the clock says."""
    found = CheckpointStore(open_storage(place / "checkpoints")).find("last")
    parts = {part: found.load(part) for part in found.parts}
    del parts["trainer"]["progress"]["seconds"]
    parts["ranks"], *others = parts.get("ranks", [{}])
    assert not any(others), "what other ranks have that rank 0 hasn't"
    return {"step": found.step, **parts}


def left_behind(place: Path) -> dict[str, Any]:
    """All that a run has computed, without the clock and the number of processes."""
    told = result(place)
    del told["world_size"]
    return {
        "result": told,  # with weights_sha256
        "rows": rows(place),
        "model.pt": torch.load(place / "model.pt", weights_only=True),
        "last checkpoint": states(place),
    }


def other_bits(one: Path, other: Path) -> list[str]:
    """The places at which two runs differ: weights, EMA, optimizer, every part of the last checkpoint, every row, the result."""
    return different(f"{one.name} and {other.name}", left_behind(one), left_behind(other))


def assert_same_bits(places: Iterable[Path]) -> None:
    """All of these runs have left the same bits behind."""
    first, *others = places
    for other in others:
        assert other_bits(first, other) == []
