"""Datasets that come with the package. Any other `Dataset` is named by its import path."""

from __future__ import annotations

import gzip
import importlib.util
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from dist_train.data.errors import DataError
from dist_train.data.reading import dataset_length, in_tensors
from dist_train.library.arrays import Arrays
from dist_train.library.splits import split_indices, split_number
from dist_train.runtime.seeding import SPLIT


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 digits: pixels (1797, 64) float32 in 0..16, and labels (1797,) int64."""
    # Importing scikit-learn takes a second on every rank, reading its data file 20 ms: so the file is read directly
    # from where it has been for ten years, and through the library otherwise.
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin if spec and spec.origin else "").parent / "datasets/data/digits.csv.gz"
    if not path.is_file():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.data.astype(np.float32), bunch.target.astype(np.int64)
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1], table[:, -1].astype(np.int64)


class Digits(Arrays):
    """Real handwritten digits: 1,797 gray images of 8x8 pixels in ten classes, shipped with scikit-learn.

    Source: UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998), its test part.

    Args:
        split: "train" (1257), "val" (180) or "test" (360): disjoint, stratified by class, fixed.
        flat: items are (64,) instead of (1, 8, 8).

    Items are (float32 in [0, 1], int64 label). Raises DataError for another split.
    """

    def __init__(self, split: str = "train", *, flat: bool = False) -> None:
        pixels, labels = _digits()
        part = split_indices("Digits", split, len(labels), [1257, 180, 360], labels=labels)
        images = torch.from_numpy(pixels[part] / 16.0)
        shaped = images if flat else images.view(-1, 1, 8, 8)
        super().__init__(shaped, torch.from_numpy(labels[part]), classes=[str(digit) for digit in range(10)])


class Gaussians(Arrays):
    """Two Gaussian clusters of points for logistic regression: class 0 around +mean + bias, class 1 around -mean + bias.

    Args:
        split: "train", "val" or "test": each is drawn on its own.
        samples: points of each class.
        mean, bias: centers of the clusters in every dimension; their standard deviation is 1.
        dimensions: coordinates of a point.
        seed: of the points.

    Items are ((dimensions,) float32, float32 0 or 1), as BCELoss wants them.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        samples: int = 100,
        mean: float = 1.7,
        bias: float = 1.0,
        dimensions: int = 2,
        seed: int = 0,
    ) -> None:
        if samples < 1 or dimensions < 1:
            raise DataError(f"Gaussians: samples and dimensions must be at least 1, found {samples} and {dimensions}")
        random = np.random.RandomState([SPLIT, seed & 0xFFFFFFFF, split_number("Gaussians", split)])
        points = random.standard_normal((2, samples, dimensions)) + bias + np.array([mean, -mean])[:, None, None]
        targets = torch.tensor([0.0, 1.0]).repeat_interleave(samples)
        super().__init__(torch.from_numpy(points.reshape(-1, dimensions)).float(), targets, classes=["0", "1"])


class RandomSplit(Subset[Any]):
    """One part of a dataset that has no splits of its own: name it three times, each with another `split`.

    Args:
        dataset: map-style. Each part builds its own, so that each may have its own transform.
        split: "train", "val" or "test".
        parts: sizes of train, val and test: fractions of the whole, or counts.
        seed: of the split.
        stratify: give each part the same proportions of classes; they come from the dataset's `targets`, or from reading
            every item once.
    """

    def __init__(
        self,
        dataset: Any,
        split: str,
        *,
        parts: Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        stratify: bool = False,
    ) -> None:
        total = dataset_length(dataset, "RandomSplit")
        dataset = in_tensors(dataset)
        labels = None
        if stratify:
            found = getattr(dataset, "targets", None)
            labels = np.asarray([dataset[index][1] for index in range(total)] if found is None else found)
            if labels.ndim != 1 or len(np.unique(labels)) > total // 2:
                hint = "set stratify: false for other targets"
                raise DataError(f"RandomSplit: stratify needs a class for each sample; {hint}")
        indices = split_indices("RandomSplit", split, total, parts, seed=seed, labels=labels)
        if not len(indices):
            raise DataError(f"RandomSplit: no sample remains for {split}: {list(parts)} of {total} samples")
        # An array gives Python numbers as a list does, without an object for each, whose reference counts would make each
        # loader worker copy all of them.
        super().__init__(dataset, array("q", indices.tobytes()))
        self.classes = getattr(dataset, "classes", None)
