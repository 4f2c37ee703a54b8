"""Reading the samples of a micro-batch: seeded one by one, or a whole batch at once where the dataset can do that."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate, get_worker_info

from dist_train.data.errors import CollateError, DataError, SampleError, dataset_name, describe_error, resource_hint
from dist_train.data.plan import Indices, MicroBatch, Plan
from dist_train.runtime.seeding import seed_sample

if TYPE_CHECKING:
    from dist_train.config.schema import DataConfig

Collate = Callable[[list[Any]], Any]
BatchReader = Callable[[Indices], Any]
ItemReader = Callable[[int, Tensor], Any]
_AT_ONCE, _MOST = 1 << 18, 16  # bytes, and batches, that are read at once where several small ones are
_ALIGNED = 64  # bytes: as torch's own memory is, which bits of a product of matrices may depend on


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
    if callable(read) and not _overridden(type(dataset), "read_batch"):
        return cast("BatchReader", read)
    if type(dataset) is TensorDataset:  # a subclass may do anything in its __getitem__
        return cast("BatchReader", dataset.__getitem__)
    if isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        inner = batch_reader(dataset.dataset)
        return None if inner is None else partial(_read_subset, inner, np.asarray(dataset.indices))
    return None


def reading_function(dataset: Any) -> Any:
    """What reads whole batches of a dataset, which aren't seeded; without that what reads and seeds each sample."""
    read: Any = batch_reader(dataset)
    while isinstance(read, partial):  # of a Subset
        read = read.args[0]
    return SampleReader.samples if read is None else getattr(read, "__func__", read)


def item_reader(dataset: Any) -> tuple[ItemReader, tuple[int, ...]] | None:
    """What reads the first part of a sample into its row of a batch and returns the second, and the shape of a row, uint8.

    That is a dataset's own `read_into` and `item_shape`, if this isn't None; Subsets of it are followed.
    """
    read, shape = getattr(dataset, "read_into", None), getattr(dataset, "item_shape", None)
    if callable(read) and shape is not None and not _overridden(type(dataset), "read_into"):
        return cast("ItemReader", read), tuple(shape)
    if isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        inner = item_reader(dataset.dataset)
        return (
            None if inner is None else (partial(_read_item_of_subset, inner[0], np.asarray(dataset.indices)), inner[1])
        )
    return None


def _read_item_of_subset(read: ItemReader, subset: Indices, index: int, row: Tensor) -> Any:
    return read(int(subset[index]), row)


def _new_rows(shape: tuple[int, ...]) -> Tensor:
    """A batch to be filled, uint8; in a worker in shared memory, so that sending it copies nothing (as in default_collate)."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # type: ignore[call-overload]


def _overridden(kind: type, name: str) -> bool:
    """Whether a subclass has changed the samples of a class with `read_batch`, say, which would then read others."""
    homes = (
        next((i for i, base in enumerate(kind.__mro__) if one in vars(base)), None) for one in ("__getitem__", name)
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
    which returns the collated batch itself. One whose samples are pairs of a uint8 tensor and something else may have
    `item_shape`, of this tensor, and `read_into(index, row) -> something else`, which writes it into the row of a batch.
    Both are used unless the user has a collate function (list of samples -> batch, by default torch's). All others are read by
    `__getitem__`; each sample, but in `read_batch`, with torch, numpy and `random` seeded before.

    Args:
        plan: training's, where a sample that can't be read is replaced by the next one of its epoch (`data.on_error: skip`).
    """

    def __init__(self, dataset: Any, seed: int, collate: Collate | None = None, plan: Plan | None = None) -> None:
        self.dataset, self.seed, self.plan = dataset, seed, plan
        self.collate: Collate = make_batch if collate is None else collate
        self._at_once = is_hugging_face(dataset) and dataset.format["type"] in ("torch", "numpy")
        self.read = batch_reader(dataset) if collate is None else None
        self._item = item_reader(dataset) if collate is None else None
        self._skipped: list[tuple[int, str]] = []

    def __getitems__(self, request: MicroBatch) -> MicroBatch:
        """Called once per micro-batch by torch's DataLoader, with what the batch sampler yielded."""
        name = dataset_name(self.dataset)
        if self.read is not None:
            try:
                batch = self.read(request.indices)
                _check_rows(batch, len(request.indices))
                return request._replace(batch=batch)
            except (Exception, SystemExit) as error:
                if self.plan is None or not _is_of_sample(error):
                    what = f"reading samples {_listed(request.indices)} of {name} at once in epoch {request.epoch}"
                    raise SampleError(f"{what} failed: {describe_error(error)}") from error
        self._skipped = []
        rows, samples = (None, self.samples(request)) if self._item is None else self._read_rows(request, *self._item)
        try:
            collated = self.collate(samples)
            batch = collated if rows is None else (rows, collated)
            return request._replace(batch=batch, skipped=tuple(self._skipped))
        except (Exception, SystemExit) as error:
            hint = resource_hint(error) or self._odd_one(request, samples)
            what = f"making a batch of samples {_listed(request.indices)} of {name} failed: {describe_error(error)}"
            raise CollateError(f"{what}{hint}") from error

    def read_ahead(self, requests: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """`__getitems__` of each, but several small batches at once: the calls cost more than the rows.

        Only where torch's or our own code reads whole batches; nothing may change the dataset meanwhile.
        """
        home = getattr(reading_function(self.dataset), "__module__", None) or ""
        waiting, many = iter(requests), 1
        while group := list(itertools.islice(waiting, many)):
            micro = group[-1]
            for micro in (self._read_at_once(group) if many > 1 else None) or map(self.__getitems__, group):
                yield micro
            if self.read is not None and home.startswith(("dist_train.", "torch.utils.data.")):
                sizes = [part.nbytes for part in _parts(micro.batch)]
                aligned = sizes and not any(size % _ALIGNED for size in sizes)
                many = max(1, min(_MOST, _AT_ONCE // max(1, sum(sizes)))) if aligned else 1

    def _read_at_once(self, group: list[MicroBatch]) -> list[MicroBatch] | None:
        """These cut out of one batch; None where that fails, or they wouldn't be just as if read alone."""
        assert self.read is not None
        sizes = [len(request.indices) for request in group]
        try:
            whole = self.read(np.concatenate([request.indices for request in group]))
        except Exception:  # which read alone names its batch
            return None
        parts = _parts(whole)
        rows_fit = all(len(part) == sum(sizes) and part.device.type == "cpu" for part in parts)
        if (
            not parts
            or not rows_fit
            or any(len(part) and part[0].nbytes * n % _ALIGNED for part in parts for n in sizes)
        ):
            return None
        cuts = list(zip(*(part.split(sizes) for part in parts), strict=True))
        batches = [cut[0] for cut in cuts] if isinstance(whole, Tensor) else [type(whole)(cut) for cut in cuts]
        return [request._replace(batch=batch) for request, batch in zip(group, batches, strict=True)]

    def samples(self, request: MicroBatch) -> list[Any]:
        """The samples of a request, in its order."""
        if self._at_once:  # nothing is drawn, and Arrow gathers many rows in the time of one
            try:
                return list(self.dataset.__getitems__(request.indices.tolist()))
            except (Exception, SystemExit):
                pass  # read one by one, it shows which sample is the cause
        return self._read_each(request, lambda k, index: self.dataset[index])

    def _read_rows(self, request: MicroBatch, read: ItemReader, shape: tuple[int, ...]) -> tuple[Tensor, list[Any]]:
        """The first parts of the samples, as a batch, and their second ones."""
        rows = _new_rows((len(request.indices), *shape))
        return rows, self._read_each(request, lambda k, index: read(index, rows[k]))

    def _read_each(self, request: MicroBatch, read: Callable[[int, int], Any]) -> list[Any]:
        """`read(place in the request, sample)` of each sample, seeded."""
        samples = []
        for k, (index, key) in enumerate(zip(request.indices.tolist(), request.random_keys.tolist(), strict=True)):
            seed_sample(self.seed, request.epoch, key)
            try:
                samples.append(read(k, index))
            except (Exception, SystemExit) as error:
                what = f"reading sample {index} of {dataset_name(self.dataset)} in epoch {request.epoch}"
                failed = SampleError(f"{what} failed: {describe_error(error)}")
                if self.plan is None or not _is_of_sample(error):
                    raise failed from error
                samples.append(self._next_readable(request, k, read, failed))
        return samples

    def _next_readable(self, request: MicroBatch, k: int, read: Callable[[int, int], Any], failed: SampleError) -> Any:
        """The next sample of the epoch that can be read, with the draws of the one that can't; which is recorded."""
        assert self.plan is not None
        key, tried = int(request.random_keys[k]), 1
        for index in self.plan.following(request.step, request.position + k):
            seed_sample(self.seed, request.epoch, key)
            tried += 1
            try:
                sample = read(k, index)
            except Exception as error:
                if not _is_of_sample(error):
                    raise
            else:
                if k < request.samples:  # others are read only for what they lend their neighbors
                    self._skipped.append((int(request.indices[k]), str(failed)))
                return sample
        raise SampleError(
            f"data.on_error=skip: {tried} samples in a row, as many as a global batch, can't be read: {failed}"
        )

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


def _is_of_sample(error: BaseException) -> bool:
    """Whether another sample may be read all the same: no resource of the process has run out, nobody wants to exit."""
    return isinstance(error, Exception) and not isinstance(error, MemoryError) and not resource_hint(error)


def _parts(batch: Any) -> list[Tensor]:
    """The tensors of a batch that is one, or a plain tuple or list of nothing else; [] for any other."""
    parts = [batch] if type(batch) is Tensor else list(batch) if type(batch) in (tuple, list) else []
    return parts if all(type(part) is Tensor and part.dim() for part in parts) else []


def _check_rows(batch: Any, count: int) -> None:
    """Raises ValueError: it is a tensor, or are tensors of one length, for another number of samples."""
    parts = (batch,) if isinstance(batch, Tensor) else batch
    if type(parts) not in (tuple, list):
        return
    lengths = {len(part) if isinstance(part, Tensor) and part.dim() else None for part in parts}
    if len(lengths) == 1 and lengths != {count} and None not in lengths:
        raise ValueError(
            f"read_batch(indices) was asked for {count} samples and returned {lengths.pop()} rows: return one for each"
        )


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
