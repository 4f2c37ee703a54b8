"""Reading the samples of a request: seeded one by one, or a whole batch at once where the dataset says it can."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from dist_train.data.errors import DataError, SampleError
from dist_train.data.plan import Indices
from dist_train.data.sampler import Request
from dist_train.runtime.seeding import seed_sample

Collate = Callable[[list[Any]], Any]


def dataset_length(dataset: Any, slot: str = "train") -> int:
    """The number of samples of a map-style dataset.

    Raises:
        DataError: it has no length, or no sample.
    """
    try:
        length = len(dataset)
    except TypeError as error:
        raise DataError(
            f"data.{slot}: {type(dataset).__name__} has no length ({error}); a dataset needs __len__ and __getitem__"
        ) from error
    if length < 1:
        raise DataError(f"data.{slot}: {type(dataset).__name__} has no samples; expected at least 1")
    return length


def batch_reader(dataset: Any) -> Callable[[Indices], Any] | None:
    """The function that reads a whole batch of a dataset at once, if its items draw nothing at random.

    That is its own `read_batch`, or for torch's TensorDataset, and Subsets of any of these, one that does the same as
    collating item by item.
    """
    read = getattr(dataset, "read_batch", None)
    if callable(read):
        return cast("Callable[[Indices], Any]", read)
    if type(dataset) is TensorDataset:  # a subclass may do anything in its __getitem__
        return partial(_read_tensors, dataset)
    if type(dataset) is Subset:
        inner = batch_reader(dataset.dataset)
        return partial(read_part, inner, np.asarray(dataset.indices)) if inner is not None else None
    return None


def _read_tensors(dataset: TensorDataset, indices: Indices) -> list[torch.Tensor]:
    where = torch.from_numpy(indices)
    return [tensor.index_select(0, where) for tensor in dataset.tensors]


def read_part(read: Callable[[Indices], Any], part: Indices, indices: Indices) -> Any:
    """Read a batch of a part of a dataset: item k of it is item `part[k]` of the whole."""
    return read(part[indices])


class Seeded(Dataset[Any]):
    """A dataset whose reads depend on (seed, epoch, sample index) alone; answers a `Request` with (request, batch).

    A dataset may declare that its items draw nothing at random, and is then read faster:

    * `read_batch(indices) -> batch` with indices (n,) int64 numpy returns the collated batch itself (unless there is a
      collate of the user's own);
    * `deterministic_items = True` lets its `__getitems__(list[int]) -> list` read all samples in one call.

    All others are read by `__getitem__`, with torch, numpy and `random` seeded before each sample.

    Args:
        dataset: any object with `__getitem__`.
        seed: the run's seed.
        collate: list of samples -> batch; None is torch's `default_collate`.
    """

    def __init__(self, dataset: Any, seed: int, collate: Collate | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.collate: Collate = default_collate if collate is None else collate
        self.read = batch_reader(dataset) if collate is None else None
        self.listed = bool(getattr(dataset, "deterministic_items", False)) and hasattr(dataset, "__getitems__")

    def __len__(self) -> int:
        return dataset_length(self.dataset)

    def __getitems__(self, request: Request) -> tuple[Request, Any]:
        """Called once per micro-batch by torch's DataLoader, with what the batch sampler yielded."""
        if self.read is not None:
            return request, self._all(request, self.read, request.indices)
        if self.listed:
            samples = self._all(request, self.dataset.__getitems__, request.indices.tolist())
        else:
            samples = [self._one(request.epoch, index) for index in request.indices.tolist()]
        return request, collated(self.collate, self.dataset, request, samples)

    def _one(self, epoch: int, index: int) -> Any:
        seed_sample(self.seed, epoch, index)
        try:
            return self.dataset[index]
        except Exception as error:
            raise SampleError(
                f"reading sample {index} of {dataset_name(self.dataset)} in epoch {epoch} failed: {told(error)}"
            ) from error

    def _all(self, request: Request, read: Callable[[Any], Any], indices: Any) -> Any:
        try:
            return read(indices)
        except Exception as error:
            raise SampleError(
                f"reading samples {_listed(request.indices)} of {dataset_name(self.dataset)} at once in epoch "
                f"{request.epoch} failed: {told(error)}"
            ) from error


def collated(collate: Collate, dataset: Any, request: Request, samples: list[Any]) -> Any:
    """The batch of samples that were read for a request; SampleError names the first that doesn't fit."""
    try:
        return collate(samples)
    except Exception as error:
        raise SampleError(
            f"making a batch of samples {_listed(request.indices)} of {dataset_name(dataset)} failed: {told(error)}"
            f"{_odd_one(request, samples)}; make all samples alike (resize, pad) or name a function in data.collate"
        ) from error


def dataset_name(dataset: Any) -> str:
    """The class of a dataset as it is written in a config."""
    kind = type(dataset)
    return kind.__qualname__ if kind.__module__ == "__main__" else f"{kind.__module__}.{kind.__qualname__}"


def told(error: BaseException) -> str:
    """The error in one line with the user's own place: the innermost frame of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{place}"


def _listed(indices: np.ndarray) -> str:
    shown = ", ".join(str(index) for index in indices[:8])
    return f"{shown}, ... ({len(indices)} in all)" if len(indices) > 8 else shown


def _form(sample: Any) -> Any:
    """What must agree between samples for the default collate: types, and shapes of arrays and tensors."""
    if isinstance(sample, torch.Tensor | np.ndarray):
        return f"{type(sample).__name__} of shape {tuple(sample.shape)}"
    if isinstance(sample, dict):
        return {key: _form(value) for key, value in sample.items()}
    if isinstance(sample, tuple | list):
        return [_form(value) for value in sample]
    return type(sample).__name__


def _odd_one(request: Request, samples: list[Any]) -> str:
    """Names the first sample that differs in form from the batch's first."""
    for index, sample in zip(request.indices[1:], samples[1:]):
        if _form(sample) != _form(samples[0]):
            return f" (sample {request.indices[0]} is {_form(samples[0])}, sample {index} is {_form(sample)})"
    return f" (each sample is {_form(samples[0])})" if samples else ""
