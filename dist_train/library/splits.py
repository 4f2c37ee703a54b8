"""Splitting one dataset into train, val and test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_train.data.errors import DataError
from dist_train.data.plan import Indices
from dist_train.runtime.seeding import SPLIT

SPLITS = ("train", "val", "test")


def split_number(name: str, split: str) -> int:
    """0, 1 or 2 for train, val or test; DataError with the dataset's name for anything else."""
    if split not in SPLITS:
        raise DataError(f"{name}: expected split to be one of {', '.join(SPLITS)}, found {split!r}")
    return SPLITS.index(split)


def split_indices(
    name: str, split: str, total: int, parts: Sequence[float], *, seed: int = 0, labels: np.ndarray | None = None
) -> Indices:
    """The samples of one split of `total`: disjoint from the others, sorted, always the same for the same arguments.

    Args:
        name: of the dataset, for messages.
        split: train, val or test.
        parts: sizes of train, val and test, see `part_sizes`.
        seed: 32 bits.
        labels: (total,) classes; the split is then stratified, to within one sample.
    """
    number = split_number(name, split)
    sizes = [*part_sizes(total, parts), 0, 0]
    order = np.arange(total, dtype=np.int64)
    np.random.RandomState([SPLIT, seed & 0xFFFFFFFF]).shuffle(order)
    if labels is not None:  # every contiguous part becomes stratified: a class's k-th of m goes to (k + 1/2) / m
        position = np.empty(total)
        for label in np.unique(labels):
            members = np.flatnonzero(labels[order] == label)
            position[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(position, kind="stable")]
    start = sum(sizes[:number])
    return np.sort(order[start : start + sizes[number]])


def part_sizes(total: int, parts: Sequence[float]) -> list[int]:
    """How many of `total` samples each part gets: counts (whole numbers > 1 or 0) or fractions (<= 1) of the whole.

    Fractions that sum to one use every sample (largest remainder). Raises DataError if they don't fit.
    """
    if any(part < 0 for part in parts):
        raise DataError(f"parts of a split must not be negative, found {list(parts)}")
    if all(part <= 1 for part in parts):
        if sum(parts) > 1 + 1e-9:
            raise DataError(f"fractions of a split must sum to at most 1, found {list(parts)} = {sum(parts):g}")
        exact = [part * total for part in parts]
        sizes = [int(value + 1e-9) for value in exact]
        missing = round(sum(exact)) - sum(sizes)
        for k in sorted(range(len(parts)), key=lambda k: sizes[k] - exact[k])[:missing]:
            sizes[k] += 1
        return sizes
    if any(part != int(part) for part in parts):
        raise DataError(f"parts of a split are either all fractions or all whole numbers, found {list(parts)}")
    if sum(parts) > total:
        raise DataError(f"a split asks for {sum(parts):g} samples of {list(parts)}, but the dataset has {total}")
    return [int(part) for part in parts]
