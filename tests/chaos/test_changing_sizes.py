"""A run in bitwise mode, killed at random moments and started again on another number of processes each time (make chaos)."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from bitwise_runs import other_bits
from killing import NOISY, assert_each_sample_once, assert_no_orphans
from runs import CONFIGS, ROOT, run, start, traced
from test_random_moments import children, starts_of, wait_for_start

from dist_train.main import main

# Five or six micro-batches a step, saves and evaluations all the time; slow until the file `hurry` is there.
CONFIG = f"""
extends: {CONFIGS / "digits.yaml"}
data:
  train: {{_target_: noisy.Noisy, split: train}}
  global_batch_size: 24
  drop_last: false
  num_workers: 1
  eval_batch_size: 40
optimizer: {{_target_: torch.optim.AdamW, lr: 0.003}}
trainer:
  duration: 600step
  micro_batch_size: 4
  precision: bf16
  ema_decay: 0.9
  clip_grad_norm: 1.0
  log_every: 7step
  evaluate_every: 15step
distributed: {{reproducibility: bitwise, bucket_mb: 0.02}}
checkpoint: {{every: 2step, keep_last: 2}}
tracking: {{tensorboard: false, report: false}}
callbacks: [{{_target_: pace.Pace}}]
debug: {{trace_samples: true, digest: true}}
"""
KILLS = int(os.environ.get("CHAOS_KILLS", "30"))


def cmdline(pid: int) -> bytes:
    """Empty for a process that has just gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def targets(process: subprocess.Popen[str], processes: int, dice: random.Random) -> list[int]:
    """Whom to kill: everybody, the launcher, a rank or a loader worker."""
    ranks = [process.pid] if processes == 1 else children(process.pid)
    workers = [child for rank in ranks for child in children(rank) if b"resource_tracker" not in cmdline(child)]
    whom = dice.choice(["all", "launcher", "rank", "worker"])
    some = {"all": ranks, "launcher": [], "rank": ranks, "worker": workers}[whom]
    if whom in ("all", "launcher") or not some:
        return [process.pid, *(some if whom == "all" else [])]
    return [dice.choice(some)]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ended(process: subprocess.Popen[str], processes: int, patience: float) -> tuple[str, str]:
    """The output; one that doesn't need what was killed (a worker that had done its work) is killed itself after a while."""
    try:
        return process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        kill([process.pid, *(children(process.pid) if processes > 1 else [])])
        return process.communicate(timeout=60)


@pytest.mark.chaos
def test_a_run_killed_again_and_again_has_the_bits_of_one_process_whatever_its_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(NOISY, tmp_path)
    shutil.copy(ROOT / "tests" / "launch" / "programs" / "pace.py", tmp_path)
    (tmp_path / "chaos.yaml").write_text(CONFIG)
    hurry, place, whole = tmp_path / "hurry", tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    hurry.touch()
    run(tmp_path, 1, "--config", "chaos.yaml", "run.name=whole", "data.num_workers=0")
    hurry.unlink()
    dice, sizes = random.Random(12), list[int]()
    for left in range(KILLS, -1, -1):
        processes, token, before = dice.choice([1, 2, 3, 4]), uuid.uuid4().hex, starts_of(place)
        sizes.append(processes)
        options = ("--config", "chaos.yaml", "run.name=killed")
        # A real one: among the children of a forked torchrun is one that does nothing but fork.
        process = start(tmp_path, processes, *options, env={"CHAOS_TOKEN": token}, real=True)
        try:
            if left:
                wait_for_start(process, place, before)
                time.sleep(dice.uniform(0, 4))
                assert process.poll() is None, process.communicate()
                kill(targets(process, processes, dice))
            else:
                hurry.touch()
            out, err = ended(process, processes, patience=15 if left else 300)
        finally:
            process.kill()
        assert (process.returncode == 0) == (left == 0), f"{sizes}\n{out}\n{err}"
        assert_no_orphans(token, tmp_path)
    assert other_bits(whole, place) == []
    assert traced(place) == traced(whole)
    assert_each_sample_once(place, batch=24)
    assert main(["compare", str(whole), str(place)]) == 0, capsys.readouterr().out
    print(f"processes of each start: {sizes}")
