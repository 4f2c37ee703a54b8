"""Data: the plan of samples, the sampler, loaders, datasets and batched augmentation."""

from dist_train.data.augment import (
    Augment,
    CutMix,
    Draws,
    Mixup,
    OneOf,
    RandomErasing,
    RandomHorizontalFlip,
    RandomShift,
)
from dist_train.data.errors import DataError
from dist_train.library.arrays import Arrays
from dist_train.library.datasets import Digits, Gaussians, RandomSplit
from dist_train.library.tables import CSV

__all__ = [
    "Arrays",
    "Augment",
    "CSV",
    "CutMix",
    "DataError",
    "Digits",
    "Draws",
    "Gaussians",
    "Mixup",
    "OneOf",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomShift",
    "RandomSplit",
]
