"""Distributed PyTorch training from one YAML file, with the same result on any number of processes."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_FACES = ("callbacks", "data", "metrics", "models", "schedules", "tasks")  # what configs name by _target_
__all__ = ["ConfigError", "load", "result", "train", *_FACES]


def __getattr__(name: str) -> Any:
    """Imported on first use: `--help` and config errors don't wait for more."""
    if name in _FACES:
        return importlib.import_module(f"dist_train.{name}")
    if name == "ConfigError":
        return importlib.import_module("dist_train.config.errors").ConfigError
    if name in __all__:
        return getattr(importlib.import_module("dist_train.run.api"), name)
    raise AttributeError(f"module 'dist_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
