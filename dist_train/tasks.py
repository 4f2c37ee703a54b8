"""Tasks that a config can name: how a batch becomes losses (docs/tasks.md); `generate`, of a language model that was trained.

They live in `dist_train.library`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.library.contrastive import Contrastive
    from dist_train.library.dense import Detection, Segmentation
    from dist_train.library.distillation import Distillation
    from dist_train.library.generation import generate
    from dist_train.library.generative import GAN, VAE
    from dist_train.library.language import LanguageModel
    from dist_train.task.task import Supervised, Task
    from dist_train.task.terms import StepOutput

_HOMES = {
    "Contrastive": "library.contrastive",
    "Detection": "library.dense",
    "Distillation": "library.distillation",
    "GAN": "library.generative",
    "LanguageModel": "library.language",
    "Segmentation": "library.dense",
    "StepOutput": "task.terms",
    "Supervised": "task.task",
    "Task": "task.task",
    "VAE": "library.generative",
    "generate": "library.generation",
}
__all__ = [
    "GAN", "VAE", "Contrastive", "Detection", "Distillation", "LanguageModel", "Segmentation", "StepOutput", "Supervised", "Task",
    "generate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_train.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dist_train.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
