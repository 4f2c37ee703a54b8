from __future__ import annotations

import itertools
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dist_train.building.prepare import build_plan
from dist_train.config.schema import DataConfig
from dist_train.data import DataError
from dist_train.data.errors import SampleError
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions
from dist_train.data.stream import is_stream

CPU = torch.device("cpu")


def config(**changes: Any) -> DataConfig:
    return DataConfig(train=object(), **{"global_batch_size": 8, "num_workers": 0, **changes})


def reading(rank: int = 0, world_size: int = 1, num_workers: int = 0) -> LoaderOptions:
    return LoaderOptions(config(num_workers=num_workers), 3, CPU, rank, world_size)


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
        yield from range(15)
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
            steps[work.step - start] += [m.batch for m in work.micro_batches if not m.zero_weight]
        loader.close()
    return [torch.cat(parts) for parts in steps]


@pytest.mark.parametrize(
    ("shuffle", "world_size", "num_workers"), [(False, 1, 0), (True, 3, 0), (True, 1, 2), (False, 2, 1)]
)
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


class Splitting(Known):
    """Splits itself in every usual way at once: torch's documentation, webdataset, and by the process group."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        part, count = (info.id, info.num_workers) if info is not None else (0, 1)
        ranks = int(os.environ.get("WORLD_SIZE", 1)) * (2 if torch.distributed.is_initialized() else 1)
        part, count = part * ranks + int(os.environ.get("RANK", 0)), count * ranks
        yield from itertools.islice(super().__iter__(), part, None, count)


def test_in_a_worker_no_stream_can_see_who_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = batches(Known, Plan(3, 20, 4, shuffle=False), 0, 5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert len(list(Splitting())) == 5  # it does split itself here
        for seen in (
            batches(Splitting, Plan(3, 20, 4, shuffle=False), 0, 5, num_workers=2, micro_batch_size=2),
            [batch for _, batch in EvalLoader(Splitting(), 4, reading(num_workers=2))],
        ):
            assert torch.cat(seen)[:, 0].tolist() == torch.cat(reference)[:, 0].tolist()
    finally:
        torch.distributed.destroy_process_group()


class Built(Known):
    """Is split where it is built, as with `split_dataset_by_node`, where no worker can hide the rank."""

    def __init__(self, rank: int, drawn: bool = False) -> None:
        super().__init__()
        self.rank, self.drawn = rank, drawn

    def __iter__(self) -> Iterator[Any]:
        noise = np.random.default_rng().random() if self.drawn else 0.0
        return (
            torch.tensor([number + noise]) for number in range(self.rank, 20, 2)
        )  # no draws: ranks are threads here


class Buffered(Known):
    """Has a state that leaves out what is in its shuffle buffer, or that is never forgotten; counts what it reads."""

    def __init__(self, buffer: int = 1, sticky: bool = False) -> None:
        super().__init__()
        self.buffer, self.sticky = buffer, sticky
        self.at, self.begin, self.reads = 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["at"]

    def __iter__(self) -> Iterator[Any]:
        begin = self.begin
        if not self.sticky:
            self.begin = 0
        held: list[int] = []
        for number in range(begin, 20):
            self.at, self.reads = number + 1, self.reads + 1
            held.append(number)
            if len(held) == self.buffer:
                yield torch.tensor([held.pop()])
        yield from (torch.tensor([number]) for number in held)


def on_two_ranks(make: Callable[[int, LoaderOptions], Any]) -> list[Any]:
    """What `make(rank, reading)` returns or raises in two threads that exchange values as ranks do."""
    meet, values, answers = threading.Barrier(2), [[], []], [None, None]

    def rank(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[number].append(value)
            meet.wait()
            return [given[len(values[number]) - 1] for given in values]

        try:
            answers[number] = make(number, replace(reading(number, 2), all_gather=gather))
        except DataError as error:
            answers[number] = error

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def test_a_stream_whose_readers_get_other_samples_is_refused_on_every_rank() -> None:
    plan = Plan(3, 20, 4, shuffle=False)
    for dataset in (Built, lambda rank: Built(0, drawn=True)):
        for make in (
            lambda rank, given, dataset=dataset: TrainLoader(dataset(rank), plan, given, micro_batch_size=2),
            lambda rank, given, dataset=dataset: EvalLoader(dataset(rank), 4, given),
        ):
            for error in on_two_ranks(make):
                assert re.search(
                    r"returns different samples on rank 1 than on rank 0.*shard\(index, count\)", str(error)
                )

    class Cut(Stream):  # as where one host's file isn't whole; shows behind the samples that are compared
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.length = 20 - rank

        def __iter__(self) -> Iterator[Any]:
            return (torch.tensor([number]) for number in range(self.length))

    for error in on_two_ranks(lambda rank, given: EvalLoader(Cut(rank), 4, given)):
        assert "returns different samples on rank 1" in str(error)
    both = on_two_ranks(lambda rank, given: TrainLoader(Built(0), plan, given, micro_batch_size=2))
    assert all(isinstance(loader, TrainLoader) for loader in both)


@pytest.mark.parametrize(("world_size", "num_workers", "micro"), [(2, 0, 8), (3, 0, 1), (1, 2, 1), (2, 2, 1)])
def test_shards_of_uneven_size_lose_no_sample_in_any_epoch_and_after_a_resume(
    world_size: int, num_workers: int, micro: int
) -> None:
    plan = Plan(3, 20, 5, shuffle=False)
    given = {"world_size": world_size, "num_workers": num_workers, "micro_batch_size": micro}
    whole = batches(Sharding, plan, 0, 8, **given)
    for epoch in (0, 1):
        rows = torch.cat(whole[4 * epoch : 4 * epoch + 4])
        assert sorted(rows[:, 0].tolist()) == list(range(20))
        assert set(rows[:, 1].tolist()) == {epoch}
    again = batches(Sharding, plan, 3, 8, **given)
    assert all(a.equal(b) for a, b in zip(again, whole[3:], strict=True))


class Other(Known):
    """`shard` as in Hugging Face's datasets: other names, in another order, and it returns another dataset."""

    def __init__(self, numbers: Sequence[int] = range(20), num_shards: int = 4) -> None:
        super().__init__()
        self.numbers, self.num_shards = numbers, num_shards

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> Other:
        assert contiguous
        return Other(self.numbers[index::num_shards], self.num_shards // num_shards)

    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor([number]) for number in self.numbers)


class Unclear(Known):
    def shard(self, a: int, b: int) -> None: ...


def test_shard_is_taken_by_the_names_of_its_parameters() -> None:
    plan = Plan(3, 20, 4, shuffle=False)
    for world_size, parted in ((2, True), (3, False)):  # four shards can't be dealt to three readers
        steps = batches(Other, plan, 0, 5, world_size=world_size)
        assert sorted(torch.cat(steps).flatten().tolist()) == list(range(20))
        assert (steps[0].flatten().tolist() == [0, 2, 1, 3]) is parted
    with pytest.raises(DataError, match=r"Unclear.shard\(a: .*Name them index and count, or index and num_shards"):
        loader_of(Unclear(), plan)


def test_the_state_of_a_stream_is_that_after_the_last_committed_step() -> None:
    plan = Plan(3, 20, 4, shuffle=False)
    for buffer, read in ((1, 4), (3, 20)):  # by the state alone, or forward from the beginning
        states = []
        for num_workers in (0, 2):
            loader = loader_of(Buffered(buffer), plan, num_workers=num_workers, micro_batch_size=2)
            for work in loader.steps(0, 9):
                list(work.micro_batches)
                if work.step == 3:
                    states.append(loader.state_dict(lambda value: [value]))
                    break
            loader.close()
        assert states[0] == states[1]
        whole = batches(lambda buffer=buffer: Buffered(buffer), plan, 4, 7)
        dataset = Buffered(buffer)
        loader = loader_of(dataset, plan, micro_batch_size=2)
        loader.load_state_dict(states[0], 4)
        dataset.reads = 0
        again = [torch.cat([micro.batch for micro in work.micro_batches]) for work in loader.steps(4, 5)]
        assert torch.equal(again[0], whole[0])
        assert dataset.reads == read
    assert "by reading forward" in loader_of(Buffered(sticky=True), plan).notes[0]


def test_a_pass_over_shards_resumes_with_as_many_readers_only() -> None:
    plan = Plan(3, 20, 4, shuffle=False)
    begun = loader_of(Sharding(), plan, num_workers=2, micro_batch_size=2).state_dict(lambda value: [value])
    other = loader_of(Sharding(), plan, num_workers=3, micro_batch_size=2)
    with pytest.raises(DataError, match=r"begun by 1 ranks x 2 readers.*now it would be 1 ranks x 3 readers"):
        other.load_state_dict(begun, 3)
    other.load_state_dict(begun, 5)  # where an epoch begins nothing is left of the one before


class Short(Stream):
    def __len__(self) -> int:
        return 21


class Long(Stream):
    def __len__(self) -> int:
        return 19


def test_evaluation_reads_each_sample_of_a_stream_once_each_time() -> None:
    for dataset, world_size, num_workers in [(Sharding, 1, 0), (Stream, 3, 0), (Stream, 2, 1)]:
        loaders = [EvalLoader(dataset(), 3, reading(rank, world_size, num_workers)) for rank in range(world_size)]
        for _ in range(2):
            rows = torch.cat([batch for loader in loaders for _, batch in loader])
            assert sorted(rows[:, 0].tolist()) == list(range(20))
        for loader in loaders:
            loader.close()
    for dataset, found in ((Short, "21 samples.*gave 20"), (Long, "19 samples.*gave more than 19")):
        with pytest.raises(DataError, match=rf"{dataset.__name__}: its __len__ says {found}"):
            list(EvalLoader(dataset(), 3, reading()))
    with pytest.raises(DataError, match=r"data.test: a pass over test_stream.Nothing gave no sample"):
        EvalLoader(Nothing(), 3, reading(), "test")


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


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


def test_what_a_stream_cannot_do_is_reported() -> None:
    assert is_stream(Stream())
    assert not is_stream(range(3))
    with pytest.raises(DataError, match=r"is an iterator, which can be read once only"):
        loader_of((row for row in Stream()), Plan(3, 20, 8, shuffle=False))
    assert "a run resumes by reading forward" in loader_of(Known(), Plan(3, 20, 8, shuffle=False)).notes[0]
    assert "depend on their number" in loader_of(Sharding(), Plan(3, 20, 8, shuffle=False), num_workers=2).notes[0]
    with pytest.raises(DataError, match=r"shuffling needs a map-style dataset; test_stream.Known is an Iterable"):
        loader_of(Known(), Plan(3, 20, 8))
    with pytest.raises(DataError, match=r"Mixup and CutMix need"):
        loader_of(Known(), Plan(3, 20, 8, shuffle=False), neighbours=1)


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [
        (Torn, SampleError, r"reading sample 15 of pass 0 over test_stream.Torn failed: OSError: the shard ends here"),
        (Empty, DataError, r"pass 0 over the stream gave no sample"),
    ],
)
def test_a_stream_that_breaks_names_the_place(dataset: Any, kind: type[Exception], message: str) -> None:
    loader = loader_of(dataset(), Plan(3, 20, 16, shuffle=False))
    work = next(loader.steps())
    with pytest.raises(kind, match=message):
        list(work.micro_batches)


class Counting(IterableDataset[Any]):
    """A dataset that keeps its place in itself, as torchdata's do: 20 samples a pass."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < 20:
            self.place += 1
            yield torch.tensor([float(self.place - 1)])
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_looking_at_a_stream_does_not_move_it() -> None:
    rows = batches(Counting, Plan(3, 20, 4, shuffle=False), 0, 10)
    assert torch.cat(rows)[:, 0].tolist() == [*range(20), *range(20)]


def test_training_reports_a_pass_that_is_longer_than_its_length() -> None:
    with pytest.raises(DataError, match=r"Long: its __len__ says 19 samples, .* gave more than 19"):
        batches(Long, Plan(3, 19, 19, shuffle=False), 0, 1)


class Mixed(Known):
    """Shuffles what it then takes a part of, when its first sample is asked for."""

    index, count = 0, 1

    def shard(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def __iter__(self) -> Iterator[Any]:
        order = list(range(20))
        random.shuffle(order)
        for number in order[self.index :: self.count]:
            yield torch.tensor([float(number)])


class OwnGenerator(Mixed):
    def __init__(self, start: int) -> None:
        super().__init__()
        self.random = random.Random(start)

    def __iter__(self) -> Iterator[Any]:
        return iter([torch.tensor([float(self.random.randrange(10**6))]) for _ in range(20)])


class Unseeded(OwnGenerator):
    shard = None  # type: ignore[assignment]


def test_shards_of_a_stream_that_a_generator_shuffles_are_of_one_order() -> None:
    rows = batches(Mixed, Plan(3, 20, 4, shuffle=False), 0, 10, world_size=2)
    for epoch in (rows[:5], rows[5:]):
        assert sorted(torch.cat(epoch)[:, 0].tolist()) == list(range(20))


def test_a_stream_of_another_order_at_each_reading_is_refused_where_its_place_would_be_lost() -> None:
    plan = Plan(3, 20, 4, shuffle=False)
    with pytest.raises(DataError, match=r"OwnGenerator returns different samples when it is read again"):
        loader_of(OwnGenerator(1), plan)
    warning = "each reading of this one returns different samples"
    assert warning in loader_of(Unseeded(1), plan).notes[0]
    assert warning not in loader_of(Known(), plan).notes[0]
    begun = loader_of(Unseeded(1), plan).state_dict(lambda value: [value])
    loader_of(Unseeded(1), plan).load_state_dict(begun, 3)
    with pytest.raises(DataError, match=r"Unseeded returns different samples than when this run began"):
        loader_of(Unseeded(2), plan).load_state_dict(begun, 3)
