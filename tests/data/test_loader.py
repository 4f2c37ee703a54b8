from __future__ import annotations

import os
import random
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from dist_train.config.schema import DataConfig
from dist_train.data import DataError, Digits
from dist_train.data.errors import SampleError
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions, batch_reader, reading_function

CPU = torch.device("cpu")


def reading(seed: int = 5, rank: int = 0, world_size: int = 1, collate: Any = None, **changes: Any) -> LoaderOptions:
    """What a rank reads by; `changes` are keys of the config's `data` section."""
    return LoaderOptions(
        DataConfig(train=object(), **{"num_workers": 0, **changes}), seed, CPU, rank, world_size, 1, collate
    )


class Noisy(Dataset[Any]):
    """Items that draw from all three generators, as transforms do."""

    def __init__(self, length: int = 40) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random(), os.getpid()]), index


class Counting(Noisy):
    """Remembers what was read."""

    def __init__(self, length: int = 40) -> None:
        super().__init__(length)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        return super().__getitem__(index)


class Broken(Noisy):
    def __getitem__(self, index: int) -> Any:
        if index == 13:
            raise ValueError("the file of this sample is torn")
        return super().__getitem__(index)


class Uneven(Noisy):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3 if index == 7 else 2), index


class Slow(Noisy):
    def __getitem__(self, index: int) -> Any:
        time.sleep(30)
        return index


class SlowFirst(Noisy):
    def __getitem__(self, index: int) -> Any:
        time.sleep(1.0 if index == 0 else 0.0)
        return index


class Dying(Noisy):
    def __getitem__(self, index: int) -> Any:
        os._exit(1)


def loader_of(dataset: Any, plan: Plan | None = None, micro_batch_size: int = 8, **given: Any) -> TrainLoader:
    return TrainLoader(dataset, plan or Plan(5, len(dataset), 8), reading(**given), micro_batch_size=micro_batch_size)


def read(loader: TrainLoader, stop: int) -> None:
    for work in loader.steps(0, stop):
        list(work.micro_batches)


def drawn(loader: TrainLoader, start: int, stop: int) -> dict[tuple[int, int], tuple[float, ...]]:
    """What was drawn for each (epoch, sample)."""
    found = {}
    for work in loader.steps(start, stop):
        for micro in work.micro_batches:
            values, indices = micro.batch
            assert indices.tolist() == micro.indices.tolist()
            for index, row in zip(indices.tolist(), values.tolist()):
                found[work.epoch, index] = tuple(row[:3])
    loader.close()
    return found


def test_the_steps_of_one_process_are_the_plans_batches_over_the_ends_of_epochs() -> None:
    data = Digits("val")
    plan = Plan(0, len(data), 50)
    for work in loader_of(data, plan=plan, micro_batch_size=64).steps(2, 8):
        (micro,) = work.micro_batches
        indices = plan.batch(work.step)
        assert (micro.indices == indices).all()
        assert (work.epoch, work.samples) == (work.step // 3, 50)
        assert (micro.position, micro.samples, micro.zero_weight, micro.last) == (0, 50, False, True)
        inputs, targets = micro.batch
        assert inputs.dtype == torch.float32
        assert inputs.equal(torch.stack([data[i][0] for i in indices]))
        assert targets.equal(torch.tensor([data[i][1] for i in indices]))


def test_batches_out_of_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.data.loader.DataLoader", partial(DataLoader, in_order=False))
    plan = Plan(5, 40, 8, shuffle=False)
    for micro_batch_size, found in ((8, "position 0 of step 1"), (4, "position 4 of step 0")):
        loader = loader_of(SlowFirst(), plan, micro_batch_size, num_workers=2)
        with pytest.raises(
            DataError, match=f"out of order: expected position 0 of step 0, found {found}.*in_order=True"
        ):
            read(loader, 2)
        loader.close()
    evaluation = EvalLoader(SlowFirst(), 8, reading(num_workers=2))
    with pytest.raises(DataError, match=r"expected position 0 of step 0, found position 8 of step 1"):
        list(evaluation)
    evaluation.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_and_micro_batches_cut_the_batch_and_every_rank_has_something_to_run(world_size: int) -> None:
    plan = Plan(0, 53, 10, drop_last=False)
    loaders = [
        loader_of(Noisy(53), plan=plan, rank=r, world_size=world_size, micro_batch_size=2) for r in range(world_size)
    ]
    for works in zip(*(loader.steps(4, 8) for loader in loaders)):
        counted = []
        for rank, work in enumerate(works):
            micro_batches = list(work.micro_batches)
            assert micro_batches
            mine = [i for m in micro_batches if not m.zero_weight for i in m.indices.tolist()]
            assert mine == plan.local(work.step, rank, world_size).tolist()
            assert sum(m.samples for m in micro_batches) == len(mine)
            assert [m.last for m in micro_batches] == [False] * (len(micro_batches) - 1) + [True]
            counted += mine
        assert counted == plan.batch(works[0].step).tolist()


@pytest.mark.parametrize(
    "other",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": False},
        {"num_workers": 1, "worker_start_method": "spawn"},
        {"micro_batch_size": 3},
        {"rank": 1, "world_size": 2, "num_workers": 1},
    ],
    ids=str,
)
def test_what_a_sample_draws_depends_on_seed_epoch_and_index_alone(other: dict[str, Any]) -> None:
    reference = drawn(loader_of(Noisy()), 0, 10)
    assert len(reference) == 80
    again = drawn(loader_of(Noisy(), **other), 3, 10)
    assert again
    assert all(reference[key] == value for key, value in again.items())


def test_what_a_sample_draws_differs_between_epochs_and_seeds() -> None:
    reference = drawn(loader_of(Noisy()), 0, 10)
    assert all(reference[0, i] != reference[1, i] for i in range(40))
    other = drawn(loader_of(Noisy(), seed=6), 0, 10)
    assert all(reference[key] != value for key, value in other.items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_reads_nothing_but_what_it_trains_on(num_workers: int) -> None:
    data = Counting()
    loader = loader_of(data, plan=Plan(5, 40, 8), num_workers=num_workers)
    trained = [i for work in loader.steps(3, 7) for m in work.micro_batches for i in m.indices.tolist()]
    if num_workers == 0:
        assert data.read == trained
    assert trained == np.concatenate([loader.plan.batch(s) for s in range(3, 7)]).tolist()


def test_a_step_left_early_does_not_shift_the_next_one() -> None:
    loader = loader_of(Noisy(), micro_batch_size=2)
    for work in loader.steps(0, 4):
        micro = next(work.micro_batches)
        assert (micro.indices == loader.plan.batch(work.step)[:2]).all()


def test_workers_stay_over_epochs_unless_configured_otherwise_and_are_gone_after_closing() -> None:
    for persistent, expected in [("auto", 1), (False, 2)]:
        loader = loader_of(Noisy(), num_workers=1, persistent_workers=persistent)
        pids = {int(m.batch[0][0, 3]) for work in loader.steps(0, 10) for m in work.micro_batches}
        assert len(pids) == expected
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_loading_leaves_the_global_generators_alone_when_nothing_is_read_sample_by_sample() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for work in loader_of(Digits("val"), plan=Plan(0, 180, 20)).steps(0, 12):
        list(work.micro_batches)
    list(EvalLoader(Digits("val"), 64, reading()))
    assert torch.get_rng_state().equal(before)


def test_waiting_for_data_is_counted() -> None:
    loader = loader_of(Noisy())
    for work in loader.steps(0, 2):
        list(work.micro_batches)
    assert 0 < loader.waited < 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_dataset_names_the_sample_and_keeps_the_users_traceback(num_workers: int) -> None:
    loader = loader_of(Broken(), num_workers=num_workers)
    with pytest.raises(SampleError, match=r"reading sample 13 of test_loader.Broken in epoch 0 failed") as caught:
        read(loader, 5)
    loader.close()
    shown = str(caught.getrepr(chain=True))
    assert "ValueError: the file of this sample is torn" in shown
    assert 'raise ValueError("the file of this sample is torn")' in shown


def test_samples_that_do_not_fit_into_a_batch_are_named() -> None:
    with pytest.raises(SampleError, match=r"samples 0 and 7 alone: .*\[2\] .*\[3\].*data.collate"):
        read(loader_of(Uneven(), plan=Plan(0, 40, 8, shuffle=False)), 1)


def test_a_hanging_dataset_is_an_error_after_the_timeout() -> None:
    loader = loader_of(Slow(), num_workers=1, timeout=1.0)
    with pytest.raises(DataError, match=r"no batch arrived within data.timeout=1 s"):
        read(loader, 1)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 10


def test_a_worker_that_dies_is_reported_with_what_to_try() -> None:
    loader = loader_of(Dying(), num_workers=1)
    with pytest.raises(DataError, match=r"(?s)worker.*died without a Python error.*data.num_workers=0"):
        read(loader, 1)
    loader.close()


def test_a_dataset_of_another_length_than_the_plans_is_refused() -> None:
    with pytest.raises(DataError, match=r"the plan is for 41 samples, but data.train has 40"):
        loader_of(Noisy(), plan=Plan(0, 41, 8))


def _doubled(samples: list[Any]) -> Any:
    return [2 * index for _, index in samples]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_collate_of_the_users_own_gets_the_list_of_samples(num_workers: int) -> None:
    loader = loader_of(Digits("val"), plan=Plan(0, 180, 4), collate=_doubled, num_workers=num_workers)
    for work in loader.steps(0, 2):
        (micro,) = work.micro_batches
        assert micro.batch == [2 * Digits("val")[i][1] for i in loader.plan.batch(work.step)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_tensor_datasets_and_their_subsets_are_read_at_once_and_equal_their_items(num_workers: int) -> None:
    whole = TensorDataset(torch.arange(60.0).view(30, 2), torch.arange(30))
    part = Subset(Subset(whole, range(5, 25)), [3, 1, 4, 1, 5, 9, 2, 6])
    for data in (whole, part, Subset(Digits("val"), range(8))):
        assert batch_reader(data) is not None
        loader = loader_of(data, plan=Plan(0, len(data), 4), num_workers=num_workers)
        for work in loader.steps(0, 2):
            (micro,) = work.micro_batches
            expected = default_collate([data[i] for i in loader.plan.batch(work.step)])
            assert all(a.equal(b) for a, b in zip(micro.batch, expected, strict=True))
    assert batch_reader(Subset(Noisy(), [1])) is None
    assert batch_reader(type("Mine", (TensorDataset,), {})(torch.zeros(3))) is None


def test_a_subset_of_a_random_dataset_is_still_seeded_sample_by_sample() -> None:
    whole = drawn(loader_of(Noisy(), plan=Plan(0, 40, 8)), 0, 5)
    subset = Subset(Noisy(), list(range(40)))
    assert drawn(loader_of(subset, plan=Plan(0, 40, 8)), 0, 5) == whole


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 1), (2, 0), (3, 1), (9, 0)])
def test_evaluation_reads_every_sample_once_and_draws_the_same_each_time(world_size: int, num_workers: int) -> None:
    passes: list[dict[int, list[float]]] = []
    for _ in range(2):
        found: dict[int, list[float]] = {}
        for rank in range(world_size):
            loader = EvalLoader(Noisy(), 6, reading(rank=rank, world_size=world_size, num_workers=num_workers))
            assert len(loader) <= loader.rounds == -(-7 // world_size)
            for samples, (values, indices) in loader:
                assert indices.tolist() == list(samples)
                assert not set(samples) & set(found)
                found |= {index: row[:3] for index, row in zip(indices.tolist(), values.tolist())}
            loader.close()
        assert sorted(found) == list(range(40))
        passes.append(found)
    assert passes[0] == passes[1]


def test_evaluation_workers_are_kept_between_passes_even_after_one_left_early() -> None:
    loader = EvalLoader(Noisy(), 6, reading(num_workers=1))
    next(iter(loader))
    pids = [{int(batch[0][0, 3]) for _, batch in loader} for _ in range(2)]
    assert pids[0] == pids[1]
    loader.close()
    assert not os.path.exists(f"/proc/{pids[0].pop()}")
    assert [samples.start for samples, _ in loader] == [0, 6, 12, 18, 24, 30, 36]
    loader.close()


class Kind:
    """48 samples of which sample 5 is of another kind."""

    def __init__(self, odd: Any) -> None:
        self.odd = odd

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        if index == 5 and isinstance(self.odd, Exception):
            raise self.odd
        return self.odd if index == 5 else torch.zeros(2)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (None, r"sample 5 is None: leave missing samples out of the dataset"),
        (object(), r"samples 0 and 5 alone: .*samples must be alike .* or name a function in data.collate"),
        (torch.zeros(3), r"samples 0 and 5 alone: .*equal size"),
        (StopIteration("done"), r"reading sample 5 of test_loader.Kind in epoch 0 failed: StopIteration: done"),
        (IndexError("past the end"), r"reading sample 5 of test_loader.Kind in epoch 0 failed: IndexError"),
    ],
)
def test_a_sample_of_another_kind_is_named_with_what_to_do(odd: Any, message: str) -> None:
    given = LoaderOptions(DataConfig(train=object(), num_workers=0), 0, torch.device("cpu"))
    loader = TrainLoader(Kind(odd), Plan(0, 48, 16, shuffle=False), given, micro_batch_size=16)
    with pytest.raises(SampleError, match=message):
        list(next(loader.steps(0, 3)).micro_batches)


@pytest.mark.parametrize("rows", [7, 9])
def test_a_batch_with_a_row_too_few_or_too_many_is_refused(rows: int) -> None:
    class Short(Noisy):
        def read_batch(self, indices: np.ndarray) -> Any:
            return torch.zeros(rows, 2), torch.zeros(rows)

    loader = TrainLoader(Short(), Plan(0, 40, 8), reading(), micro_batch_size=8)
    with pytest.raises(SampleError, match=rf"asked for 8 samples and returned {rows} rows"):
        list(next(loader.steps(0)).micro_batches)


def test_what_reads_whole_batches_is_known_below_subsets() -> None:
    class Own(Noisy):
        def read_batch(self, indices: np.ndarray) -> Any:
            return torch.rand(len(indices))

    assert reading_function(Subset(Subset(Own(), [0, 1]), [0])) is Own.read_batch
    assert reading_function(Noisy()).__module__ == "dist_train.data.reading"
    assert reading_function(Subset(Digits(), [0])).__module__ == "dist_train.library.arrays"
    assert reading_function(TensorDataset(torch.ones(2))) is TensorDataset.__getitem__


@pytest.mark.parametrize(
    ("data", "batch", "drop_last", "reads"),
    [("digits", 16, True, 4), ("digits", 16, False, 44), ("rows of 12 bytes", 10, True, 40), ("images", 16, True, 40)],
)
def test_small_batches_are_read_several_at_once_and_are_those_that_are_read_alone(
    data: str, batch: int, drop_last: bool, reads: int
) -> None:
    tensors = {
        "digits": (torch.randn(180, 64), torch.arange(180)),
        "rows of 12 bytes": (torch.randn(180, 3), torch.arange(180)),  # ten of them don't end where memory is aligned
        "images": (torch.randn(180, 3, 32, 32), torch.arange(180)),
    }[data]
    plan, calls = Plan(0, 180, batch, drop_last=drop_last), []
    loader = loader_of(TensorDataset(*tensors), plan=plan, micro_batch_size=batch)
    alone = [micro for work in loader.steps(5, 45) for micro in work.micro_batches]
    read = loader.reader.read
    assert read is not None
    loader.reader.read = lambda indices: (calls.append(len(indices)), read(indices))[1]
    found = [micro for work in loader.steps(5, 45, ahead=True) for micro in work.micro_batches]
    for micro, expected in zip(found, alone, strict=True):
        assert (micro.step, micro.position, micro.samples, micro.last) == expected[1:2] + expected[3:6]
        assert all(a.equal(b) and a.is_contiguous() for a, b in zip(micro.batch, expected.batch, strict=True))
        assert not any(part.data_ptr() % 64 for part in micro.batch)
    assert sum(calls) >= sum(len(micro.indices) for micro in alone)
    assert (
        len(calls) <= reads if drop_last else len(calls) < reads
    )  # a smaller last batch is read alone, with its group
