"""The order of samples, as pure functions: (seed, epoch, dataset length) -> which samples make each optimizer step.

World size, workers and micro-batches only cut what the plan says; they never change it. All arithmetic is on integers
and numpy arrays, so that its tests are exact and take milliseconds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dist_train.data.errors import DataError
from dist_train.runtime.seeding import ORDER

Indices = NDArray[np.int64]

_FINGERPRINT_ENTRIES = 4096


@lru_cache(maxsize=2)  # two: prefetching may already be in the next epoch
def _order(seed: int, epoch: int, length: int, shuffle: bool) -> Indices:
    """The samples of one epoch, read-only. numpy's RandomState is frozen for ever (NEP 19), unlike torch.randperm."""
    order = np.arange(length, dtype=np.int64)
    if shuffle:
        low = 0xFFFFFFFF
        key = [ORDER, seed & low, (seed >> 32) & low, epoch & low, (epoch >> 32) & low]
        np.random.RandomState(key).shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Plan:
    """Which samples each optimizer step takes; steps and epochs count from 0.

    Args:
        seed: the run's seed.
        length: samples in the dataset.
        global_batch_size: samples of one optimizer step over all ranks.
        shuffle: a new permutation each epoch, else dataset order.
        drop_last: leave out the samples of an epoch that don't fill a global batch; else its last step is smaller.

    Raises:
        DataError: no sample at all, or fewer than one global batch while `drop_last` is set.
    """

    seed: int
    length: int
    global_batch_size: int
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DataError("data.train has no samples: expected at least 1, found 0")
        if self.global_batch_size < 1:
            raise DataError(f"data.global_batch_size must be at least 1, found {self.global_batch_size}")
        if self.drop_last and self.length < self.global_batch_size:
            raise DataError(
                f"data.train has {self.length} samples, fewer than one global batch of {self.global_batch_size}, and "
                f"data.drop_last leaves out incomplete batches, so there is nothing to train on; set "
                f"data.global_batch_size={self.length} (or less), or data.drop_last=false"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        if self.drop_last:
            return self.length // self.global_batch_size
        return -(-self.length // self.global_batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that one epoch trains on."""
        return self.steps_per_epoch * self.global_batch_size if self.drop_last else self.length

    def epoch_of(self, step: int) -> int:
        """The epoch that global step `step` belongs to."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> Indices:
        """All samples in the order of `epoch`: (length,) int64, read-only. The last two epochs are kept."""
        return _order(self.seed, epoch, self.length, self.shuffle)

    def batch(self, step: int) -> Indices:
        """The samples of global step `step`: (n,) int64, n = global_batch_size except in a smaller last step."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = k * self.global_batch_size
        return self.order(epoch)[start : start + self.global_batch_size]

    def local(self, step: int, rank: int, world_size: int) -> Indices:
        """The samples of global step `step` that `rank` takes, without padding: (n,) int64."""
        indices = self.batch(step)
        return indices[share(len(indices), rank, world_size)]

    def batch_samples(self, step: int) -> int:
        """How many samples global step `step` takes, without making the order."""
        start = (step % self.steps_per_epoch) * self.global_batch_size
        return min(self.global_batch_size, self.length - start)

    def fingerprint(self) -> str:
        """16 hex digits that tell whether another machine makes the same order (of epoch 0's beginning)."""
        head = self.order(0)[:_FINGERPRINT_ENTRIES].astype("<i8").tobytes()
        return hashlib.sha256(head).hexdigest()[:16]


def share(n: int, rank: int, world_size: int) -> slice:
    """The part of n items that `rank` takes: contiguous, in rank order, sizes differing by at most one."""
    size, extra = divmod(n, world_size)
    start = rank * size + min(rank, extra)
    return slice(start, start + size + (rank < extra))


@lru_cache(maxsize=64)
def parts(n: int, rank: int, world_size: int, micro: int) -> tuple[slice, ...]:
    """The micro-batches of `rank` in a global batch of n samples, as slices of that batch; empty without samples.

    Its share is cut into as few as possible of near-equal size, none larger than `micro`.
    """
    mine = share(n, rank, world_size)
    size = mine.stop - mine.start
    count = -(-size // micro)
    cuts = (share(size, k, count) for k in range(count))
    return tuple(slice(mine.start + cut.start, mine.start + cut.stop) for cut in cuts)


def smallest_part(plan: Plan, world_size: int, micro: int) -> int:
    """The fewest samples that any forward of training gets (BatchNorm can't train on one), without zero-weight ones."""
    return min(
        part.stop - part.start
        for n in {plan.batch_samples(0), plan.batch_samples(plan.steps_per_epoch - 1)}
        for rank in range(world_size)
        for part in parts(n, rank, world_size, micro)
    )


@dataclass(frozen=True)
class EvalPlan:
    """Evaluation in fixed cuts of the dataset, so that the bits of its result don't depend on the world size."""

    length: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def cuts(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """The cuts that `rank` evaluates: every world_size-th, whole."""
        starts = range(rank * self.batch_size, self.length, world_size * self.batch_size)
        return [range(start, min(self.length, start + self.batch_size)) for start in starts]
