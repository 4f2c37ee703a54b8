"""Stopping is normal: by signal at any process, by file, by the clock; all ranks save the same step, and it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import CONFIGS, result, rows, run, same_state_dicts, start, traced

# An epoch of 19 steps with a slow sample reader, so that a stop meets training in the middle.
SLOW = """
import time
from dist_train.callbacks import Callback
from dist_train.data import Digits

class Slow(Digits):
    read_batch = None

    def __getitem__(self, index):
        time.sleep(0.0005)
        return super().__getitem__(index)

class Stuck(Callback):
    def on_step_end(self, trainer):
        if trainer.step == 5:
            time.sleep(600)
"""
CONFIG = f"""
extends: {CONFIGS / "digits.yaml"}
data: {{train: {{_target_: slow.Slow, split: train}}, num_workers: 0}}
trainer: {{duration: 60step, log_every: 10step, evaluate_every: 19step}}
checkpoint: {{every: 1000step, keep_best: null}}
debug: {{trace_samples: true}}
tracking: {{tensorboard: false, report: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that was never stopped."""
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "slow.py").write_text(SLOW)
    (folder / "slow.yaml").write_text(CONFIG)
    run(folder, 2, "--config", "slow.yaml", "run.name=whole")
    return folder


def wait_for_step(place: Path, step: int) -> None:
    """Until every rank has begun `step`, as its trace tells."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (place / "trace").exists() and len(traced(place)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The training processes below torchrun."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in listed]


@pytest.mark.parametrize(
    "way",
    [
        "USR1 to rank 1",
        pytest.param("TERM to torchrun", marks=pytest.mark.chaos),
        pytest.param("STOP", marks=pytest.mark.chaos),
    ],
)
def test_a_stopped_run_has_saved_one_step_of_all_ranks_and_ends_as_if_never_stopped(folder: Path, way: str) -> None:
    name = way.replace(" ", "-")
    place = folder / "runs" / name
    process = start(folder, 2, "--config", "slow.yaml", f"run.name={name}")
    wait_for_step(place, 12)
    if way == "STOP":
        (place / "STOP").touch()
    elif way == "TERM to torchrun":
        os.kill(process.pid, signal.SIGTERM)
    else:
        os.kill(max(workers_of(process)), signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    status = json.loads((place / "status.json").read_text())
    assert status["state"] == "preempted", out + err
    assert 12 <= status["step"] < 60
    assert not (place / "STOP").exists()
    if way == "STOP":
        assert process.returncode == 0
    assert [path.name for path in (place / "checkpoints").glob("step-*")] == [f"step-{status['step']:08d}"]
    done = run(folder, 2, "--config", "slow.yaml", f"run.name={name}")
    assert f"going on from step {status['step']}" in " ".join(done.stdout.split())
    whole = folder / "runs" / "whole"
    assert result(place)["weights_sha256"] == result(whole)["weights_sha256"]
    assert same_state_dicts(place / "model.pt", whole / "model.pt")
    assert rows(place) == rows(whole)
    assert traced(place) == traced(whole)


def test_one_process_leaves_with_75_and_a_file_SAVE_only_saves(folder: Path) -> None:  # noqa: N802
    place = folder / "runs" / "one"
    process = start(folder, 1, "--config", "slow.yaml", "run.name=one")
    wait_for_step(place, 5)
    (place / "SAVE").touch()
    deadline = time.monotonic() + 30
    while not list((place / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "SAVE ended the run"
    saved = list((place / "checkpoints").glob("step-*"))
    assert len(saved) == 1
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "SIGHUP" in out
    attempts = [json.loads(line) for line in (place / "attempts.jsonl").read_text().splitlines()]
    assert [(a["event"], a.get("state")) for a in attempts] == [("start", None), ("end", "preempted")]


def test_a_second_ctrl_c_ends_a_process_that_is_stuck_in_a_step(folder: Path) -> None:
    place = folder / "runs" / "stuck"
    process = start(folder, 1, "--config", "slow.yaml", "run.name=stuck", "callbacks=[{_target_: slow.Stuck}]")
    wait_for_step(place, 5)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None, "the first one waits for the step, to save it"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, out + err


def test_a_duration_in_time_ends_a_run_and_counts_over_its_starts(folder: Path) -> None:
    options = ("--config", "slow.yaml", "trainer.duration=3s", "scheduler=null", "run.name=timed")
    run(folder, 2, *options, "trainer.stop_at=1s")
    place = folder / "runs" / "timed"
    status = json.loads((place / "status.json").read_text())
    assert status["state"] == "preempted"
    run(folder, 2, *options)
    final = result(place)
    assert final["state"] == "completed"
    assert final["step"] > status["step"]
    assert rows(place, "val")[-1]["step"] == final["step"], "the last step was evaluated"
