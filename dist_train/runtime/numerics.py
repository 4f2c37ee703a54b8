"""What the bits of a result depend on besides the config and the code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dist_train.config.schema import Config, DistributedConfig


def numerics_of(config: Config, device: torch.device) -> dict[str, Any]:
    """Versions, device, instruction set and settings by which kernels choose how they sum."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compile": config.trainer.compile,
        "channels_last": config.trainer.channels_last,
    }


@contextlib.contextmanager
def deterministic_kernels(config: DistributedConfig) -> Iterator[None]:
    """Deterministic algorithms inside, if the config asks for them; to be entered before CUDA is first used."""
    if not (config.deterministic is True or config.reproducibility == "bitwise"):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
