"""What the bits of a result depend on besides the config and the code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dist_train.config.schema import Config


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
