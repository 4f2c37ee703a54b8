"""The long version: kills and signals at random moments, from outside, over and over (make chaos)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from killing import NOISY, alive, assert_each_sample_once, assert_equal_runs, assert_no_orphans
from runs import CONFIGS, run, start, traced

from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import open_storage

# Saves, evaluations and deletions all the time, so that a random moment often falls into one.
CONFIG = f"""
extends: {CONFIGS / "digits.yaml"}
data:
  train: {{_target_: noisy.Noisy, split: train}}
  global_batch_size: 25
  drop_last: false
  num_workers: 1
  eval_batch_size: 40
optimizer: {{_target_: torch.optim.Adam, lr: 0.003}}
trainer: {{duration: 240step, precision: bf16, ema_decay: 0.9, log_every: 7step, evaluate_every: 15step}}
checkpoint: {{every: 2step, keep_last: 2}}
tracking: {{tensorboard: false, report: false}}
debug: {{trace_samples: true}}
"""
# For each of two worlds; fewer for a first look: CHAOS_KILLS=5 CHAOS_SIGNALS=5 make chaos
KILLS, SIGNALS = int(os.environ.get("CHAOS_KILLS", "50")), int(os.environ.get("CHAOS_SIGNALS", "20"))
PATIENT = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # as launch/torchrun.sh sets them
    "PET_SHUTDOWN_TIMEOUT": "60",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nobody disturbed, on two and on three processes."""
    folder = tmp_path_factory.mktemp("random")
    shutil.copy(NOISY, folder)
    (folder / "chaos.yaml").write_text(CONFIG)
    for processes in (2, 3):
        run(folder, processes, "--config", "chaos.yaml", f"run.name=whole{processes}")
    return folder


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are still there."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def starts_of(place: Path) -> int:
    """How many starts of a run have claimed a number."""
    claims = place / "trace" / ".attempts"
    return len(list(claims.iterdir())) if claims.exists() else 0


def wait_for_start(process: subprocess.Popen[str], place: Path, before: int) -> None:
    """Until the run has begun to write, or is over."""
    while starts_of(place) == before and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.chaos
@pytest.mark.parametrize("processes", [2, 3])
def test_a_run_killed_at_random_moments_ends_as_if_never_killed(folder: Path, processes: int) -> None:
    dice, kills, number = random.Random(processes), 0, 0
    while kills < KILLS:
        number += 1
        place = folder / "runs" / f"killed{processes}-{number}"
        while not (place / "result.json").exists():
            token = uuid.uuid4().hex
            before = starts_of(place)
            process = start(
                folder,
                processes,
                "--config",
                "chaos.yaml",
                f"run.name={place.name}",
                env={"CHAOS_TOKEN": token},
                real=True,
            )
            if kills < KILLS:
                wait_for_start(process, place, before)
                time.sleep(dice.uniform(0, 4))
            ranks = children(process.pid)
            whom = dice.choice(["all", "torchrun", "rank", "worker"])
            targets = {
                "all": [process.pid, *ranks],
                "torchrun": [process.pid],
                "rank": [dice.choice(ranks)] if ranks else [],
                "worker": [dice.choice(workers)] if (workers := [w for rank in ranks for w in children(rank)]) else [],
            }[whom]
            if kills < KILLS and process.poll() is None and targets:
                kills += 1
                for pid in targets:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
            out, err = process.communicate(timeout=120)
            assert_no_orphans(token, folder)
            assert process.returncode == 0 or targets, out + err
        assert_equal_runs(place, folder / "runs" / f"whole{processes}")
        assert_each_sample_once(place)


@pytest.mark.chaos
@pytest.mark.parametrize(("processes", "number"), [(2, signal.SIGTERM), (3, signal.SIGUSR1)])
def test_a_run_signaled_at_random_moments_saves_the_same_step_on_all_ranks(
    folder: Path, processes: int, number: signal.Signals
) -> None:
    """To torchrun or to one rank, once or twice, from the first writes of a start on: each time saved, all on one step."""
    dice, sent, runs = random.Random(int(number)), 0, 0
    while sent < SIGNALS:
        runs += 1
        place = folder / "runs" / f"signalled{processes}-{runs}"
        while not (place / "result.json").exists():
            token = uuid.uuid4().hex
            before = starts_of(place)
            options = ("--config", "chaos.yaml", f"run.name={place.name}")
            process = start(folder, processes, *options, env={**PATIENT, "CHAOS_TOKEN": token}, real=True)
            wait_for_start(process, place, before)
            time.sleep(dice.uniform(0, 2))
            ranks = children(process.pid)
            target = dice.choice([process.pid, *ranks])
            late = process.poll() is not None or (place / "result.json").exists()
            if not late and sent < SIGNALS:
                for pause in dice.choice([(0.0,), (0.0, 0.01), (0.0, 0.3)]):
                    time.sleep(pause)
                    if process.poll() is None and Path(f"/proc/{target}").exists():
                        os.kill(target, number)
            out, err = process.communicate(timeout=120)
            assert_no_orphans(token, folder)
            assert not alive(token, folder)
            status = json.loads((place / "status.json").read_text())
            if late or status["state"] == "completed":
                continue
            sent += 1
            assert status["state"] == "preempted", f"{target} of {process.pid}, {ranks}: {status}\n{out}\n{err}"
            found = CheckpointStore(open_storage(place / "checkpoints")).find("last")
            assert found.step == status["step"]
            assert max(traced(place), default=0) == status["step"], "a rank went on for longer than another"
        assert_equal_runs(place, folder / "runs" / f"whole{processes}")
        assert_each_sample_once(place)
