"""Distributed PyTorch training from one YAML file, with the same result on any number of processes."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    """`train` and `load`, imported on first use: `--help` and config errors don't wait for more."""
    if name in __all__:
        from dist_train.run import api

        return getattr(api, name)
    raise AttributeError(f"module 'dist_train' has no attribute {name!r}")
