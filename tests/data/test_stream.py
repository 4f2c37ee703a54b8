from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from dist_train.config.schema import DataConfig
from dist_train.data import DataError
from dist_train.data.errors import SampleError
from dist_train.data.loader import EvalLoader, Reading, TrainLoader, build_plan
from dist_train.data.passes import is_stream
from dist_train.data.plan import Plan

CPU = torch.device("cpu")


def config(**changes: Any) -> DataConfig:
    return DataConfig(train=object(), **{"global_batch_size": 8, "num_workers": 0, **changes})


def reading(rank: int = 0, world_size: int = 1, num_workers: int = 0) -> Reading:
    return Reading(config(num_workers=num_workers), 3, CPU, rank, world_size)


class Stream(IterableDataset[Any]):
    """20 samples a pass: (number, pass, what the three generators drew)."""

    def __init__(self, shuffle: bool = False) -> None:
        self.passes, self.epoch, self.shuffle = 0, 0, shuffle

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = list(range(20))
        if self.shuffle:
            random.shuffle(order)
        for number in order:
            yield torch.tensor([number, self.epoch, torch.rand(()).item(), np.random.rand(), random.random()])


class Known(Stream):
    def __len__(self) -> int:
        return 20


class Sharding(Known):
    def shard(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def __iter__(self) -> Iterator[Any]:
        return iter([row for k, row in enumerate(super().__iter__()) if k % self.count == self.index])


class Torn(Known):
    def __iter__(self) -> Iterator[Any]:
        yield from range(5)
        raise OSError("the shard ends here")


class Empty(Known):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def loader_of(dataset: Any, plan: Plan, micro_batch_size: int = 8, neighbours: int = 0, **given: int) -> TrainLoader:
    return TrainLoader(dataset, plan, reading(**given), micro_batch_size=micro_batch_size, neighbours=neighbours)


def batches(dataset: Any, plan: Plan, start: int, stop: int, world_size: int = 1, **given: Any) -> list[torch.Tensor]:
    """The global batch of each step, put together from all ranks."""
    steps: list[list[torch.Tensor]] = [[] for _ in range(start, stop)]
    for rank in range(world_size):
        loader = loader_of(dataset(), plan, rank=rank, world_size=world_size, **given)
        for work in loader.steps(start, stop):
            steps[work.step - start] += [m.batch for m in work.micro_batches if not m.weightless]
        loader.close()
    return [torch.cat(parts) for parts in steps]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_the_same_batches_on_any_ranks_and_workers_and_after_a_resume(
    shuffle: bool, world_size: int, num_workers: int
) -> None:
    plan = Plan(3, 24, 8, shuffle=False)
    reference = batches(lambda: Stream(shuffle), plan, 0, 6)
    given = {"world_size": world_size, "num_workers": num_workers, "micro_batch_size": 3}
    again = batches(lambda: Stream(shuffle), plan, 2, 6, **given)
    assert all(a.equal(b) for a, b in zip(again, reference[2:], strict=True))
    rows = torch.cat(reference)
    assert rows[:, 1].tolist() == [0] * 20 + [1] * 20 + [2] * 8
    for begin in (0, 20):
        assert sorted(rows[begin : begin + 20, 0].tolist()) == list(range(20))
    assert (rows[:20, 0].tolist() == list(range(20))) is not shuffle
    assert len(set(rows[:, 2].tolist())) == len(set(rows[:, 4].tolist())) == 48


def test_a_dataset_that_shards_itself_is_asked_once_per_reader_and_read_once() -> None:
    plan = Plan(3, 20, 4, shuffle=False)
    for num_workers in (0, 1, 2):
        rows = torch.cat(batches(Sharding, plan, 0, 5, world_size=2, num_workers=num_workers, micro_batch_size=2))
        assert len(rows) == 20
        if num_workers < 2:
            assert sorted(rows[:, 0].tolist()) == list(range(20))


def test_evaluation_reads_each_sample_of_a_stream_once_each_time() -> None:
    for world_size, num_workers in [(1, 0), (3, 0), (2, 1)]:
        loaders = [EvalLoader(Sharding(), 3, reading(rank, world_size, num_workers)) for rank in range(world_size)]
        for _ in range(2):
            rows = torch.cat([batch for loader in loaders for _, batch in loader])
            assert sorted(rows[:, 0].tolist()) == list(range(20))
        for loader in loaders:
            loader.close()


def test_the_plan_of_a_stream_has_its_length_or_the_steps_that_were_asked_for() -> None:
    assert build_plan(Known(), seed=3, config=config()) == Plan(3, 20, 8, shuffle=False)
    assert build_plan(Stream(), seed=3, config=config(steps_per_epoch=100)) == Plan(3, 800, 8, shuffle=False)
    assert build_plan(range(20), seed=3, config=config()) == Plan(3, 20, 8)
    whole = config(global_batch_size="all")
    assert build_plan(range(20), seed=3, config=whole).global_batch_size == 20
    with pytest.raises(DataError, match=r"without a length.*data.steps_per_epoch"):
        build_plan(Stream(), seed=3, config=config())
    with pytest.raises(DataError, match=r"all needs a map-style dataset"):
        build_plan(Known(), seed=3, config=whole)


def test_what_a_stream_cannot_do_is_said() -> None:
    assert is_stream(Stream())
    assert not is_stream(range(3))
    assert "resuming goes on by reading forward" in loader_of(Known(), Plan(3, 20, 8, shuffle=False)).notes[0]
    assert "depend on their number" in loader_of(Sharding(), Plan(3, 20, 8, shuffle=False), num_workers=2).notes[0]
    with pytest.raises(DataError, match=r"shuffling needs a map-style dataset; test_stream.Known is an Iterable"):
        loader_of(Known(), Plan(3, 20, 8))
    with pytest.raises(DataError, match=r"Mixup and CutMix need"):
        loader_of(Known(), Plan(3, 20, 8, shuffle=False), neighbours=1)


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [
        (Torn, SampleError, r"reading sample 5 of pass 0 over test_stream.Torn failed: OSError: the shard ends here"),
        (Empty, DataError, r"pass 0 over the stream gave no sample"),
    ],
)
def test_a_stream_that_breaks_names_the_place(dataset: Any, kind: type[Exception], message: str) -> None:
    loader = loader_of(dataset(), Plan(3, 20, 8, shuffle=False))
    work = next(loader.steps())
    with pytest.raises(kind, match=message):
        list(work.micro_batches)
