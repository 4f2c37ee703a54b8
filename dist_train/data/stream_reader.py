"""Reads the micro-batches of a plan from an IterableDataset, forward to what is requested: all of it, or a shard per reader."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from dist_train.data.errors import DataError, dataset_name
from dist_train.data.plan import MicroBatch, Plan, micro_slices
from dist_train.data.reading import Collate, SampleReader, make_batch
from dist_train.data.stream import WHOLE, Pass, shard_of
from dist_train.data.workers import hide_rank, worker_visible


@dataclass(frozen=True)
class StreamInfo:
    """What is known about a stream before it is read."""

    length: int
    """Samples of an epoch, the unit of a micro-batch's indices."""
    finite: bool = True
    """A pass over the stream must have exactly `length` samples; otherwise it may end anywhere, and another one starts."""
    resumable: bool = False
    """The dataset's own `state_dict` restores the position."""
    repeatable: bool = True
    """It returns the same samples when it is read again."""


def _collated(collate: Collate, samples: list[Any]) -> Any:
    with (
        worker_visible()
    ):  # torch's default_collate puts a batch into shared memory where it sees that it runs in a worker
        return collate(samples)


class StreamReader(SampleReader):
    """Fills in a `MicroBatch` from a stream, whose samples are numbered as they come; reads the whole stream.

    Code in a loader worker can't see the worker's number or its rank (`hide_rank`), so that a stream that would split itself by
    them doesn't. Each reader keeps what its micro-batches name: exact for any number of ranks and workers.

    Attributes:
        saved: by reader, `MicroBatch.state` after the last sample of a committed step.
    """

    def __init__(self, dataset: Any, seed: int, collate: Collate | None, info: StreamInfo) -> None:
        super().__init__(dataset, seed, partial(_collated, collate or make_batch))
        self.source, self.info = dataset, info
        self.saved: dict[int, dict[str, Any]] = {}
        self._shard = WHOLE
        self._pass: Pass | None = None
        self._next = 0  # the number of the next sample; counted over all passes, in a shard of its own

    def note(self) -> str:
        """How the stream is read, for the log."""
        how = "from the dataset's state_dict" if self.info.resumable else "by reading forward to its position"
        if not (self.info.resumable or self.info.repeatable):
            how += (
                "; but each reading of this one returns different samples, so that a resumed run is refused or trains on some "
                "twice (draw from torch, numpy or random, which are seeded)"
            )
        return (
            f"an IterableDataset is not shuffled here; every rank and worker reads the whole stream and keeps its part "
            f"(a method shard(index, count) gives each its own); a run resumes {how}"
        )

    def rewind(self) -> None:
        """Start from the last committed sample when the next request comes."""
        self._pass, self._next = None, 0

    def commit(self, micro: MicroBatch) -> None:
        """In the main process: a micro-batch was taken."""
        if micro.state is not None and not micro.zero_weight:
            self.saved[micro.state["reader"]] = micro.state

    def __getitems__(self, request: MicroBatch) -> MicroBatch:
        """Called once per micro-batch by torch's DataLoader, with what the batch sampler yielded."""
        if self._pass is None:
            if get_worker_info() is not None:
                hide_rank()
            self._start(request)
        batch = super().__getitems__(request)
        state = self._state()
        self._at_end()  # raises now rather than in the next epoch
        return batch._replace(state=state)

    def samples(self, request: MicroBatch) -> list[Any]:
        """The samples of a request; consecutive ones are read in one go."""
        samples = []
        for index in request.indices.tolist():
            number = max(0, request.epoch) * self.info.length + index
            if number < self._next:  # another evaluation
                self._next = 0
                self._open(0)
            while self._next < number:
                self._take()
            samples.append(self._take())
        return samples

    def _start(self, request: MicroBatch) -> None:
        self.dataset = shard_of(self.source, *WHOLE)
        saved = self.saved.get(0)
        if saved is not None and saved["next"] <= max(0, request.epoch) * self.info.length + int(request.indices[0]):
            self._restore(saved)
        else:
            self._open(0)

    def _restore(self, saved: dict[str, Any]) -> None:
        self._next = saved["next"]
        if self.info.resumable and saved["state"] is not None:
            self._open(saved["pass"], place=saved["place"], state=saved["state"])
        else:
            self._open(saved["pass"]).skip(saved["place"])

    def _state(self) -> dict[str, Any] | None:
        if not self.info.resumable and self._shard == WHOLE:
            return None
        now = self._opened()
        state = self.dataset.state_dict() if self.info.resumable else None
        return {"reader": self._shard[0], "next": self._next, "pass": now.number, "place": now.place, "state": state}

    def _open(self, number: int, **given: Any) -> Pass:
        self._pass = Pass(self.dataset, self.seed, number, self._shard, **given)
        return self._pass

    def _opened(self) -> Pass:
        assert self._pass is not None
        return self._pass

    def _at_end(self) -> bool:
        """Whether the pass has given all its samples. Raises DataError where more come."""
        now = self._opened()
        if not self.info.finite or now.place < self.info.length:
            return False
        if next(now, self) is not self:
            raise DataError(self._wrong_length(f"more than {self.info.length}"))
        return True

    def _take(self) -> Any:
        """The next sample, of the next pass where this one has ended."""
        while True:
            now = self._opened()
            if self._at_end():
                now = self._open(now.number + 1)
            sample = next(now, self)
            if sample is not self:
                self._next += 1
                return sample
            if now.place == 0:
                raise DataError(f"{dataset_name(self.dataset)}: pass {now.number} over the stream gave no sample")
            if self.info.finite and now.place < self.info.length:
                raise DataError(self._wrong_length(str(now.place)))
            self._open(now.number + 1)

    def _wrong_length(self, found: str) -> str:
        return (
            f"{dataset_name(self.dataset)}: its __len__ says {self.info.length} samples, but a pass over the stream gave "
            f"{found}; correct __len__, or leave it out (training then needs data.steps_per_epoch)"
        )


@dataclass(frozen=True)
class ShardPlan:
    """Which reader takes which micro-batch of a stream with a shard per reader: worker k % workers the k-th of its rank.

    k counts from the start of an epoch, which is one pass, or else (`finite` is false) from step 0. Reader rank * workers +
    worker takes what it is asked for from its shard; once that has ended, the surplus of other shards in the same pass. So each
    sample of a pass is taken once, however uneven the shards are.
    """

    plan: Plan
    world_size: int
    workers: int
    """Loader workers of each rank, at least 1."""
    micro_batch_size: int
    finite: bool

    @property
    def readers(self) -> int:
        """How many there are, over all ranks."""
        return self.world_size * self.workers

    def key(self) -> list[int]:
        """The settings that must match to resume in the middle of a pass."""
        return [self.world_size, self.workers, self.micro_batch_size if self.workers > 1 else 0]

    def reader_of(self, rank: int, request: MicroBatch) -> int:
        """The reader of a rank's micro-batch."""
        slices = micro_slices(self.plan.batch_samples(request.step), rank, self.world_size, self.micro_batch_size)
        number = [one.start for one in slices].index(request.position) if slices else 0
        before = self.steps_before(request.step) * len(self._sizes(rank, self.plan.global_batch_size))
        return rank * self.workers + (before + number) % self.workers

    def shard(self, source: Any, index: int) -> Any:
        """A reader's shard, of a copy: a `shard` that changes its dataset leaves the source as it is."""
        return shard_of(copy.copy(source), index, self.readers)

    def surplus(self, source: Any, reader: int, seed: int, epoch: int) -> Iterator[Any]:
        """The samples for a reader whose own shard has ended: surplus of the other shards, found by reading them."""

        def read(index: int) -> Pass:
            return Pass(self.shard(source, index), seed, epoch, (index, self.readers))

        asked = [self.requested(index, self.plan.steps_per_epoch) for index in range(self.readers)]
        sizes = [sum(1 for _ in read(index)) for index in range(self.readers)]
        before = sum(max(0, count - size) for count, size in zip(asked[:reader], sizes))
        longer = (index for index in range(self.readers) if sizes[index] > asked[index])
        rest = (itertools.islice(read(index), asked[index], None) for index in longer)
        return itertools.islice(itertools.chain.from_iterable(rest), before, None)

    def steps_before(self, step: int) -> int:
        """The steps before that one: of its epoch, or since step 0."""
        return step % self.plan.steps_per_epoch if self.finite else step

    def _sizes(self, rank: int, samples: int) -> list[int]:
        """Samples of each micro-batch of a rank in a step of `samples`."""
        slices = micro_slices(samples, rank, self.world_size, self.micro_batch_size)
        return [one.stop - one.start for one in slices] or [0]

    def requested(self, reader: int, steps: int) -> int:
        """Samples that a reader is asked for in the first `steps` steps."""
        rank, worker = divmod(reader, self.workers)
        full = min(steps, self.plan.length // self.plan.global_batch_size) if self.finite else steps
        sizes = self._sizes(rank, self.plan.global_batch_size)
        # Which worker takes which micro-batch repeats after `workers` steps.
        period = np.tile(sizes, self.workers)
        period[np.arange(len(period)) % self.workers != worker] = 0
        periods, rest = divmod(full, self.workers)
        total = periods * int(period.sum()) + int(period[: rest * len(sizes)].sum())
        if steps > full:  # the smaller step at the end of an epoch
            last = self._sizes(rank, self.plan.length % self.plan.global_batch_size)
            total += sum(size for k, size in enumerate(last, full * len(sizes)) if k % self.workers == worker)
        return total


class ShardReader(StreamReader):
    """Fills in a `MicroBatch` from a stream of which each reader has a shard, `shard(index, count)` of the dataset."""

    def __init__(
        self, dataset: Any, seed: int, collate: Collate | None, info: StreamInfo, shards: ShardPlan, rank: int
    ) -> None:
        super().__init__(dataset, seed, collate, info)
        self.shards, self.rank = shards, rank
        self._samples: Iterator[Any] = iter(())  # of the shard, then the surplus of other shards
        self.rewind()

    def note(self) -> str:
        uneven = "" if self.info.finite else "; a shard that ends starts over, so shards should have equal sizes"
        each = f"each of {self.shards.readers} readers has a shard of the stream"
        return f"{each}, so the samples of a step depend on their number{uneven}"

    def rewind(self) -> None:
        super().rewind()
        self._shard = (-1, self.shards.readers)  # none yet

    def samples(self, request: MicroBatch) -> list[Any]:
        if request.zero_weight:  # it only fills the forward: a sample of the shard must not be lost to it
            spare = Pass(shard_of(copy.copy(self.source), *WHOLE), self.seed, 0)
            return list(itertools.islice(itertools.cycle(itertools.islice(spare, 2)), len(request.indices)))
        if self.info.finite and self._opened().number != request.epoch:
            self._next = 0
            self._select(request)
            self._open(request.epoch)
        return [self._take() for _ in request.indices]

    def _select(self, request: MicroBatch) -> None:
        """Take the shard of a request; which worker gets an epoch's first one depends on the epoch before."""
        reader = self.shards.reader_of(self.rank, request)
        if reader != self._shard[0]:
            self._shard = (reader, self.shards.readers)
            self.dataset = self.shards.shard(self.source, reader)

    def _start(self, request: MicroBatch) -> None:
        self._select(request)
        reader = self._shard[0]
        saved, asked = self.saved.get(reader), self.shards.requested(reader, self.shards.steps_before(request.step))
        if saved is not None and saved["next"] == asked and (not self.info.finite or saved["pass"] == request.epoch):
            self._restore(saved)
            return
        self._open(request.epoch if self.info.finite else 0)
        for _ in range(asked):
            self._take()

    def _open(self, number: int, **given: Any) -> Pass:
        opened = super()._open(number, **given)
        self._samples = itertools.chain(opened, self._surplus(opened))
        return opened

    def _surplus(self, ended: Pass) -> Iterator[Any]:
        taken = self._next - ended.place  # by a start before this one
        surplus = self.shards.surplus(self.source, self._shard[0], self.seed, ended.number)
        yield from itertools.islice(surplus, taken, None)

    def _at_end(self) -> bool:
        return False  # shards may be uneven

    def _take(self) -> Any:
        if not self.info.finite:
            return super()._take()
        sample = next(self._samples, self)
        if sample is self:
            raise DataError(self._wrong_length("fewer"))
        self._next += 1
        return sample


def describe_readers(key: list[int] | None) -> str:
    """How many readers began a pass over a sharded stream, by `ShardPlan.key`; None: one reader of all of it."""
    if key is None:
        return "one reader of the entire stream"
    return f"{key[0]} ranks x {key[1]} readers" + (f" with micro-batches of {key[2]}" if key[2] else "")
