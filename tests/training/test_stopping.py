"""Stopping is normal: by signal at any process, by file, by the clock; all ranks save the same step, and the run resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import CONFIGS, result, rows, run, same_state_dicts, start, traced

# An epoch of 19 steps with a slow sample reader, so that a stop meets training in the middle.
CONFIG = f"""
extends: {CONFIGS / "digits.yaml"}
data:
  train: {{_target_: slow.Slow, split: train}}
  val: {{_target_: slow.Watched, split: val}}
  num_workers: 0
  eval_batch_size: 20
trainer: {{duration: 60step, log_every: 10step, evaluate_every: 19step}}
checkpoint: {{every: 1000step, keep_best: null}}
debug: {{trace_samples: true}}
tracking: {{tensorboard: false, report: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that was never stopped."""
    folder = tmp_path_factory.mktemp("stopping")
    shutil.copy(Path(__file__).parent / "programs" / "slow.py", folder)
    (folder / "slow.yaml").write_text(CONFIG)
    run(folder, 2, "--config", "slow.yaml", "run.name=whole")
    return folder


def wait_for_step(place: Path, step: int) -> None:
    """Until every rank has begun `step`, as its trace tells."""
    wait_for(lambda: (place / "trace").exists() and len(traced(place)) >= step, f"step {step}")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until it holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The training processes below torchrun."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in listed]


def stopped(place: Path, process: subprocess.Popen[str]) -> int:
    """The step at which all have stopped, which is saved."""
    out, err = process.communicate(timeout=180)
    status = json.loads((place / "status.json").read_text())
    assert status["state"] == "preempted", out + err
    assert (place / "checkpoints" / f"step-{status['step']:08d}").exists()
    return int(status["step"])


def test_a_run_stopped_in_each_way_has_saved_one_step_of_all_ranks_and_ends_as_if_never_stopped(folder: Path) -> None:
    place, whole = folder / "runs" / "often", folder / "runs" / "whole"
    options = ("--config", "slow.yaml", "run.name=often")

    process = start(folder, 2, *options)
    wait_for_step(place, 4)
    os.kill(max(workers_of(process)), signal.SIGUSR1)  # to rank 1
    first = stopped(place, process)
    assert 4 <= first < 19

    (folder / "slowly").touch()
    process = start(folder, 2, *options)
    wait_for((folder / "evaluating").exists, "an evaluation")
    (place / "STOP").touch()
    assert stopped(place, process) == 19
    (folder / "slowly").unlink()
    assert process.returncode == 0
    assert not (place / "STOP").exists()
    assert rows(place, "val") == [], "it was stopped inside"

    process = start(folder, 2, *options)
    wait_for_step(place, 30)
    os.kill(process.pid, signal.SIGTERM)  # to torchrun
    third = stopped(place, process)
    assert 30 <= third < 60

    # Workers that end with each epoch are children that end.
    done = run(folder, 2, *options, "data.num_workers=1", "data.persistent_workers=false")
    assert f"resuming from step {third}" in " ".join(done.stdout.split())
    assert result(place)["weights_sha256"] == result(whole)["weights_sha256"]
    assert same_state_dicts(place / "model.pt", whole / "model.pt")
    assert rows(place) == rows(whole)
    assert traced(place) == traced(whole)


def test_a_start_that_is_stopped_while_it_builds_its_data_ends_all_ranks_and_writes_nothing(folder: Path) -> None:
    process = start(folder, 2, "--config", "slow.yaml", "run.name=begun", env={"LONG": "1"})
    wait_for((folder / "building").exists, "the dataset")
    time.sleep(1)
    began = time.monotonic()
    os.kill(max(workers_of(process)), signal.SIGUSR1)  # to rank 1
    _, err = process.communicate(timeout=180)
    assert time.monotonic() - began < 5 + 5, "and torchrun's own end"
    assert "(exitcode: 138) local_rank: 1" in err or "exitcode  : 138" in err
    assert "Traceback" not in err.split("torch/distributed")[0]
    assert not (folder / "runs" / "begun").exists()


def test_a_config_error_of_one_rank_is_reported_at_once_and_ends_the_others_silently(folder: Path) -> None:
    """Started by somebody who sets RANK and WORLD_SIZE only, as Kubernetes' PyTorchJob does."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LACKS": "1"}
    both = [start(folder, 1, "--config", "slow.yaml", "run.name=lacks", env={**place, "RANK": rank}) for rank in "01"]
    (out, silent), (_, reported) = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert reported.endswith("data.train: this node lacks the data\n")
    assert "rank 1 on" in reported
    assert "Traceback" not in reported + silent
    assert "lacks" not in silent
    assert not (folder / "runs" / "lacks").exists(), out


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
    out, err = process.communicate(timeout=180)
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
    out, err = process.communicate(timeout=180)
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
