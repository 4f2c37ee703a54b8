"""Runs that are killed, what must be left of them, and what must come of them in the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from runs import CONFIGS, ROOT, result, rows, run, same_state_dicts, start, traced

from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import open_storage

HOOK = Path(__file__).parent / "hook"
NOISY = Path(__file__).parent / "programs" / "noisy.py"  # a dataset that draws from all global generators

CONFIG = f"""
extends: {CONFIGS / "digits.yaml"}
data:
  train: {{_target_: noisy.Noisy, split: train}}
  global_batch_size: 25
  drop_last: false
  num_workers: 2
  eval_batch_size: 40
optimizer: {{_target_: torch.optim.Adam, lr: 0.003}}
scheduler: {{_target_: dist_train.schedules.WarmupCosine, total_steps: total_steps, warmup_steps: 5, every: 1step}}
trainer: {{duration: 24step, precision: bf16, ema_decay: 0.9, clip_grad_norm: 1.0, log_every: 5step, evaluate_every: 6step}}
checkpoint: {{every: 4step, keep_last: 2}}
tracking: {{tensorboard: false, report: false}}
debug: {{trace_samples: true}}
"""
LENGTH, BATCH = 140, 25
ONE = ("--config", "chaos.yaml", "data.num_workers=0")  # for runs of one process


@dataclass(frozen=True)
class Kill:
    """A death: at `point` once training has come to `step`, on `rank`; of torchrun and all ranks, or of this process only."""

    point: str
    step: int
    rank: int = 0
    all: bool = False


def prepare(folder: Path) -> None:
    """Write the config and the dataset."""
    shutil.copy(NOISY, folder)
    (folder / "chaos.yaml").write_text(CONFIG)


def alive(token: str, folder: Path) -> list[str]:
    """Processes of one start, loader workers included: with `token` in their environment, or, if forked, in its `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if token.encode() in (process / "environ").read_bytes() or (process / "cwd").samefile(folder):
                    found.append(f"{process.name} {(process / 'cmdline').read_bytes()[:200]!r}")
            except OSError:
                continue  # it has just gone
    return found


def assert_no_orphans(token: str, folder: Path, patience: float = 10.0) -> None:
    """Nothing of a start is left, a few seconds after it has ended."""
    end = time.monotonic() + patience
    while orphans := alive(token, folder):
        assert time.monotonic() < end, orphans
        time.sleep(0.1)


def assert_killed(folder: Path, processes: int, kill: Kill, *options: str, timeout: float = 90) -> None:
    """Start a run that dies as `kill` says; nothing of it stays behind."""
    token = uuid.uuid4().hex
    mark = folder / f"mark-{token}"
    spec = json.dumps({**asdict(kill), "mark": str(mark)})
    env = {"PYTHONPATH": f"{HOOK}{os.pathsep}{ROOT}", "DIST_TRAIN_CHAOS": spec, "CHAOS_TOKEN": token}
    process = start(folder, processes, *options, env=env)
    while not alive(token, folder) and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "what is alive isn't found"
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{kill}: still running after {timeout} s\n{out}\n{err}") from None
    assert mark.exists(), f"{kill}: it never came to that\n{out}\n{err}"
    assert process.returncode != 0, f"{kill}: went unnoticed\n{out}\n{err}"
    assert_no_orphans(token, folder)


def states(place: Path) -> dict[str, Any]:
    """All parts of the last checkpoint, without what the clock says."""
    found = CheckpointStore(open_storage(place / "checkpoints")).find("last")
    parts = {part: found.load(part) for part in found.parts}
    del parts["trainer"]["progress"]["seconds"]
    return {"step": found.step, **parts}


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same values, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_equal_runs(place: Path, whole: Path) -> None:
    """Weights, averages, optimizer, records and samples are those of the run that was never killed."""
    assert result(place) == result(whole)  # weights_sha256 and all figures
    assert same_state_dicts(place / "model.pt", whole / "model.pt")
    assert same(states(place), states(whole))
    assert rows(place) == rows(whole)
    assert traced(place) == traced(whole)
    assert json.loads((place / "status.json").read_text())["state"] == "completed"
    assert not [path.name for path in (place / "checkpoints").iterdir() if path.name.startswith(".")], "leftovers"


def assert_each_sample_once(place: Path, length: int = LENGTH, batch: int = BATCH) -> None:
    """Every sample of every epoch was trained on once: none twice, none lost."""
    steps = traced(place)
    per_epoch = -(-length // batch)
    assert sorted(steps) == list(range(1, len(steps) + 1))
    for first in range(1, len(steps) + 1, per_epoch):
        epoch = [steps[step] for step in range(first, first + per_epoch)]
        assert sum(map(len, epoch)) == length
        assert set().union(*epoch) == set(range(length))


__all__ = ["Kill", "assert_equal_runs", "assert_no_orphans", "assert_killed", "prepare", "run", "start"]
