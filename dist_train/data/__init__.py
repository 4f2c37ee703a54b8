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
    from dist_train.library.synthetic import MarkovChain, Shapes, TwoViews, collate_lists
    from dist_train.library.tables import CSV
    from dist_train.library.tokens import PackedTokens, Tokens, pack_tokens

_HOMES = (
    "data.augment", "data.errors", "library.augments", "library.datasets", "library.synthetic", "library.tables",
    "library.tokens",
)  # fmt: skip
__all__ = [
    "CSV", "Arrays", "Augment", "CutMix", "DataError", "Digits", "Draws", "Gaussians", "MarkovChain", "Mixup", "OneOf",
    "PackedTokens", "RandomErasing", "RandomHorizontalFlip", "RandomShift", "RandomSplit", "Shapes", "Tokens", "TwoViews",
    "collate_lists", "pack_tokens",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        if hasattr(module := importlib.import_module(f"dist_train.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module 'dist_train.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
