"""Datasets that fit live in device memory (`data.placement`): their batches are made there, by index, and nothing travels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from dist_train.data.errors import DataError, dataset_name, describe_error
from dist_train.data.plan import Indices
from dist_train.data.reading import BatchReader, LoaderOptions, batch_reader
from dist_train.data.stream import is_stream
from dist_train.task.batch import map_tensors, tensors_in
from dist_train.text import format_bytes

# `auto`: few enough bytes to be read in about a second, and little enough of the memory that the model needs, too.
_MOST, _SHARE = 2 << 30, 0.1
_CHUNK = 2048  # samples that are read at once while they are moved
_COMPARED = 8  # samples that are read alone, too


class OnDevice(Dataset[Any]):
    """A dataset whose samples are rows of tensors in device memory.

    Args:
        dataset: the dataset itself, whose single items are read as before.
        rows: what its `read_batch` gives of all samples, in order, on the device.
    """

    def __init__(self, dataset: Any, rows: Any) -> None:
        self.dataset, self._rows = dataset, rows
        self._device = next(tensors_in(rows)).device

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def read_batch(self, indices: Indices) -> Any:
        """The batch, on the device; the host doesn't wait for it."""
        where = torch.from_numpy(indices)
        if self._device.type == "cuda":
            where = where.pin_memory().to(self._device, non_blocking=True)
        return map_tensors(lambda rows: rows.index_select(0, where), self._rows)


def place_datasets(datasets: Mapping[str, Any], options: LoaderOptions) -> tuple[dict[str, Any], str]:
    """The datasets as `data.placement` says, and a line that says where each is; "" on the CPU, where there is no choice.

    Raises:
        DataError: `device` was asked for, and one can't be held there; says why.
    """
    if options.device.type != "cuda":
        return dict(datasets), ""
    placed, notes = dict[str, Any](), list[str]()
    for split, dataset in datasets.items():
        free = torch.cuda.mem_get_info(options.device)[0]
        placed[split], where = place(dataset, split, options, free)
        notes.append(f"{split} {where}")
    return placed, "; ".join(notes)


def place(dataset: Any, split: str, options: LoaderOptions, free: int) -> tuple[Any, str]:
    """One dataset, and where it is.

    Args:
        free: bytes of the device's memory.

    Raises:
        DataError: as for `place_datasets`.
    """
    asked = options.config.placement
    if asked == "host":
        return dataset, "in host memory"
    read, size, why = _readable(dataset, options, asked == "device")
    if read is not None and not why:
        most = free if asked == "device" else min(_MOST, int(_SHARE * free))
        if size > most:
            limit = "free" if most == free else f"at most for auto (of {format_bytes(free)} free)"
            why = f"it has {format_bytes(size)}, and {format_bytes(most)} of device memory are {limit}"
        elif (rows := _moved(read, len(dataset), options.device)) is None:
            why = "its samples differ in shape, or with the batch that they are read in"
        else:
            return OnDevice(dataset, rows), f"in device memory ({format_bytes(size)})"
    if asked == "device":
        raise DataError(
            f"data.placement: device can't hold data.{split} ({dataset_name(dataset)}): {why}; leave it auto, or host"
        )
    return dataset, f"in host memory: {why}"


def _readable(dataset: Any, options: LoaderOptions, asked: bool) -> tuple[BatchReader | None, int, str]:
    """What reads its batches, and the bytes of all its samples; or why it can't be held on a device."""
    if is_stream(dataset) or not hasattr(dataset, "__len__") or not len(dataset):
        return None, 0, "it isn't a map-style dataset with samples"
    if options.collate is not None:
        return None, 0, "data.collate makes its batches of single samples"
    if options.config.num_workers not in ("auto", 0):
        return None, 0, f"data.num_workers={options.config.num_workers} asks for workers, which read from host memory"
    read = batch_reader(dataset)
    if read is None:
        return None, 0, "its samples are read one by one (a transform, or no read_batch)"
    if not (asked or _is_known(dataset)):
        return None, 0, "it has a read_batch of its own: data.placement=device if a sample is the same in any batch"
    try:
        first = read(np.arange(1))
    except Exception as error:
        return None, 0, f"reading it failed: {describe_error(error)}"
    if not _has_rows(first, 1):
        return None, 0, "its batches hold other things than tensors with a row for each sample"
    return read, len(dataset) * sum(tensor.nbytes for tensor in tensors_in(first)), ""


def _is_known(dataset: Any) -> bool:
    """Whether its samples are known to be the same in any batch: ours and torch's, and subsets of them."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    home = next((kind.__module__ for kind in type(dataset).__mro__ if "read_batch" in vars(kind)), "")
    return type(dataset) is TensorDataset or home.startswith("dist_train.")


def _has_rows(batch: Any, count: int) -> bool:
    if isinstance(batch, Tensor):
        return batch.dim() > 0 and len(batch) == count and batch.layout == torch.strided
    parts = list(batch.values()) if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else []
    return bool(parts) and all(_has_rows(part, count) for part in parts)


def _moved(read: BatchReader, length: int, device: torch.device) -> Any:
    """All samples on the device, read in parts; None if some differ in shape, or with the batch that they are read in."""
    first = read(np.arange(1))
    rows = map_tensors(lambda part: torch.empty(length, *part.shape[1:], dtype=part.dtype, device=device), first)
    alone = np.unique(np.linspace(0, length - 1, _COMPARED).round().astype(np.int64))
    for compares, indices in (*((False, part) for part in _chunks(length)), *((True, np.array([k])) for k in alone)):
        for held, part in zip(tensors_in(rows), tensors_in(read(indices)), strict=True):
            if (part.shape[1:], part.dtype, len(part)) != (held.shape[1:], held.dtype, len(indices)):
                return None
            place = held[indices[0] : indices[-1] + 1]
            if not compares:
                place.copy_(part)
            elif not torch.equal(place.cpu(), part):
                return None
    return rows


def _chunks(length: int) -> Iterator[Indices]:
    return (np.arange(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK))
