"""Datasets that come with the package."""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.errors import DataError
from dist_train.data.plan import Indices
from dist_train.data.splits import cut_indices

_DIGITS_SPLIT = {"train": 1257, "val": 180, "test": 360}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 digits: pixels (1797, 64) float32 in 0..16, and labels (1797,) int64."""
    # Importing scikit-learn takes a second on every rank, reading its data file 20 ms: so the file is read directly
    # where it lies as it has for ten years, and through the library otherwise.
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            with gzip.open(path, "rt", encoding="ascii") as file:
                table = np.loadtxt(file, delimiter=",", dtype=np.float32)
            return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.data.astype(np.float32), bunch.target.astype(np.int64)


class Digits(Dataset[tuple[Tensor, int]]):
    """Real handwritten digits: 1,797 grey images of 8x8 pixels in ten classes, shipped with scikit-learn.

    Source: UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998), its test part.

    Args:
        split: "train" (1257), "val" (180) or "test" (360): disjoint, stratified by class, fixed.
        flat: items are (64,) instead of (1, 8, 8).

    Items are (float32 in [0, 1], int label). Raises DataError for another split.
    """

    classes = [str(digit) for digit in range(10)]
    deterministic_items = True

    def __init__(self, split: str = "train", *, flat: bool = False) -> None:
        if split not in _DIGITS_SPLIT:
            raise DataError(f"Digits: expected split to be one of {', '.join(_DIGITS_SPLIT)}, found {split!r}")
        pixels, labels = _digits()
        part = cut_indices(list(_DIGITS_SPLIT.values()), seed=0, labels=labels)[list(_DIGITS_SPLIT).index(split)]
        images = torch.from_numpy(pixels[part] / 16.0)
        self.inputs = images if flat else images.view(-1, 1, 8, 8)
        self.targets = torch.from_numpy(labels[part])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.targets[index])

    def read_batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """The collated batch of `indices` (n,): inputs (n, 1, 8, 8) or (n, 64), targets (n,) int64."""
        where = torch.from_numpy(indices)
        return self.inputs.index_select(0, where), self.targets.index_select(0, where)
