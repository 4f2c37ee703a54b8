"""In a loader worker that reads a whole stream nobody sees which worker or rank it is, so that no stream splits itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data._utils import worker

# Where launchers (torchrun, accelerate, Slurm, MPI) and webdataset say who a process is among how many.
_NAMES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "NODE_RANK", "WORKER", "NUM_WORKERS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS",
    "SLURM_STEP_NUM_TASKS",
}  # fmt: skip
_FAMILIES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_")

_info: Any = None  # what get_worker_info gave before


def hide_placement() -> None:
    """Hide worker and rank for the rest of this process: `get_worker_info`, the launcher's variables, `torch.distributed`."""
    global _info
    _info = _info or worker._worker_info
    worker._worker_info = None
    for name in [name for name in os.environ if name in _NAMES or name.startswith(_FAMILIES)]:
        del os.environ[name]
    if torch.distributed.is_available():
        torch.distributed.GroupMember.WORLD = None  # inherited by fork, and of no use here


@contextlib.contextmanager
def worker_shown() -> Iterator[None]:
    """`get_worker_info` as torch has set it."""
    hidden, worker._worker_info = worker._worker_info, worker._worker_info or _info
    try:
        yield
    finally:
        worker._worker_info = hidden
