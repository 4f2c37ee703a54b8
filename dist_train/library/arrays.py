"""Samples from arrays in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.errors import DataError
from dist_train.data.plan import Indices

Transform = Callable[[Any], Any]


class Arrays(Dataset[Any]):
    """Images or features with their labels, from files or from lists: the `CustomDataset` of a PyTorch course.

    Args:
        inputs: a .npy, .npz or .pt file, or an array, a tensor or a list, with a sample in each row. A .npz file, or a
            dict or a pair in a .pt file, holds them as "inputs" and "targets". A .npy file is memory-mapped.
        targets: likewise, if they aren't in the inputs' file; without any, items are inputs alone.
        transform: applied to each input, as it is in the file.
        target_transform: applied to each target.
        as_image: hand the transform a PIL image (made of uint8 arrays (H, W) or (H, W, 3)).
        classes: names of the classes, for reports.

    Without transforms items are tensors (double precision becomes torch's default dtype), and a batch is read at once.

    Raises:
        DataError: a file is missing or can't be read, or there are not as many targets as inputs.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        as_image: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        held = _open(inputs, "inputs")
        labels = held.get("targets") if targets is None else _open(targets, "targets")["targets"]
        self.inputs = _rows(held["inputs"])
        self.targets = None if labels is None else _rows(labels)
        if self.targets is not None and len(self.targets) != len(self.inputs):
            found = f"{len(self.inputs)} inputs and {len(self.targets)} targets"
            raise DataError(f"Arrays: expected a target for each input, found {found}")
        self.transform, self.target_transform, self.as_image = transform, target_transform, as_image
        self.classes = list(classes) if classes is not None else None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        row = self.inputs[index]
        if self.as_image:
            from PIL import Image

            row = Image.fromarray(np.asarray(row))
        row = _tensor(row) if self.transform is None else self.transform(row)
        if self.targets is None:
            return row
        target = self.targets[index]
        return row, _tensor(target) if self.target_transform is None else self.target_transform(target)

    @property
    def read_batch(self) -> Callable[[Indices], Any] | None:
        """Reads a whole batch, unless something has to be done sample by sample."""
        by_sample = self.transform is not None or self.target_transform is not None or self.as_image
        return None if by_sample or isinstance(self.inputs, list) or isinstance(self.targets, list) else self._read

    def _read(self, indices: Indices) -> Any:
        inputs = _batch(self.inputs, indices)
        return inputs if self.targets is None else (inputs, _batch(self.targets, indices))


def _open(value: Any, what: str) -> dict[str, Any]:
    """What an argument means, by name; a bare array is named `what`."""
    held = _file(Path(value), what) if isinstance(value, str | os.PathLike) else value
    if not isinstance(held, dict):
        return {what: held}
    if what not in held:
        raise DataError(f"Arrays: {value} holds no {what!r}; it holds {', '.join(map(repr, held)) or 'nothing'}")
    return held


def _file(path: Path, what: str) -> Any:
    """What a .npy, .npz or .pt file holds: an array, or several by name."""
    if not path.is_file():
        raise DataError(f"Arrays: {what}: no file {path} (looked in {path.absolute().parent})")
    if path.suffix not in (".npy", ".npz", ".pt", ".pth"):
        raise DataError(f"Arrays: {what}: expected a .npy, .npz or .pt file, found {path}")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own
        raise DataError(f"Arrays: {what}: {path} can't be read: {type(error).__name__}: {error}") from error
    return dict(zip(("inputs", "targets"), held)) if isinstance(held, tuple | list) else held


def _rows(value: Any) -> Any:
    """An array or a tensor of numbers with a sample in each row; a list of anything else stays a list."""
    if isinstance(value, Tensor | np.ndarray):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # images of different sizes
        return list(value)
    return array if array.dtype.kind in "biuf" else list(value)


def _tensor(value: Any) -> Any:
    """Numbers as a tensor of a dtype that models take; anything else as it is."""
    if isinstance(value, np.ndarray | np.generic):
        value = torch.from_numpy(np.array(value))
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        return value.to(torch.get_default_dtype())
    return value


def _batch(rows: Any, indices: Indices) -> Any:
    if isinstance(rows, Tensor):
        return _tensor(rows.index_select(0, torch.from_numpy(indices)))
    return _tensor(torch.from_numpy(np.asarray(rows[indices])))  # indexing by an array has copied already
