"""Reading weights from files, run directories, URLs and torchvision, without running any code from them."""

from __future__ import annotations

import io
import os
import pickle
import re
from typing import Any

from dist_train.config.errors import ConfigError, did_you_mean
from dist_train.files import StorageError
from dist_train.runtime.storage import is_url, open_storage

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")
KEY = "transfer.weights"
CODE = "more than tensors, which only running its code could rebuild"


def is_torchvision_name(weights: str) -> bool:
    """Whether `transfer.weights` names weights of torchvision: `ResNet18_Weights.DEFAULT`, `IMAGENET1K_V1`, `DEFAULT`."""
    return re.fullmatch(r"(\w+_Weights\.)?([A-Z][A-Z0-9_]*)|\w+_Weights\.\w+", weights) is not None


def is_folder(weights: str) -> bool:
    """Whether `transfer.weights` is a directory, of a run or of a checkpoint."""
    return not weights.endswith(_SUFFIXES) if is_url(weights) else os.path.isdir(weights)


def read_torchvision(name: str, builder: str) -> Any:
    """The state_dict of torchvision's weights, from torch's cache or the network.

    Args:
        name: `VGG16_Weights.IMAGENET1K_V1`, or its last part.
        builder: import path of the model, which a last part alone belongs to.

    Raises:
        ConfigError: there are no such weights, or they are neither cached nor downloadable.
    """
    import torch
    from torchvision import models

    head, _, member = name.rpartition(".")
    try:
        choices = models.get_weight(f"{head}.DEFAULT").__class__ if head else models.get_model_weights(builder)
    except ValueError as error:
        message = f"torchvision has no weights {name!r}; write them as ResNet18_Weights.IMAGENET1K_V1"
        raise ConfigError.single(KEY, f"{message}, or give the path of a file or directory") from error
    if member not in choices.__members__:
        known = [str(entry) for entry in choices]
        near = did_you_mean(f"{choices.__name__}.{member}", known)
        raise ConfigError.single(KEY, f"there are no weights {name}{near}; known are {', '.join(known)}")
    weights = choices[member]
    place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError.single(KEY, f"{place} is refused: it holds {CODE}; delete that file") from error
    except (OSError, RuntimeError) as error:  # no network, no space, a wrong hash
        message = f"{name} can't be downloaded from {weights.url}: {error}; without a network put that file at {place}"
        raise ConfigError.single(KEY, message) from error


def read_file(location: str) -> Any:
    """The content of a state_dict or safetensors file, on the CPU.

    Raises:
        ConfigError: it doesn't exist, can't be read, or holds objects that only running code could rebuild.
    """
    import torch

    folder, _, name = location.rpartition("/")
    try:
        data = open_storage(folder or "." if folder or not location.startswith("/") else "/").read_bytes(name)
        if name.endswith(".safetensors"):
            from safetensors.torch import load

            return load(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        near = ""
        if not is_url(location) and os.path.isdir(folder or "."):
            near = did_you_mean(name, os.listdir(folder or "."), prefix=f"{folder}/" if folder else "")
        raise ConfigError.single(KEY, f"there is no file or directory {location}{near}") from None
    except StorageError as error:
        raise ConfigError.single(KEY, str(error)) from error
    except Exception as error:  # both formats have many ways to be malformed
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        message = f"{location} can't be read as weights: {reason}; expected a state_dict of torch.save, or safetensors"
        if isinstance(error, pickle.UnpicklingError):
            message = (
                f"{location} is refused: it holds {CODE} ({reason}); save torch.save(model.state_dict(), FILE) instead"
            )
        raise ConfigError.single(KEY, message) from error
