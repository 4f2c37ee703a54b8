"""This process's place among those of its job: its rank from the launcher's environment, the rest from the hosts themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dist_train.config.errors import ConfigError, Problem
from dist_train.watch.processes import machine

# What `accelerate launch` requests by the environment and would silently not get here.
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "its FSDP plugin",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "a dynamo_backend (use trainer.compile=true here)",
    "ACCELERATE_MIXED_PRECISION": "a mixed_precision other than no, fp16 and bf16",
}
_SUPPORTED = ("", "no", "false", "fp16", "bf16")
# Rank, world size and local size as mpirun sets them: Open MPI; MPICH, Intel MPI and others with `hydra`; MVAPICH.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
_NOTICE_SECONDS = (5.0, 60.0)  # until a wait for other processes is reported, and between later reports


@dataclass(frozen=True)
class Placement:
    """A process's place among the processes of its job; the fields after `names` are known after the rendezvous."""

    rank: int = 0
    size: int = 1
    launcher: str = "none"
    """none, torchrun, accelerate, srun, mpirun, or environment (RANK and WORLD_SIZE set by something else, as by Kubernetes)."""
    names: tuple[str, ...] = ()
    """The variables that gave rank and size."""
    local_rank: int = 0
    local_size: int = 1
    nodes: int = 1
    gpu: int = 0
    gpu_ranks: int = 1
    """Like local_size, among the ranks that see the same GPUs (under `srun --gpus-per-task=1` each sees its own)."""

    @property
    def under_torchrun(self) -> bool:
        """Whether a torchrun agent watches this process (`accelerate launch` with several processes is one)."""
        return "TORCHELASTIC_RUN_ID" in os.environ


def read_placement(env: Mapping[str, str]) -> Placement:
    """The rank that a launcher put into the environment; a single process if none did.

    `accelerate launch` with one process sets no RANK; a shell inside a Slurm job has SLURM_PROCID but no step, and one opened
    by `srun --pty` has all variables of a step, and a terminal, which no task of an ordinary step has.

    Raises ConfigError if the variables are incomplete or contradictory.
    """
    accelerate = "ACCELERATE_MIXED_PRECISION" in env
    if "RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        torchrun = "TORCHELASTIC_RUN_ID" in env or "LOCAL_WORLD_SIZE" in env
        launcher = "accelerate" if accelerate else "torchrun" if torchrun else "environment"
        return _placed(env, launcher, "RANK", "WORLD_SIZE")
    slurm = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    by_slurm = [env.get(name) for name in slurm] if "SLURM_STEP_ID" in env else []
    for rank, size, _ in _MPI:
        if rank in env and not (rank == "PMI_RANK" and by_slurm == [env[rank], env.get(size)]):  # srun --mpi=pmi2
            return _placed(env, "mpirun", rank, size)
    if by_slurm and by_slurm[1] not in (None, "1") and not in_a_shell(env):
        return _placed(env, "srun", *slurm)
    if "PMIX_RANK" in env and not by_slurm:  # prterun, which sets no size
        return _placed(env, "mpirun", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE")
    return Placement(launcher="accelerate" if accelerate else "none")


def rank_of_environment() -> int:
    """The rank as the environment states it, before anything is set up; 0 where it states none, or nonsense."""
    with contextlib.suppress(ConfigError):
        return read_placement(os.environ).rank
    return 0


def in_a_shell(env: Mapping[str, str]) -> bool:
    """Whether this command was typed in a shell that `srun --pty` has opened, one task among several."""
    if "SLURM_PTY_PORT" not in env:  # steps started from such a shell inherit it, but not the terminal
        return False
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def _placed(env: Mapping[str, str], launcher: str, *names: str) -> Placement:
    values = [env.get(name, "") for name in names]
    if not all(value.isascii() and value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
        found = ", ".join(f"{name}={env[name]}" if name in env else f"no {name}" for name in names)
        message = (
            f"the environment has {found}; a distributed process needs both, with the rank below the size. Export what is "
            f"missing, launch with torchrun, or unset {' and '.join(name for name in names if name in env)} to train with this "
            "process alone"
        )
        raise ConfigError.single(names[0], message, where="environment")
    return Placement(int(values[0]), int(values[1]), launcher, names)


def check_launcher(env: Mapping[str, str]) -> None:
    """Raise ConfigError with each setting of accelerate's that would silently have no effect here."""
    requested = {name: what for name, what in _UNSUPPORTED.items() if env.get(name, "").lower() not in _SUPPORTED}
    fix = "which is not supported here: leave it out, as launch/accelerate/ddp.yaml does"
    if requested:
        problems = [(f"{name}={env[name]}", f"requests {what}, {fix}") for name, what in requested.items()]
        raise ConfigError([Problem("accelerate launch", *problem) for problem in problems])


def node_id() -> str:
    """Equal for two processes on one host. All of Slurm's nodes may be on one machine (a test's are)."""
    return f"{machine()} {os.environ.get('SLURMD_NODENAME', '')}"


def complete_placement(placement: Placement, store: Any, gpus: str, timeout: float) -> tuple[Placement, str]:
    """Wait for all processes in `store`, and compare hosts and GPUs, by what the processes report and not the launcher.

    `gpus` are those that this process sees, by names that are unique over hosts. Returns the whole placement, and a nonce
    of rank 0's that is new with each rendezvous. Raises TimeoutError if some processes never join.
    """
    mine = [node_id(), gpus, uuid.uuid4().hex]
    store.set(f"joined/{placement.rank}", "\0".join(mine))
    keys = [f"joined/{rank}" for rank in range(placement.size)]
    began, notice_at, pause = time.monotonic(), _NOTICE_SECONDS[0], 0.01
    while not store.check(keys):
        waited = time.monotonic() - began
        if waited > min(notice_at, timeout):
            absent = [rank for rank in range(placement.size) if not store.check([keys[rank]])]
            if waited > timeout:
                raise TimeoutError(_waiting(placement, waited, absent))
            if placement.rank == 0 and absent:
                _report_wait(placement, waited, absent)
            notice_at = waited + _NOTICE_SECONDS[1]
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    posted = [value.decode().split("\0") for value in store.multi_get(keys)]
    local = [rank for rank, (host, _, _) in enumerate(posted) if host == mine[0]]
    sharing = [rank for rank, (_, theirs, _) in enumerate(posted) if theirs == gpus]  # in containers, perhaps
    complete = dataclasses.replace(
        placement, local_rank=local.index(placement.rank), local_size=len(local), nodes=len({host for host, _, _ in posted}),
        gpu=sharing.index(placement.rank), gpu_ranks=len(sharing),
    )  # fmt: skip
    return complete, posted[0][2]


def rendezvous(placement: Placement, timeout: timedelta) -> Any:
    """A client of the store that connects all processes: that of torchrun's agent, else rank 0's.

    Raises ConfigError if the environment doesn't say where rank 0 is.
    """
    import torch.distributed as dist

    _set_master(placement)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(dist.rendezvous("env://", placement.rank, placement.size, timeout=timeout))
        store.set_timeout(timeout)
        return store
    notice = threading.Timer(_NOTICE_SECONDS[0], lambda: _report_wait(placement, _NOTICE_SECONDS[0], [0]))
    notice.daemon = True
    notice.start()
    at, leads = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), placement.rank == 0
    try:
        return dist.TCPStore(*at, placement.size, leads, timeout, wait_for_workers=False, multi_tenant=True)
    finally:
        notice.cancel()


def _report_wait(placement: Placement, seconds: float, absent: list[int]) -> None:
    print(_waiting(placement, seconds, absent), file=sys.stderr, flush=True)


def _waiting(placement: Placement, seconds: float, absent: list[int]) -> str:
    """Which ranks are missing, and which variables made this process wait for them."""
    few = ", ".join(str(rank) for rank in absent[:8]) + (", ..." if len(absent) > 8 else "")
    joined = f"{placement.size - len(absent)} of {placement.size} processes have joined, rank {few} missing"
    if placement.rank and absent == [0]:
        joined = "no answer from rank 0"
    names = (*placement.names, "MASTER_ADDR", "MASTER_PORT")
    found = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return (
        f"dist_train: rank {placement.rank} on {socket.gethostname()} has waited {seconds:.0f} s for the other processes: "
        f"{joined}. The environment has {found} (launcher: {placement.launcher}); to train with this process alone, unset "
        f"{' and '.join(placement.names)}"
    )


def _set_master(placement: Placement) -> None:
    """srun and mpirun set no rendezvous address: use the step's first host, and a port derived from the job."""
    env = os.environ
    if placement.launcher == "srun":
        job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
        env.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 20000))
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    elif placement.launcher == "mpirun" and str(placement.size) in [env.get(local) for _, _, local in _MPI]:
        job_name = env.get("PMIX_NAMESPACE") or str(os.getppid())  # mpirun, or its proxy: the parent of all ranks here
        env.setdefault("MASTER_PORT", str(20000 + zlib.crc32(job_name.encode()) % 12000))
        env.setdefault("MASTER_ADDR", "127.0.0.1")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing or not env["MASTER_PORT"].isdigit():
        what = f"not set: {', '.join(missing)}" if missing else f"not a port: MASTER_PORT={env['MASTER_PORT']}"
        message = (
            f"{what}. {placement.names[0]} and {placement.names[1]} say that this is one of {placement.size} processes; export "
            "the address of rank 0's host and a free port there to all of them (mpirun -x MASTER_ADDR=node1 -x "
            "MASTER_PORT=29500), or launch with torchrun"
        )
        raise ConfigError.single("MASTER_ADDR", message, where="environment")


def _first_host(nodes: str) -> str:
    try:
        return subprocess.check_output(
            ["scontrol", "show", "hostnames", nodes], stderr=subprocess.DEVNULL, text=True
        ).split()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        why = f"scontrol failed: {error}"
        message = f"can't find the first host of {nodes!r} ({why}); export MASTER_ADDR in the batch script"
        raise ConfigError.single("MASTER_ADDR", message) from None
