"""Datasets that live on the device: the batches of the dataset itself, made by index; what can't live there, and why."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from dist_train.config.schema import DataConfig
from dist_train.data import Arrays, DataError, Digits, RandomSplit
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.placement import OnDevice, place
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions, batch_reader
from dist_train.task.batch import tensors_in

PIXELS = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 10
GIB = 1 << 30


class Own:
    """A dataset of a user's with a `read_batch`."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        return self.batch(np.array([index]))

    def read_batch(self, indices: Any) -> Any:
        return self.batch(indices)


def options(collate: Any = None, **data: Any) -> LoaderOptions:
    return LoaderOptions(DataConfig(train=object(), **data), 0, torch.device("cpu"), collate=collate)


def by_name(indices: Any) -> dict[str, Any]:
    return {"images": PIXELS[indices], "more": [LABELS[indices], torch.zeros(len(indices), 0)]}


def padded(indices: Any) -> Tensor:
    """As many columns as the longest of the batch needs."""
    return torch.ones(len(indices), int(indices.max()) + 1)


DATASETS: dict[str, Any] = {
    "tensors": Arrays(PIXELS, LABELS),
    "numpy": Arrays(PIXELS.numpy(), LABELS.numpy()),
    "inputs alone": Arrays(PIXELS),
    "torch's": TensorDataset(PIXELS, LABELS, LABELS.float()),
    "a split": RandomSplit(Arrays(PIXELS, LABELS), "train", stratify=True),
    "a subset of a subset": Subset(Subset(Digits("val"), range(3, 40)), [5, 1, 30]),
}


@pytest.mark.parametrize("name", DATASETS)
def test_batches_are_those_of_the_dataset(name: str) -> None:
    dataset = DATASETS[name]
    placed, where = place(dataset, "train", options(), free=GIB)
    assert type(placed) is OnDevice
    assert where.startswith("in device memory (")
    for indices in (np.arange(len(dataset)), np.array([2, 0, 2]), np.array([1])):
        read, expected = (list(tensors_in(batch_reader(each)(indices))) for each in (placed, dataset))  # type: ignore[misc]
        assert [(x.dtype, x.shape) for x in read] == [(x.dtype, x.shape) for x in expected]
        assert all(map(torch.equal, read, expected))
    assert len(placed) == len(dataset)
    assert all(map(torch.equal, tensors_in(placed[1]), tensors_in(dataset[1])))


def test_a_large_dataset_is_moved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.data.placement._CHUNK", 7)
    placed, _ = place(Own(by_name), "train", options(placement="device"), free=GIB)
    batch = placed.read_batch(np.array([49, 6, 7]))
    assert torch.equal(batch["images"], PIXELS[[49, 6, 7]])
    assert torch.equal(batch["more"][0], LABELS[[49, 6, 7]])
    assert batch["more"][1].shape == (3, 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_loaders_give_the_same_batches_from_the_device(ranks: int) -> None:
    dataset = RandomSplit(Arrays(PIXELS, LABELS), "train")
    placed, _ = place(dataset, "train", options(), free=GIB)
    for rank in range(ranks):
        here = LoaderOptions(DataConfig(train=object(), pin_memory=True), 0, torch.device("cpu"), rank, ranks)
        plan = Plan(3, len(dataset), 12)
        pair = [TrainLoader(each, plan, here, micro_batch_size=4, neighbours=1) for each in (placed, dataset)]
        for one, two in itertools.islice(zip(*(loader.steps() for loader in pair), strict=False), 5):
            for mine, theirs in zip(one.micro_batches, two.micro_batches, strict=True):
                assert np.array_equal(mine.indices, theirs.indices)
                assert all(map(torch.equal, mine.batch, theirs.batch))
        batches = [list(EvalLoader(each, 16, here)) for each in (placed, dataset)]
        for (samples, batch), (expected, other) in zip(*batches, strict=True):
            assert samples == expected
            assert all(map(torch.equal, batch, other))
        assert [loader._loader.pin_memory for loader in pair] == [False, True], "memory of a device can't be pinned"
        for loader in pair:
            loader.close()


REFUSED: list[tuple[Any, dict[str, Any], int, str]] = [
    (Arrays(PIXELS, LABELS, transform=float), {}, GIB, "read one by one"),
    (Arrays(PIXELS, LABELS), {"num_workers": 2}, GIB, "data.num_workers=2 asks for workers"),
    (Arrays(PIXELS, LABELS), {"collate": list}, GIB, "data.collate makes its batches"),
    (Own(lambda indices: {"images": PIXELS[indices], "names": ["a"] * len(indices)}), {}, GIB, "hold other things than"),
    (Own(padded), {}, GIB, "differ in shape, or with the batch"),
    (Own(lambda indices: LABELS[indices] - LABELS[indices].float().mean()), {}, GIB, "differ in shape, or with the batch"),
    (Own(lambda indices: 1 / 0), {}, GIB, "reading it failed: ZeroDivisionError"),
    (Arrays(PIXELS, LABELS), {}, 2000, "it has 2.73 kB|it has 2.8 kB"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "data", "free", "why"), REFUSED)
def test_what_cannot_live_on_the_device_stays_or_is_refused(
    dataset: Any, data: dict[str, Any], free: int, why: str
) -> None:
    with pytest.raises(
        DataError, match=rf"data.placement: device can't hold data.val \(.*\): .*({why}).*; leave it auto, or host"
    ):
        place(dataset, "val", options(**data, placement="device"), free)
    stays, where = place(dataset, "val", options(**data), free)
    assert stays is dataset
    assert where.startswith("in host memory: ")


def test_auto_takes_little_memory_and_only_what_is_known_to_be_the_same_in_any_batch() -> None:
    size = PIXELS.nbytes + LABELS.nbytes
    small, large = (
        place(Arrays(PIXELS, LABELS), "train", options(), free=free) for free in (size * 10, size * 10 - 10)
    )
    assert type(small[0]) is OnDevice
    assert "device memory are at most for auto" in large[1]
    assert "has a read_batch of its own" in place(Own(by_name), "train", options(), free=GIB)[1]
    assert place(Arrays(PIXELS), "train", options(placement="host"), free=GIB)[1] == "in host memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_made_on_the_gpu_without_waiting() -> None:
    placed, _ = place(
        Arrays(PIXELS, LABELS), "train", LoaderOptions(DataConfig(train=object()), 0, torch.device("cuda", 0)), GIB
    )
    indices = np.array([3, 3, 49])
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = placed.read_batch(indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images.cpu(), PIXELS[indices])
    assert torch.equal(labels.cpu(), LABELS[indices])
