"""Distributed PyTorch training from one YAML file, with the same result on any number of processes."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """`train`, imported when it is asked for: `dist_train.main --help` and config errors don't wait for more."""
    if name == "train":
        from dist_train.commands.train import train

        return train
    raise AttributeError(f"module 'dist_train' has no attribute {name!r}")
