"""`data.on_error: skip`: which sample stands in for one that can't be read, and what isn't skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.schema import DataConfig
from dist_train.data.errors import DataError, SampleError
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.plan import MicroBatch, Plan
from dist_train.data.reading import LoaderOptions
from dist_train.data.weights import Weights
from dist_train.runtime.seeding import seed_sample

COUNT, SEED = 23, 7
BROKEN = {0, 4, 5, 6, 15, 22}
WEIGHTS = Weights.of(np.arange(1.0, COUNT + 1), COUNT)


class Samples(Dataset[Any]):
    """(its number and a draw, its number) of each sample that can be read."""

    error: type[BaseException] = ValueError

    def __init__(self, broken: set[int] = BROKEN) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        drawn = int(torch.randint(0, 200, ()))
        if index in self.broken:
            raise self.error(f"file {index} is broken")
        return torch.tensor([index, drawn], dtype=torch.uint8), index


class InRows(Samples):
    item_shape = (2,)

    def read_into(self, index: int, row: Tensor) -> int:
        row.fill_(255)  # half a sample, before the error
        row.copy_(self[index][0])
        return index


class AtOnce(Samples):
    def __getitem__(self, index: int) -> Any:
        return self.read_batch(np.array([index]))[0][0], index

    def read_batch(self, indices: Any) -> Any:
        for index in indices.tolist():
            if index in self.broken:
                raise ValueError(f"file {index} is broken")
        return torch.from_numpy(np.stack([indices, indices], 1).astype(np.uint8)), torch.from_numpy(indices)


def loader(dataset: Any, plan: Plan, rank: int = 0, world: int = 1, **given: Any) -> TrainLoader:
    named = {"train": {"_target_": "none"}, "on_error": "skip", "num_workers": given.pop("workers", 0)}
    options = LoaderOptions(DataConfig(**named), SEED, torch.device("cpu"), rank, world)
    return TrainLoader(dataset, plan, options, **{"micro_batch_size": 3, **given})


def read(loader: TrainLoader, steps: int) -> dict[tuple[int, int], list[int]]:
    """What stands at each position of each step, of the samples that count."""
    found = {}
    for work in loader.steps(0, steps):
        for micro in work.micro_batches:
            inputs, targets = micro.batch
            assert inputs[:, 0].tolist() == targets.tolist()
            for k in range(micro.samples):
                found[work.step, micro.position + k] = inputs[k].tolist()
    loader.close()
    return found


def expected(plan: Plan, steps: int, draws: bool) -> dict[tuple[int, int], list[int]]:
    """By the definition: the next of the epoch's order that can be read, with the draws of the one that can't."""
    found = {}
    for step in range(steps):
        epoch, k = divmod(step, plan.steps_per_epoch)
        order = plan.order(epoch).tolist()
        for position in range(plan.batch_samples(step)):
            place = k * plan.global_batch_size + position
            index = next(one for one in (order * 2)[place:] if one not in BROKEN)
            seed_sample(SEED, epoch, order[place] if plan.weights is None else place)
            found[step, position] = [index, int(torch.randint(0, 200, ())) if draws else index]
    return found


@pytest.mark.parametrize("kind", [Samples, InRows, AtOnce])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_next_sample_that_can_be_read_stands_in_on_any_number_of_ranks(kind: Any, weights: Any) -> None:
    plan = Plan(3, COUNT, 9, drop_last=False, weights=weights)
    steps = 2 * plan.steps_per_epoch
    wanted = expected(plan, steps, draws=kind is not AtOnce)
    replaced = sum(np.isin(plan.batch(step), list(BROKEN)).sum() for step in range(steps))
    for world, neighbours, micro in [(1, 0, 9), (1, 1, 2), (2, 0, 3), (4, 1, 3), (11, 0, 3)]:
        found, skipped = {}, 0
        for rank in range(world):
            one = loader(kind(), plan, rank, world, neighbours=neighbours, micro_batch_size=micro)
            found |= read(one, steps)
            skipped += one.skipped.take()
            assert one.skipped.take() == 0
        assert found == wanted
        assert skipped == replaced, (world, neighbours)


def test_workers_replace_and_report_the_same(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan(3, COUNT, 6)
    one = loader(InRows(), plan, workers=2)
    assert read(one, 6) == expected(plan, 6, draws=True)
    replaced = [index for step in range(6) for index in plan.batch(step).tolist() if index in BROKEN]
    assert one.skipped.take() == len(replaced)
    named = [record.message for record in caplog.records]
    assert len(named) == min(10, len(replaced))
    for index, message in zip(replaced, named):
        assert f"data.on_error=skip: reading sample {index} of test_skipping.InRows in epoch" in message
        assert f"ValueError: file {index} is broken" in message


def test_a_global_batch_in_a_row_is_an_error() -> None:
    for broken in (set(range(COUNT)), set(range(2, 7))):
        plan = Plan(0, COUNT, 5, shuffle=False)
        with pytest.raises(SampleError, match=r"5 samples in a row, as many as a global batch.*file (0|2) is broken"):
            read(loader(Samples(broken), plan), 4)
    assert len(read(loader(Samples(set(range(2, 6))), plan), 4)) == 20


@pytest.mark.parametrize("error", [MemoryError, SystemExit, OSError])
def test_what_ails_the_process_and_not_the_sample_is_not_skipped(error: type[BaseException]) -> None:
    dataset = Samples()
    dataset.error = error if error is not OSError else lambda text: OSError(24, "Too many open files")  # type: ignore[assignment]
    with pytest.raises(SampleError, match="reading sample 0"):
        read(loader(dataset, Plan(0, COUNT, 5, shuffle=False)), 1)


def test_evaluation_never_skips() -> None:
    config = DataConfig(train={"_target_": "none"}, on_error="skip", num_workers=0)
    batches = EvalLoader(Samples({4}), 3, LoaderOptions(config, SEED, torch.device("cpu")))
    with pytest.raises(SampleError, match=r"reading sample 4 .*file 4 is broken"):
        list(batches)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


def test_a_stream_has_no_order_to_take_another_sample_from() -> None:
    with pytest.raises(DataError, match=r"data\.on_error: skip needs a map-style dataset"):
        loader(Stream(), Plan(0, COUNT, 5, shuffle=False))


def test_samples_that_follow_wrap_around_in_the_epoch_and_in_the_batch() -> None:
    plan = Plan(0, 7, 3, shuffle=False, drop_last=False)
    assert list(plan.following(0, 0)) == [1, 2]
    assert list(plan.following(2, 0)) == [0, 1]  # the last sample, of a batch of one
    assert list(plan.following(1, 5)) == list(plan.following(1, 2)) == [6, 0]  # a neighbor beyond the batch's end
    assert list(Plan(0, 2, 9, drop_last=False).following(0, 0)) != []
    assert MicroBatch(0, 0, np.array([0]), 0, 1, True).skipped == ()
