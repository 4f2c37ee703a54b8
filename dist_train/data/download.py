"""Datasets that download themselves: once per node, and with a message that helps where there is no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from dist_train.data.errors import DataError

T = TypeVar("T")


def downloads(spec: Any) -> bool:
    """Whether a component, or one nested in it, is written with `download: true`."""
    if isinstance(spec, dict):
        return spec.get("download") is True or any(downloads(value) for value in spec.values())
    return isinstance(spec, list | tuple) and any(downloads(value) for value in spec)


def once_per_node(build: Callable[[], T], *, rank: int, local_rank: int, barrier: Callable[[], None]) -> T:
    """Build in turns: rank 0, then the first rank of every other node, then everybody else finds the files there.

    Rank 0 goes alone because nodes may share a disk, where two downloads would write into each other. Every rank
    takes part in all barriers, also one whose build failed.
    """
    turn = 0 if rank == 0 else 1 if local_rank == 0 else 2
    for _ in range(turn):
        barrier()
    try:
        return build()
    finally:
        for _ in range(2 - turn):
            barrier()


def expected_files(dataset: Any, root: str | os.PathLike[str]) -> list[str]:
    """Where torchvision's CIFAR and MNIST classes look for their files; empty for other classes."""
    names: list[str] = []
    if hasattr(dataset, "base_folder") and hasattr(dataset, "train_list"):  # CIFAR10, CIFAR100
        names = [os.path.join(dataset.base_folder, entry[0]) for entry in dataset.train_list + dataset.test_list]
    elif isinstance(getattr(dataset, "resources", None), list):  # MNIST and its relatives
        names = [os.path.join(dataset.__name__, "raw", entry[0]) for entry in dataset.resources]
    return [os.path.join(root, name) for name in names]


def missing_data(slot: str, dataset: type, root: str | os.PathLike[str], error: BaseException) -> DataError:
    """What to say when a dataset didn't find its files and couldn't fetch them.

    Args:
        slot: train, val or test.
        dataset: the class.
        root: its argument of that name.
        error: what it raised.
    """
    absent = [file for file in expected_files(dataset, root) if not os.path.exists(file)]
    reason = next(iter(str(error).splitlines()), "")
    text = f"data.{slot}: {dataset.__name__} has no data in {os.path.abspath(root)}: {type(error).__name__}: {reason}"
    if not absent:  # a folder of one's own
        return DataError(f"{text}; relative paths count from the working directory")
    text += f"; expected {len(absent)} files that aren't there: {', '.join(absent)}"  # MNIST takes them unpacked, too
    return DataError(f"{text}; with a network, download: true fetches them; without one, copy them there")
