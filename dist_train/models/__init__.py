"""Models that come with the package (`dist_train.library`); any other `nn.Module` is named by its import path."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.library.networks import GPT, DigitsGAN, DigitsVAE, UNet, small_faster_rcnn
    from dist_train.library.zoo import MLP, Cifar10Quick, DigitsCNN, LogisticRegression, MnistCNN, cifar_resnet18

_HOMES = ("zoo", "networks")
__all__ = [
    "GPT", "MLP", "Cifar10Quick", "DigitsCNN", "DigitsGAN", "DigitsVAE", "LogisticRegression", "MnistCNN", "UNet",
    "cifar_resnet18", "small_faster_rcnn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        if hasattr(module := importlib.import_module(f"dist_train.library.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module 'dist_train.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
