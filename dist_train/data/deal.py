"""A stream of which each reader gets a part: who is asked for how much, so that no sample is lost where parts are uneven."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_train.data.passes import Pass, part_of
from dist_train.data.plan import Indices, Plan, parts


@dataclass(frozen=True)
class Deal:
    """Which reader takes each micro-batch: worker k % workers of its rank the k-th of an epoch, whenever it began to read.

    A reader takes what it is asked for from its own part; once that has ended, what other readers have too much in the
    same pass. So each sample of a pass is taken once, however uneven the parts are.
    """

    plan: Plan
    world_size: int
    workers: int
    """Loader workers of each rank, at least 1."""
    micro_batch_size: int

    @property
    def readers(self) -> int:
        """Reader rank * workers + worker; how many there are."""
        return self.world_size * self.workers

    def key(self) -> list[int]:
        """What must be the same for a pass to be continued."""
        return [self.world_size, self.workers, self.micro_batch_size if self.workers > 1 else 0]

    def rest(self, rank: int, step: int) -> int:
        """Empty requests to give before `step`: the first one of a start, and of an epoch, then meets the right worker."""
        k = step % self.plan.steps_per_epoch
        if k:
            return k * self._micros(rank, self.plan.batch_samples(step - 1)) % self.workers
        return 0

    def fill(self, rank: int) -> int:
        """Empty requests to give behind the last step of an epoch, so that the next one's first meets worker 0."""
        last = self.plan.steps_per_epoch - 1
        given = self.rest(rank, last) + self._micros(rank, self.plan.batch_samples(last))
        return -given % self.workers

    def asked(self, reader: int, step: int, finite: bool) -> int:
        """Samples that a reader has been asked for before `step`: in that step's epoch, or since step 0."""
        epochs, k = divmod(step, self.plan.steps_per_epoch)
        before = 0 if finite or not epochs else epochs * int(self._taken(self.plan.steps_per_epoch)[reader])
        return before + int(self._taken(k)[reader])

    def part(self, whole: Any, index: int, count: int | None = None) -> Any:
        """A reader's part, of a copy: a `shard` that changes its dataset leaves the whole as it is."""
        return part_of(copy.copy(whole), index, count or self.readers)

    def left_over(self, whole: Any, reader: int, seed: int, epoch: int, taken: int) -> Iterator[Any]:
        """What a reader takes once its own part has ended, and `taken` of it: found by reading the other parts through."""

        def read(index: int) -> Pass:
            return Pass(self.part(whole, index), seed, epoch, (index, self.readers))

        asked = self._taken(self.plan.steps_per_epoch)
        sizes = [sum(1 for _ in read(index)) for index in range(self.readers)]
        before = sum(max(0, int(a) - size) for a, size in zip(asked[:reader], sizes))
        surplus = (index for index in range(self.readers) if sizes[index] > asked[index])
        spare = (itertools.islice(read(index), int(asked[index]), None) for index in surplus)
        return itertools.islice(itertools.chain.from_iterable(spare), before + taken, None)

    def _micros(self, rank: int, samples: int) -> int:
        return max(1, len(parts(samples, rank, self.world_size, self.micro_batch_size)))

    def _taken(self, steps: int) -> Indices:
        """(readers,) samples that each is asked for in the first so many steps of an epoch."""
        taken = np.zeros((self.world_size, self.workers), dtype=np.int64)
        full = min(steps, self.plan.length // self.plan.global_batch_size)
        for rank in range(self.world_size):
            turn = 0
            for count, n in (
                (full, self.plan.global_batch_size),
                (steps - full, self.plan.length % self.plan.global_batch_size),
            ):
                cuts = parts(n, rank, self.world_size, self.micro_batch_size) if count else ()
                sizes = [cut.stop - cut.start for cut in cuts] or [0]
                turns = (turn + np.arange(count * len(sizes))) % self.workers
                taken[rank] += np.bincount(turns, np.tile(sizes, count), self.workers).astype(np.int64)
                turn += full * len(sizes)
        return taken.reshape(-1)
