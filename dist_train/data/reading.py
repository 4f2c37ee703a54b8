"""Reading the samples of a micro-batch: seeded one by one, or a whole batch at once where the dataset can do that."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from dist_train.data.errors import CollateError, DataError, SampleError, dataset_name, describe_error, resource_hint
from dist_train.data.plan import Indices, MicroBatch
from dist_train.runtime.seeding import seed_sample

if TYPE_CHECKING:
    from dist_train.config.schema import DataConfig

Collate = Callable[[list[Any]], Any]
BatchReader = Callable[[Indices], Any]


@dataclass(frozen=True)
class LoaderOptions:
    """Reading options of this process, independent of the dataset."""

    config: DataConfig
    """The `data` section, for its DataLoader settings (see `DataConfig`)."""
    seed: int
    """The run's seed, for what transforms draw."""
    device: torch.device
    """The model's device; batches for CUDA are pinned by default."""
    rank: int = 0
    world_size: int = 1
    """How many ranks split each global batch."""
    local_ranks: int = 1
    """How many ranks share this machine's CPUs."""
    collate: Collate | None = None
    """List of samples -> batch, torch's by default."""
    all_gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns every rank's value, by rank, on all ranks; a collective (`World.all_gather`)."""


def dataset_length(dataset: Any, slot: str = "train") -> int:
    """The number of samples of a map-style dataset. Raises DataError if it has no length, or no sample."""
    if isinstance(dataset, Mapping) and type(dataset).__module__.startswith("datasets."):  # a DatasetDict
        raise DataError(
            f"data.{slot}: {type(dataset).__name__} holds several datasets, {', '.join(map(str, dataset))}: name one of them, as "
            f"`split: {next(iter(dataset), slot)}` beside `_target_: datasets.load_dataset`"
        )
    try:
        length = len(dataset)
    except TypeError as error:
        raise DataError(
            f"data.{slot}: {type(dataset).__name__} has no length ({error}); a dataset needs __len__ and __getitem__"
        ) from error
    if length < 1:
        raise DataError(f"data.{slot}: {type(dataset).__name__} has no samples; expected at least 1")
    return length


def batch_reader(dataset: Any) -> BatchReader | None:
    """The function that reads a whole batch of a dataset at once, if its items draw nothing at random.

    That is its own `read_batch`, or for torch's TensorDataset, and Subsets of any of these, one that does the same as
    collating item by item.
    """
    read = getattr(dataset, "read_batch", None)
    if callable(read) and not _overridden(type(dataset)):
        return cast("BatchReader", read)
    if type(dataset) is TensorDataset:  # a subclass may do anything in its __getitem__
        return cast("BatchReader", dataset.__getitem__)
    if isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        inner = batch_reader(dataset.dataset)
        return None if inner is None else partial(_read_subset, inner, np.asarray(dataset.indices))
    return None


def _overridden(kind: type) -> bool:
    """Whether a subclass has changed the samples of a class with `read_batch`, which would then read others."""
    homes = (
        next((i for i, base in enumerate(kind.__mro__) if name in vars(base)), None)
        for name in ("__getitem__", "read_batch")
    )
    items, batches = homes
    return items is not None and batches is not None and items < batches


def _read_subset(read: BatchReader, subset: Indices, indices: Indices) -> Any:
    return read(subset[indices])


def make_batch(samples: list[Any]) -> Any:
    """torch's `default_collate`, which also makes dataclasses of dataclasses: each field is collated by itself."""
    first = samples[0]
    if not dataclasses.is_dataclass(first):
        return default_collate(samples)
    batch = copy.copy(first)
    for field in dataclasses.fields(first):
        values = make_batch([getattr(sample, field.name) for sample in samples])
        object.__setattr__(batch, field.name, values)  # frozen ones too
    return batch


def in_tensors(dataset: Any) -> Any:
    """A `datasets.Dataset` (Hugging Face's) that gives dicts of tensors; any other dataset, and one with a transform, as it is.

    By default its samples hold Python lists, which `default_collate` would transpose, and floats in double precision. A
    `Subset` of one is followed. Formats that collate as they are, torch's and numpy's, stay.
    """
    if type(dataset) is Subset:
        inner = in_tensors(dataset.dataset)
        return dataset if inner is dataset.dataset else Subset(inner, dataset.indices)
    if not is_hugging_face(dataset) or dataset.format["type"] in ("torch", "numpy", "custom"):
        return dataset
    columns, others = dataset.format["columns"], dataset.format["output_all_columns"]
    return dataset.with_format("torch", columns=columns, output_all_columns=others)


def is_hugging_face(dataset: Any) -> bool:
    """Whether it is a map-style `datasets.Dataset`, or of a subclass; the package isn't imported."""
    return any(
        (kind.__module__, kind.__name__) == ("datasets.arrow_dataset", "Dataset") for kind in type(dataset).__mro__
    )


class SampleReader(Dataset[Any]):
    """A dataset whose reads depend on (seed, epoch, sample index) alone; fills in the batch of a `MicroBatch`.

    A dataset whose items draw nothing at random may have `read_batch(indices) -> batch`, with indices (n,) int64 numpy,
    which returns the collated batch itself; it is used unless the user has a collate function (list of samples -> batch, by
    default torch's). All others are read by `__getitem__`, with torch, numpy and `random` seeded before each sample.
    """

    def __init__(self, dataset: Any, seed: int, collate: Collate | None = None) -> None:
        self.dataset, self.seed = dataset, seed
        self.collate: Collate = make_batch if collate is None else collate
        self._at_once = is_hugging_face(dataset) and dataset.format["type"] in ("torch", "numpy")
        self.read = batch_reader(dataset) if collate is None else None

    def __getitems__(self, request: MicroBatch) -> MicroBatch:
        """Called once per micro-batch by torch's DataLoader, with what the batch sampler yielded."""
        name = dataset_name(self.dataset)
        if self.read is not None:
            try:
                return request._replace(batch=self.read(request.indices))
            except (Exception, SystemExit) as error:
                what = f"reading samples {_listed(request.indices)} of {name} at once in epoch {request.epoch}"
                raise SampleError(f"{what} failed: {describe_error(error)}") from error
        samples = self.samples(request)
        try:
            return request._replace(batch=self.collate(samples))
        except (Exception, SystemExit) as error:
            hint = resource_hint(error) or self._odd_one(request, samples)
            what = f"making a batch of samples {_listed(request.indices)} of {name} failed: {describe_error(error)}"
            raise CollateError(f"{what}{hint}") from error

    def samples(self, request: MicroBatch) -> list[Any]:
        """The samples of a request, in its order."""
        samples = []
        if self._at_once:  # nothing is drawn, and Arrow gathers many rows in the time of one
            try:
                return list(self.dataset.__getitems__(request.indices.tolist()))
            except (Exception, SystemExit):
                pass  # read one by one, it shows which sample is the cause
        for index, key in zip(request.indices.tolist(), request.random_keys.tolist(), strict=True):
            seed_sample(self.seed, request.epoch, key)
            try:
                samples.append(self.dataset[index])
            except (Exception, SystemExit) as error:
                what = f"reading sample {index} of {dataset_name(self.dataset)} in epoch {request.epoch}"
                raise SampleError(f"{what} failed: {describe_error(error)}") from error
        return samples

    def _odd_one(self, request: MicroBatch, samples: list[Any]) -> str:
        """Names the first sample that is None, else the first that can't be batched with the first one; and what to do."""
        need = (
            "; samples must be alike (resize, pad), and hold tensors, arrays, numbers, strings, lists or dicts "
            "(torchvision.transforms.v2.functional.to_image makes a tensor of an image); or name a function in data.collate"
        )
        for index, sample in zip(request.indices, samples):
            if sample is None:
                return (
                    f"; sample {index} is None: leave missing samples out of the dataset (torch.utils.data.Subset), or name "
                    f"a function in data.collate that drops them"
                )
        for index, sample in zip(request.indices[1:], samples[1:]):
            try:
                self.collate([samples[0], sample])
            except Exception as error:
                return f" (samples {request.indices[0]} and {index} alone: {error}){need}"
        return need


def _listed(indices: np.ndarray) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return f"{shown}, ... ({len(indices)} in all)" if len(indices) > 8 else shown


def attribute_of(dataset: Any, name: str) -> Any:
    """An attribute of a dataset or of the dataset that it wraps (`Subset`, `RandomSplit`); None without one."""
    while dataset is not None:
        value = getattr(dataset, name, None)
        if value is not None:
            return value
        dataset = getattr(dataset, "dataset", None)
    return None
