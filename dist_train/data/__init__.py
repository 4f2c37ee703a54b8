"""Data: what a config and user code name. The classes live in `dist_train.library` and are imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.data.augment import Augment, Draws
    from dist_train.data.errors import DataError
    from dist_train.library.arrays import Arrays
    from dist_train.library.augments import CutMix, Mixup, OneOf, RandomErasing, RandomHorizontalFlip, RandomShift
    from dist_train.library.datasets import Digits, Gaussians, RandomSplit
    from dist_train.library.tables import CSV

_HOMES = {
    "data.augment": ("Augment", "Draws"),
    "data.errors": ("DataError",),
    "library.arrays": ("Arrays",),
    "library.augments": ("CutMix", "Mixup", "OneOf", "RandomErasing", "RandomHorizontalFlip", "RandomShift"),
    "library.datasets": ("Digits", "Gaussians", "RandomSplit"),
    "library.tables": ("CSV",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "CSV", "Arrays", "Augment", "CutMix", "DataError", "Digits", "Draws", "Gaussians", "Mixup", "OneOf", "RandomErasing",
    "RandomHorizontalFlip", "RandomShift", "RandomSplit",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dist_train.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dist_train.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
