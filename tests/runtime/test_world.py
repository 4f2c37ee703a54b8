"""A process's placement, as each launcher sets it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from runs import environment

from dist_train.config.errors import ConfigError
from dist_train.runtime import launch as placement
from dist_train.runtime.launch import Placement, check_launcher, complete_placement, read_placement
from dist_train.runtime.world import pick_device

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"}
ALONE = (0, 1, "none")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, (3, 6, "torchrun")),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, (3, 6, "accelerate")),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, (0, 1, "accelerate")),
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "run-master-0"}, (3, 4, "environment")),
        ({"WORLD_SIZE": "1"}, ALONE),
        (SRUN, (4, 5, "srun")),
        ({**SRUN, **TORCHRUN}, (3, 6, "torchrun")),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ALONE),
        ({**SRUN, "SLURM_PTY_PORT": "33781"}, ALONE),
        (OMPI, (1, 2, "mpirun")),
        (HYDRA, (1, 4, "mpirun")),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **OMPI}, (1, 2, "mpirun")),
        ({**SRUN, "PMI_RANK": "4", "PMI_SIZE": "5"}, (4, 5, "srun")),
    ],
    ids=[
        "nothing",
        "torchrun",
        "accelerate",
        "accelerate with one process",
        "Kubernetes' PyTorchJob",
        "one process of one",
        "srun",
        "torchrun inside srun",
        "a batch script",
        "a shell of srun --pty",
        "Open MPI",
        "MPICH",
        "Open MPI on a node each by srun",
        "srun --mpi=pmi2",
    ],
)
def test_rank_and_size_follow_from_the_launcher(
    env: dict[str, str], expected: tuple[int, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "in_a_shell", lambda env: "SLURM_PTY_PORT" in env)  # it has a terminal
    place = read_placement(env)
    assert (place.rank, place.size, place.launcher) == expected


def test_steps_started_in_a_shell_of_srun_have_no_terminal_and_are_jobs() -> None:
    """In a session of its own: the variables alone, which such steps inherit, don't make a shell."""
    script = (
        "import os; os.setsid(); from dist_train.runtime.launch import read_placement as r; print(r(os.environ).size)"
    )
    env = environment(**SRUN, SLURM_PTY_PORT="33781")
    assert subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True).stdout == "5\n"


@pytest.mark.parametrize(
    "env", [{"RANK": "3"}, {"WORLD_SIZE": "4"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"PMIX_RANK": "1"}]
)
def test_an_incomplete_placement_is_refused_with_what_is_missing(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"the environment has .*unset {next(iter(env))}"):
        read_placement(env)


def test_hosts_and_gpus_are_told_apart_by_what_their_ranks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 on one host and 1 and 3 on another, as a launcher may deal them; rank 3 sees a GPU of its own."""
    store, found = dist.HashStore(), {}
    name = threading.local()
    monkeypatch.setattr(placement, "machine", lambda: name.host)

    def one(rank: int) -> None:
        name.host = ("a", "b")[rank % 2]
        gpus = "GPU-9" if rank == 3 else f"GPU-{rank % 2}0, GPU-{rank % 2}1"
        place, word = complete_placement(Placement(rank, 4), store, gpus, 20.0)
        found[rank] = (place.local_rank, place.local_size, place.nodes, place.gpu, place.gpu_ranks, word)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert {rank: place[:5] for rank, place in found.items()} == {
        0: (0, 2, 2, 0, 2), 1: (0, 2, 2, 0, 1), 2: (1, 2, 2, 1, 2), 3: (1, 2, 2, 0, 1),
    }  # fmt: skip
    assert len({place[5] for place in found.values()}) == 1


def test_a_wait_for_other_processes_reports_how_many_have_joined_and_the_environment_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placement, "_NOTICE_SECONDS", (0.1, 60.0))
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    store = dist.HashStore()
    store.set("joined/2", "")
    with pytest.raises(TimeoutError, match="2 of 4 processes have joined, rank 1, 3 missing"):
        complete_placement(read_placement(os.environ), store, "", 0.5)
    printed = capsys.readouterr().err
    assert printed.count("2 of 4 processes have joined") == 1
    assert "has RANK=0, WORLD_SIZE=4, MASTER_ADDR=node1, MASTER_PORT=29500 (launcher: environment)" in printed


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


def test_a_gpu_that_is_requested_and_hidden_is_an_error_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES hides all of them.*distributed\.device=cpu"):
        pick_device("cuda", Placement())
    assert pick_device("auto", Placement()).type == "cpu"


@pytest.mark.parametrize(
    ("capability", "codes", "fits"),
    [
        ((9, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", True),
        ((8, 9), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", True),  # the code of an earlier one of the same generation
        ((6, 1), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),
        ((8, 0), "sm_86 sm_90", False),
        ((12, 0), "sm_80 sm_90", False),
        ((12, 0), "sm_80 compute_90", True),
        ((7, 0), "sm_90a compute_90", False),
        ((9, 0), "sm_90a", True),
        ((9, 0), "gfx90a gfx942", True),
        ((9, 0), "", True),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_refused_at_the_start(
    capability: tuple[int, int], codes: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", codes.split)
    if fits:
        assert pick_device("auto", Placement()) == torch.device("cuda", 0)
        return
    with pytest.raises(ConfigError) as found:
        pick_device("auto", Placement())
    assert f"Something has compute capability {capability[0]}.{capability[1]}, but torch" in str(found.value)
    assert f"is built for {', '.join(codes.split())}: install" in str(found.value)
