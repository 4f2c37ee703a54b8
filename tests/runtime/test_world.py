"""A process's place, as each launcher tells it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from runs import environment

from dist_train.config.errors import ConfigError
from dist_train.runtime.world import Placement, check_launcher, pick_device, read_placement

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Placement()),
        (TORCHRUN, Placement(3, 6, 1, 2, 1, "torchrun")),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, Placement(3, 6, 1, 2, 1, "accelerate")),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, Placement(launcher="accelerate")),
        (SRUN, Placement(4, 5, 0, 1, 2, "srun")),
        ({**SRUN, **TORCHRUN}, Placement(3, 6, 1, 2, 1, "torchrun")),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Placement()),
    ],
    ids=[
        "nothing",
        "torchrun",
        "accelerate",
        "accelerate with one process",
        "srun",
        "torchrun inside srun",
        "a batch script",
    ],
)
def test_placement_follows_from_the_launcher(env: dict[str, str], expected: Placement) -> None:
    assert read_placement(env) == expected


def test_what_accelerate_asks_for_and_would_not_get_is_refused_all_at_once() -> None:
    taken = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "bf16"}
    check_launcher(taken)
    refused = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_MEGATRON_LM": "true",
        "ACCELERATE_MIXED_PRECISION": "fp8",
    }
    with pytest.raises(ConfigError) as found:
        check_launcher({**taken, **refused})
    assert [problem.key for problem in found.value.problems] == [f"{name}={value}" for name, value in refused.items()]
    assert "DeepSpeed" in str(found.value)


def test_a_gpu_that_is_asked_for_and_hidden_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES hides all of them.*distributed\.device=cpu"):
        pick_device("cuda", Placement())
    assert pick_device("auto", Placement()).type == "cpu"


def test_signals_reach_the_socket_while_the_main_thread_is_busy() -> None:
    """In a process of its own: handlers are the process's."""
    script = (
        "import os, select, signal, time\n"
        "from dist_train.runtime import signals\n"
        "reader = signals.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "select.select([reader], [], [], 5)\n"
        "print(sorted(reader.recv(16)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[10, 15]", done.stderr
