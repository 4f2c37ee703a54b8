"""Where this process stands: its rank among the others, its device, and the store and process group that connect them."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import ConfigError, Problem
from dist_train.runtime.here import MEETING, STARTING, here
from dist_train.runtime.peers import Peers
from dist_train.runtime.processes import AGAIN

if TYPE_CHECKING:
    import torch

    from dist_train.config.schema import DistributedConfig


# What `accelerate launch` may ask for by the environment and wouldn't get here.
_NOT_TAKEN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "its FSDP plugin",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "a dynamo_backend (trainer.compile=true is the way here)",
    "ACCELERATE_MIXED_PRECISION": "a mixed_precision beside no, fp16 and bf16",
}
_TAKEN = ("", "no", "false", "fp16", "bf16")
_PARENT = os.getppid()  # in a container the launcher may well be process 1
_GROUPS = itertools.count(1000 * int(os.environ.get(AGAIN, "0")))  # process groups that this process has joined


@dataclass(frozen=True)
class Placement:
    """A process's place among the processes of its job, as the launcher's environment tells it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    launcher: str = "none"  # none | torchrun | accelerate | srun

    @property
    def under_torchrun(self) -> bool:
        """Whether a torchrun agent watches this process (`accelerate launch` with several processes is one)."""
        return "TORCHELASTIC_RUN_ID" in os.environ


def read_placement(env: Mapping[str, str]) -> Placement:
    """The placement that `torchrun`, `accelerate launch` or `srun` left in the environment; one process if none did.

    `accelerate launch` with one process sets no RANK; a shell inside a Slurm job has SLURM_PROCID but no step.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "torchrun"
        size = int(env["WORLD_SIZE"])
        local_size = int(env.get("LOCAL_WORLD_SIZE", size))
        rank = int(env["RANK"])
        local_rank, node = int(env.get("LOCAL_RANK", rank % local_size)), int(env.get("GROUP_RANK", rank // local_size))
        return Placement(rank, size, local_rank, local_size, node, launcher)
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        size, node = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_NODEID", "0"))
        local_size = _tasks_of_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)), node)
        return Placement(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), local_size, node, "srun")
    return Placement(launcher="accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "none")


def check_launcher(env: Mapping[str, str]) -> None:
    """Refuse what accelerate's configuration asks for and would silently not get.

    Raises:
        ConfigError: naming each such setting.
    """
    asked = {name: what for name, what in _NOT_TAKEN.items() if env.get(name, "").lower() not in _TAKEN}
    advice = "which isn't taken here: leave it out, as launch/accelerate/ddp.yaml does"
    if asked:
        told = [(f"{name}={env[name]}", f"asks for {what}, {advice}") for name, what in asked.items()]
        raise ConfigError([Problem("accelerate launch", *problem) for problem in told])


def _tasks_of_node(spec: str, node: int) -> int:
    """Slurm writes the tasks of each node as `2(x3),1`: three nodes of two, then one of one."""
    counts: list[int] = []
    for part in spec.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity (where the system has one), cut to the quota of its cgroup."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, int(quota) // int(period))  # "max" is no number: no quota
    return max(1, count)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies, so that a killed torchrun leaves no orphans (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != _PARENT:  # it was gone before the call
            os._exit(1)


def pick_device(choice: str, placement: Placement) -> torch.device:
    """The device of this rank: `cuda:<local rank>` where GPUs are usable, else the CPU.

    Raises:
        ConfigError: a GPU was asked for, or is there, but torch can't use it; or there are more ranks here than GPUs.
    """
    import torch

    if choice == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1")
        if choice == "cuda" or (not hidden and os.path.exists("/dev/nvidia0")):
            raise ConfigError.single("distributed.device", _why_no_cuda(hidden))
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if placement.local_size > count:
        raise ConfigError.single(
            "distributed.device",
            f"{placement.local_size} processes were started on {socket.gethostname()}, which has {count} usable GPU(s); "
            f"start {count} (torchrun --nproc_per_node={count}), or train on the CPU with distributed.device=cpu",
        )
    device = torch.device("cuda", placement.local_rank)
    torch.cuda.set_device(device)
    return device


def _why_no_cuda(hidden: bool) -> str:
    import torch

    if hidden:
        why = "a GPU is asked for, but CUDA_VISIBLE_DEVICES hides all of them: unset it"
    elif torch.version.cuda is None and torch.version.hip is None:
        why = f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    else:
        reason = "no usable GPU was found"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
        cure = "update the NVIDIA driver, or install a torch build for an older CUDA"
        why = f"torch {torch.__version__} (CUDA {torch.version.cuda}) can't use the GPU: {reason}; {cure}"
    return f"{why}; or train on the CPU with distributed.device=cpu"


class World:
    """The processes of one run, and this one's place and device among them.

    Objects are shared through the rendezvous store, never by collectives, so that nothing of this disturbs the GPU streams.
    """

    def __init__(self, placement: Placement, device: torch.device, store: Any = None, backend: str | None = None):
        self.placement, self.rank, self.size = placement, placement.rank, placement.size
        self.device, self.store, self.backend = device, store, backend
        self.peers = Peers(self.rank, self.size)
        self._sequence = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """Give rank 0's `value` (anything JSON can hold) to all ranks; every rank must call it."""
        return self._exchange(value, 1)[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Rank 0's answer (anything JSON can hold) on all ranks, its ConfigError as well; every rank must call it."""
        answer: dict[str, Any] = {}
        if self.is_main:
            try:
                answer = {"value": action()}
            except ConfigError as error:
                answer = {"problems": [vars(problem) for problem in error.problems]}
        answer = self.share(answer)
        if "problems" in answer:
            raise ConfigError([Problem(**problem) for problem in answer["problems"]])
        return answer["value"]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything JSON can hold), in order of rank, on all ranks; every rank must call it."""
        return self._exchange(value, self.size)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gather(None)

    def clone_store(self) -> Any | None:
        """A store client of its own for another thread (a client serves one caller at a time)."""
        return None if self.store is None else self.store.clone()

    def _exchange(self, value: Any, givers: int) -> list[Any]:
        """The values of the first so many ranks."""
        if self.store is None:
            return [value]
        self._sequence += 1
        key = f"exchange/{self._sequence}"
        if self.rank < givers:
            self.store.set(f"{key}/{self.rank}", json.dumps(value))
        phase = here.phase
        if phase != STARTING:
            here.phase = MEETING
        values = [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(givers)]
        here.phase = phase
        return values


@contextlib.contextmanager
def open_world(config: DistributedConfig, placement: Placement) -> Iterator[World]:
    """Join the other processes of the job: device, process group (NCCL on CUDA, gloo on CPU) and store.

    The process group's timeout is the hang timeout plus a minute, so that whoever watches for hangs speaks first. An
    exception inside (other than a ConfigError) ends this process and all others, where there are others: see `Peers`.

    Raises:
        ConfigError: the device can't be had (see `pick_device`), or the launcher asks for what there isn't (`check_launcher`).
    """
    import torch

    check_launcher(os.environ)
    device = pick_device(config.device, placement)
    torch.set_num_threads(_threads(config.threads, placement, device))
    if placement.size == 1:
        yield from _watched(World(placement, device), config)
        return
    import torch.distributed as dist

    if placement.launcher == "srun":
        _name_master()
    die_with_parent()
    timeout = timedelta(seconds=config.hang_timeout.value + 60)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://", placement.rank, placement.size, timeout=timeout))
    store.set_timeout(timeout)
    # A process that trains a second time would else meet the keys of its first group in the launcher's store, and hang.
    store = dist.PrefixStore(f"group-{next(_GROUPS)}", store)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        # An agent's store outlives a restart of its workers: a fresh prefix keeps old keys out.
        prefix = [uuid.uuid4().hex]
        dist.broadcast_object_list(prefix, src=0, device=torch.device("cpu"))
        yield from _watched(
            World(placement, device, dist.PrefixStore(f"dist_train/{prefix[0]}", store), backend), config
        )
    finally:
        dist.destroy_process_group()


def _watched(world: World, config: DistributedConfig) -> Iterator[World]:
    world.peers = Peers(world.rank, world.size, world.clone_store(), config.hang_timeout.value)
    world.peers.start()
    try:
        yield world
    except BaseException as error:
        world.peers.raised(error)
        raise
    world.peers.close()


def _threads(choice: int | str, placement: Placement, device: torch.device) -> int:
    """Intra-op threads: the config's, else OMP_NUM_THREADS, else a fair share of the CPUs among the local ranks.

    With a GPU the share is one: waking more for the little that is left to the CPU cost a quarter of the speed (bench/RESULTS.md)
    """
    if choice != "auto":
        return int(choice)
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return 1 if device.type == "cuda" else max(1, usable_cpus() // placement.local_size)


def _name_master() -> None:
    """Under a bare `srun` nobody says where rank 0 lives: the step's first host, and a port that follows from the job."""
    env = os.environ
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    env.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 20000))
    if "MASTER_ADDR" in env:
        return
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        message = (
            f"can't tell the first host of {nodes!r} (scontrol failed: {error}); export MASTER_ADDR in the batch script"
        )
        raise ConfigError.single("MASTER_ADDR", message) from None
    env["MASTER_ADDR"] = listed.stdout.split()[0]
