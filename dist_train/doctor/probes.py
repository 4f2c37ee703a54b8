"""Measurements of hosts and the links between them: versions, devices, memory, all-reduce, clocks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import socket
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import dist_train
from dist_train.runtime.world import World

LONG_ENOUGH = 0.15  # seconds of a transfer that give a stable measurement
LARGEST = {"cpu": 1 << 25, "cuda": 1 << 29}  # bytes


def versions() -> dict[str, str]:
    """What must be the same on all hosts."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda or "none")}
    with contextlib.suppress(OSError):
        found["driver"] = Path("/proc/driver/nvidia/version").read_text().split("Module")[1].split()[0]
    for name in ("torchvision", "numpy", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    root = Path(dist_train.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    found["dist_train"] = f"{dist_train.__version__} ({digest.hexdigest()[:8]})"
    return found


def resources(device: torch.device) -> dict[str, Any]:
    """This rank's device, and on its host: free and total memory, free /dev/shm (bytes), the limit of open files."""
    if device.type == "cuda":
        name, (free, total) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        name, free, total = "CPU", memory.available, memory.total
    found = {"host": socket.gethostname(), "device": name, "free": free, "total": total}
    with contextlib.suppress(OSError):
        shared = os.statvfs("/dev/shm")
        found["shm"] = shared.f_bavail * shared.f_frsize
    return {**found, "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}


def clock_offsets(world: World) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, within a few ms: all are read as an all-reduce ends."""
    token, mine = torch.zeros(1, device=world.device), []
    for _ in range(7 if world.size > 1 else 1):
        if world.size > 1:
            dist.all_reduce(token)
            token.item()
        mine.append(time.time())
    read = world.all_gather(mine)
    return [statistics.median(theirs - first for theirs, first in zip(times, read[0])) for times in read]


def all_reduce(world: World) -> tuple[bool, float]:
    """Whether sums over all ranks are right on every rank, and the bus bandwidth in GB/s, counted as by nccl-tests."""
    right = True

    def transfer(size: int) -> float:
        nonlocal right
        tensor = torch.full((size // 4,), float(world.rank + 1), device=world.device)
        dist.all_reduce(tensor)
        right = right and bool((tensor == world.size * (world.size + 1) / 2).all())
        world.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()
        return world.broadcast(time.perf_counter() - began)

    speed = _bandwidth(transfer, LARGEST[world.device.type])
    return all(world.all_gather(right)), 2 * (world.size - 1) / world.size * speed


def links(world: World) -> dict[tuple[str, str], float]:
    """GB/s between the first ranks of each host and the next, there and back; in two rounds, one transfer per host at a time."""
    hosts = world.all_gather([socket.gethostname(), world.placement.local_rank])
    first = [rank for rank, (_, local) in enumerate(hosts) if local == 0]
    mine: list[tuple[str, str, float]] = []
    for phase in (0, 1):
        for left, right in zip(first[phase::2], first[phase + 1 :: 2]):
            if world.rank in (left, right):
                speed = _link(world, right if world.rank == left else left, world.rank == left)
                if world.rank == left:
                    mine.append((hosts[left][0], hosts[right][0], speed))
        world.barrier()
    return {(one, other): speed for found in world.all_gather(mine) for one, other, speed in found}


def _link(world: World, peer: int, leads: bool) -> float:
    def transfer(size: int) -> float:
        tensor, took = torch.zeros(size // 4, device=world.device), torch.zeros(1, device=world.device)
        began = time.perf_counter()
        for sends in (leads, not leads):
            (dist.send if sends else dist.recv)(tensor, peer)
        if leads:
            took.fill_(float(tensor[0]) + time.perf_counter() - began)
        (dist.send if leads else dist.recv)(took, peer)
        return float(took)

    return 2 * _bandwidth(transfer, LARGEST[world.device.type] // 2)


def _bandwidth(transfer: Callable[[int], float], largest: int) -> float:
    """GB/s of `transfer(bytes)`, which returns the seconds, alike on all ranks in it: of one that takes long enough.

    The first isn't counted: it opens connections and loads kernels, which can take longer than any transfer.
    """
    transfer(size := 1 << 14)
    while True:
        seconds = transfer(size)
        if seconds > LONG_ENOUGH or size >= largest:
            return size / seconds / 1e9
        size *= 4 if seconds > LONG_ENOUGH / 20 else 16
