"""The processes of a run: this one's rank and device, and the store and process group that connect them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import ConfigError, Problem
from dist_train.runtime.launch import Placement, check_launcher, complete_placement, in_a_shell, rendezvous
from dist_train.watch import failure, signals
from dist_train.watch.leave import ReportedError
from dist_train.watch.peers import Peers
from dist_train.watch.processes import die_with_parent, is_owned, machine, raise_file_limit, restarts
from dist_train.watch.status import STARTING, SYNC, status

if TYPE_CHECKING:
    import torch

    from dist_train.config.schema import DistributedConfig


BROADCAST_BYTES = 64 << 20  # of one broadcast, which needs as much memory again
# Numbers for the process groups that this process joins: the store of torchrun's agent keeps the keys of earlier ones.
_GROUPS = itertools.count(1000 * restarts())


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity (where the system has one), limited by the quota of its cgroup."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, int(quota) // int(period))  # "max" is no number: no quota
    return max(1, count)


def pick_device(choice: str, placement: Placement) -> torch.device:
    """The device of this rank: a GPU of its own where GPUs are usable, else the CPU.

    Raises ConfigError if a GPU is requested or present, but torch can't use it, or this host has more ranks than GPUs.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1")
    expected = choice == "cuda" or (not hidden and os.path.exists("/dev/nvidia0"))
    if _wants_cpu(choice) or not (torch.cuda.is_available() or expected):
        return torch.device("cpu")
    device, count = torch.device("cuda", placement.gpu), torch.cuda.device_count()
    if not torch.cuda.is_available():
        problem = _why_no_cuda(hidden)
    elif placement.gpu_ranks > count:
        started = f"{placement.gpu_ranks} processes were started on {socket.gethostname()}"
        problem = f"{started}, which has {count} usable GPU(s); start {count} (torchrun --nproc_per_node={count})"
    else:
        problem = _built_for_others(device)
    if problem:
        raise ConfigError.single("distributed.device", f"{problem}; or train on the CPU with distributed.device=cpu")
    torch.cuda.set_device(device)
    return device


def _built_for_others(device: torch.device) -> str:
    """Why no kernel of this build of torch runs on that GPU; "" where some do. A launch would fail late and obscurely."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    codes = [code for code in torch.cuda.get_arch_list() if code.startswith(("sm_", "compute_"))]  # ROCm has others
    for code in codes:
        kind, _, number = code.partition("_")
        of, least = divmod(int(number.rstrip("af")), 10)
        if (of, least) <= (major, minor) and (kind == "compute" or of == major):  # PTX ("compute") is recompiled
            return ""
    name, built = torch.cuda.get_device_name(device), f"torch {torch.__version__} is built for {', '.join(codes)}"
    problem = f"{name} has compute capability {major}.{minor}, but {built}: install a build of torch for this GPU"
    return problem if codes else ""


def _wants_cpu(choice: str) -> bool:
    return choice == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def visible_gpus(choice: str) -> str:
    """The GPUs that this process may use, by names that no other GPU has; "" for none."""
    import torch

    if _wants_cpu(choice) or not torch.cuda.is_available():
        return ""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [listed] if "MIG" in listed else []
    for index in range(torch.cuda.device_count()):
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        names.append(f"{machine()} {index}" if uuid is None else str(uuid))
    return ", ".join(names)


def _why_no_cuda(hidden: bool) -> str:
    import torch

    if hidden:
        return "a GPU is requested, but CUDA_VISIBLE_DEVICES hides all of them: unset it"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    reason = "no usable GPU was found"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
    fix = "update the NVIDIA driver, or install a torch build for an older CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) can't use the GPU: {reason}; {fix}"


class World:
    """The processes of one run, and this one's place and device among them.

    Small values (anything JSON can hold) are exchanged through the rendezvous store, never by collectives, so that nothing of
    this disturbs the GPU streams. Every rank must make the same calls in the same order.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        store: Any = None,
        backend: str | None = None,
        peers: Peers | None = None,
    ):
        self.placement, self.rank, self.size = placement, placement.rank, placement.size
        self.device, self.store, self.backend = device, store, backend
        self.peers = peers or Peers(self.rank, self.size)
        self._sequence = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's `value` on all ranks."""
        return self._exchange(value, 1)[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result of `action` on all ranks, its ConfigError as well."""
        answer: dict[str, Any] = {}
        if self.is_main:
            try:
                answer = {"value": action()}
            except ConfigError as error:
                answer = {"problems": [vars(problem) for problem in error.problems]}
        answer = self.broadcast(answer)
        if "problems" in answer:
            raise ConfigError([Problem(**problem) for problem in answer["problems"]])
        return answer["value"]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, ordered by rank, on all ranks."""
        return self._exchange(value, self.size)

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        self.all_gather(None)

    def clone_store(self) -> Any | None:
        """A store client for another thread (a client serves one caller at a time)."""
        return None if self.store is None else self.store.clone()

    def _exchange(self, value: Any, senders: int) -> list[Any]:
        """The values of the first `senders` ranks."""
        if self.store is None:
            return [value]
        self._sequence += 1
        key = f"exchange/{self._sequence}"
        if self.rank < senders:
            self.store.set(f"{key}/{self.rank}", json.dumps(value))
        phase = status.phase
        if phase != STARTING:
            status.phase = SYNC
        values = [json.loads(value) for value in self.store.multi_get([f"{key}/{rank}" for rank in range(senders)])]
        status.phase = phase
        return values


def broadcast_from_rank_zero(tensors: Iterable[torch.Tensor | None], world: World) -> None:
    """Overwrite tensors on this rank's device with rank 0's values, in few collectives; every rank calls it."""
    import torch.distributed as dist

    ours = [tensor.detach() for tensor in tensors if tensor is not None and tensor.device.type == world.device.type]
    if world.size > 1 and ours:
        dist._broadcast_coalesced(dist.distributed_c10d._get_default_group(), ours, BROADCAST_BYTES, 0)


def gather_rows(mine: torch.Tensor, counts: Sequence[int], world: World) -> torch.Tensor:
    """The rows of all ranks, in order of rank: of rank r the first `counts[r]`, which may differ. Every rank calls it.

    Args:
        mine: (n, ...) with n at least this rank's count, on its device; without a gradient.
    """
    import torch
    import torch.distributed as dist

    if mine.dtype == torch.bool:
        return gather_rows(mine.to(torch.uint8), counts, world).bool()
    sent = mine.new_zeros((max(counts), *mine.shape[1:]))
    sent[: counts[world.rank]] = mine[: counts[world.rank]]
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent)
    return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


@contextlib.contextmanager
def open_world(config: DistributedConfig, placement: Placement) -> Iterator[World]:
    """Join the other processes of the job: store, device and process group (NCCL on CUDA, gloo on CPU).

    The process group's timeout is the hang timeout plus a minute, so that the watch reports a hang first. An exception inside
    (other than a ConfigError) ends this process and all others, where there are others: see `Peers`. With one process, owned by
    a command, it is reported and becomes a `ReportedError`. ConfigErrors are those of `pick_device`, `rendezvous` and
    `check_launcher`.
    """
    from dist_train.runtime.numerics import deterministic_kernels

    with deterministic_kernels(config), _joined(config, placement) as world:
        yield world


@contextlib.contextmanager
def _joined(config: DistributedConfig, placement: Placement) -> Iterator[World]:
    import torch
    import torch.distributed as dist

    check_launcher(os.environ)
    raise_file_limit()
    if placement.under_torchrun or placement.launcher in ("accelerate", "srun", "mpirun"):
        die_with_parent()
    timeout = timedelta(seconds=config.hang_timeout.value + 60)
    launchers = own = backend = None
    if placement.size > 1:
        # Else a process that trains a second time would find the keys of its first group in the launcher's store, and hang.
        launchers = dist.PrefixStore(f"group-{next(_GROUPS)}", rendezvous(placement, timeout))
        placement, nonce = complete_placement(
            placement, launchers, visible_gpus(config.device), timeout.total_seconds()
        )
        own = dist.PrefixStore(f"dist_train/{nonce}", launchers)  # an agent's store outlives a restart of its workers
    elif placement.launcher == "none" and in_a_shell(os.environ):
        print("warning: a shell of `srun --pty`: training with this process alone", file=sys.stderr, flush=True)
    peers = Peers(placement.rank, placement.size, own and own.clone(), config.hang_timeout.value)
    peers.start()
    signals.before_end(peers.stopped)
    try:
        device = pick_device(config.device, placement)
        threads = 1 if (config.threads, config.reproducibility) == ("auto", "bitwise") else config.threads
        torch.set_num_threads(_threads(threads, placement, device))
        if launchers is not None:
            cuda = device.type == "cuda"
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(
                backend, store=launchers, rank=placement.rank, world_size=placement.size, timeout=timeout,
                device_id=device if cuda else None,
            )  # fmt: skip
        yield World(placement, device, own, backend, peers)
        peers.close()
    except BaseException as error:
        record = peers.raised(error)
        if is_owned():
            backend = None  # this process ends: destroying the group would first wait for the others
            if record is not None and not isinstance(error, BrokenPipeError):
                failure.report(record)
                raise ReportedError from error
        raise
    finally:
        signals.before_end(None)
        if backend is not None:
            dist.destroy_process_group()


def _threads(choice: int | str, placement: Placement, device: torch.device) -> int:
    """Intra-op threads: the config's, else OMP_NUM_THREADS, else a fair share of the CPUs among the local ranks.

    With a GPU the share is one: waking more for the little that is left to the CPU cost 25 % of the speed (bench/RESULTS.md).
    """
    if choice != "auto":
        if int(choice) > (most := max(64, 16 * usable_cpus())):
            raise ConfigError.single("distributed.threads", f"expected at most {most} on this machine, found {choice}")
        return int(choice)
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return 1 if device.type == "cuda" else max(1, usable_cpus() // placement.local_size)
