"""Data: what a config and user code name. The classes live in `dist_train.library` and are imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.data.augment import Augment, Draws
    from dist_train.data.errors import DataError
    from dist_train.library.arrays import Arrays
    from dist_train.library.datasets import Digits, Gaussians, RandomSplit
    from dist_train.library.synthetic import MarkovChain, Shapes, TwoViews, collate_lists
    from dist_train.library.tables import CSV
    from dist_train.library.tokens import PackedTokens, Tokens, pack_tokens
    from dist_train.vision.color import ColorJitter
    from dist_train.vision.erasing import Cutout, RandomErasing
    from dist_train.vision.folders import ImageFolder
    from dist_train.vision.geometry import (
        RandomCrop,
        RandomHorizontalFlip,
        RandomResizedCrop,
        RandomShift,
        RandomVerticalFlip,
    )
    from dist_train.vision.mixing import CutMix, Mixup, OneOf
    from dist_train.vision.pictures import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
    from dist_train.vision.trivial import TrivialAugmentWide

_HOMES = (
    "data.augment", "data.errors", "vision.geometry", "vision.erasing", "vision.mixing", "library.datasets",
    "library.synthetic", "library.tables", "library.tokens", "vision.color", "vision.trivial", "vision.pictures",
    "vision.folders",
)  # fmt: skip
__all__ = [
    "CIFAR10", "CIFAR100", "CSV", "MNIST", "SVHN", "Arrays", "Augment", "ColorJitter", "CutMix", "Cutout",
    "DataError", "Digits", "Draws", "FashionMNIST", "Gaussians", "ImageFolder", "MarkovChain", "Mixup", "OneOf",
    "PackedTokens", "RandomCrop", "RandomErasing", "RandomHorizontalFlip", "RandomResizedCrop", "RandomShift", "RandomSplit",
    "RandomVerticalFlip", "Shapes", "Tokens", "TrivialAugmentWide", "TwoViews", "collate_lists", "pack_tokens",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        if hasattr(module := importlib.import_module(f"dist_train.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module 'dist_train.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
