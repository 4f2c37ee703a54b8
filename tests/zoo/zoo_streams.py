"""Streams that split themselves over ranks and workers, as their documentation says: webdataset, datasets, torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

TARS = "shards/part-{000..003}.tar"  # six samples each
SAMPLES = 24


def inputs_of(index: int) -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(index))


def write_tars(folder: Path) -> None:
    """The tar files of TARS, below `folder`."""
    (folder / "shards").mkdir()
    for tar in range(4):
        with webdataset.TarWriter(str(folder / f"shards/part-{tar:03d}.tar")) as out:
            for index in range(tar * 6, tar * 6 + 6):
                out.write({"__key__": f"{index:06d}", "x.npy": inputs_of(index).numpy(), "y.cls": index})


def web(shuffle: int = 0) -> Any:
    """webdataset for several nodes: split by node, and by worker, which is its default."""
    stream = webdataset.WebDataset(TARS, shardshuffle=False, nodesplitter=webdataset.split_by_node)
    return (stream.shuffle(shuffle) if shuffle else stream).decode().to_tuple("x.npy", "y.cls")


def rows(shards: int) -> Any:
    """datasets' streaming form, of several shards."""
    held = {"x": [inputs_of(index).tolist() for index in range(SAMPLES)], "y": list(range(SAMPLES))}
    return datasets.Dataset.from_dict(held).to_iterable_dataset(num_shards=shards).with_format("torch")


class SelfSplit(IterableDataset[Any]):
    """The example of torch's documentation: each worker its own range."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from ((inputs_of(index), index) for index in range(first, SAMPLES, step))
