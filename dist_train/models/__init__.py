"""Models that come with the package (`dist_train.library.zoo`); any other `nn.Module` is named by its import path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.library.zoo import MLP, Cifar10Quick, DigitsCNN, LogisticRegression, MnistCNN, cifar_resnet18

__all__ = ["MLP", "Cifar10Quick", "DigitsCNN", "LogisticRegression", "MnistCNN", "cifar_resnet18"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dist_train.models' has no attribute {name!r}")
    from dist_train.library import zoo

    return getattr(zoo, name)


def __dir__() -> list[str]:
    return __all__
