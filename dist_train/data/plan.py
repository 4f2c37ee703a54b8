"""Which samples make each optimizer step, which of them a rank reads, and the sampler for torch's DataLoader.

The order is a pure function of (seed, epoch, dataset length, weights): world size, workers and micro-batches only split it, and
never change it. All arithmetic is on integers and numpy arrays, so that its tests are exact and take milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from dist_train.data.errors import DataError
from dist_train.data.weights import Weights
from dist_train.runtime.seeding import DRAW, ORDER

Indices = NDArray[np.int64]


class MicroBatch(NamedTuple):
    """What one forward of one rank takes. Sent to a loader worker without its batch; it has all that the worker needs."""

    epoch: int
    step: int
    """Global optimizer step, from 0."""
    indices: Indices
    """Its samples in the dataset: (n + neighbours,) int64, a copy, so that nobody can change the plan's order."""
    position: int
    """Position of its first sample in the global batch."""
    samples: int
    """Samples that count: n, or 0 if the rank has none in this step and runs a forward only to join the collectives."""
    last: bool
    """The rank's last micro-batch of this step: gradients are reduced after it."""
    batch: Any = None
    """The collated batch, on the CPU (pinned if so configured)."""
    state: Any = None
    """The position of a stream's reader after it (see `StreamReader`)."""
    keys: Indices | None = None
    """What each sample's random numbers depend on besides seed and epoch: (n + neighbours,) int64, its place in the epoch where
    samples are drawn with replacement, so that two copies draw differently; None: its index."""
    leaf: int = 0
    """Of a plan with `leaf_size`: which of the global batch's leaves it is."""
    leaves: int = 0
    """Of a plan with `leaf_size`: how many leaves the global batch has."""

    skipped: tuple[tuple[int, str], ...] = ()
    """Samples that count and couldn't be read, each with the error; others stand in their places (`data.on_error: skip`)."""

    @property
    def random_keys(self) -> Indices:
        """`keys`, or the indices."""
        return self.indices if self.keys is None else self.keys

    @property
    def zero_weight(self) -> bool:
        """Whether this micro-batch is padding, which adds nothing to loss and gradients."""
        return self.samples == 0


@dataclass(slots=True)
class StepWork:
    """One optimizer step of one rank."""

    step: int
    """Global step, from 0."""
    epoch: int
    samples: int
    """Samples of the global batch, over all ranks."""
    micro_batches: Iterator[MicroBatch]
    """Read when asked for."""


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """The part of n items that `rank` takes: contiguous, in rank order, sizes differing by at most one."""
    size, extra = divmod(n, world_size)
    start = rank * size + min(rank, extra)
    return slice(start, start + size + (rank < extra))


@lru_cache(maxsize=64)
def micro_slices(n: int, rank: int, world_size: int, micro: int) -> tuple[slice, ...]:
    """The micro-batches of `rank` in a global batch of n samples, as slices of that batch; empty without samples.

    The rank's part is split into as few as possible of near-equal size, none larger than `micro`.
    """
    mine = rank_slice(n, rank, world_size)
    size = mine.stop - mine.start
    count = -(-size // micro)
    slices = (rank_slice(size, k, count) for k in range(count))
    return tuple(slice(mine.start + one.start, mine.start + one.stop) for one in slices)


@lru_cache(maxsize=64)
def leaf_shares(leaves: int, world_size: int) -> tuple[range, ...]:
    """Which leaves of a global batch each rank computes: contiguous, in rank order, none more than the others' most.

    Among such shares it takes those that end where a large subtree of the binary tree of sums does (`reduction.tree`), so that
    a rank has few partial sums to send. With fewer leaves than ranks the last ranks have none.
    """
    most, start, shares = -(-leaves // world_size), 0, []
    for rank in range(world_size):
        others = world_size - rank - 1
        least = max(leaves - others * most, min(start + 1, leaves))
        ends = range(least, min(start + most, max(leaves - others, least)) + 1)
        stop = max(ends, key=lambda end: end & -end)  # the largest power of two that divides it
        shares.append(range(start, stop))
        start = stop
    return tuple(shares)


@lru_cache(maxsize=64)
def leaf_slices(n: int, rank: int, world_size: int, size: int) -> tuple[slice, ...]:
    """As `micro_slices`, but of as few near-equal leaves as possible, none larger than `size`, which are the same for any
    number of ranks and never split."""
    leaves = -(-n // size)
    return tuple(rank_slice(n, leaf, leaves) for leaf in leaf_shares(leaves, world_size)[rank])


@lru_cache(maxsize=2)  # two: prefetching may already be in the next epoch
def _order(seed: int, epoch: int, length: int, shuffle: bool, weights: Weights | None) -> Indices:
    # numpy promises that RandomState never changes (NEP 19); torch.randperm and torch.multinomial may.
    low = 0xFFFFFFFF
    key = [seed & low, (seed >> 32) & low, epoch & low, (epoch >> 32) & low]
    if weights is not None:
        order = weights.draw(np.random.RandomState([DRAW, *key]), length)
    else:
        order = np.arange(length, dtype=np.int64)
        if shuffle:
            np.random.RandomState([ORDER, *key]).shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Plan:
    """Which samples each optimizer step takes; steps and epochs count from 0.

    Raises DataError for no sample at all, or fewer than one global batch while `drop_last` is set.
    """

    seed: int
    length: int
    """Samples in the dataset."""
    global_batch_size: int
    """Samples of one optimizer step over all ranks."""
    shuffle: bool = True
    """A new permutation each epoch, else dataset order."""
    drop_last: bool = True
    """Leave out the samples of an epoch that don't fill a global batch; else its last step is smaller."""
    weights: Weights | None = None
    """Draw the `length` samples of an epoch with replacement, by these weights; shuffle makes no difference then."""
    leaf_size: int | None = None
    """Micro-batches are fixed parts of the global batch, of this many samples: leaves of a tree of sums (`reduction.tree`), so
    that results are bitwise identical for any number of ranks; None: each rank splits its own part of the batch."""

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

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        full = self.length // self.global_batch_size
        return full if self.drop_last else -(-self.length // self.global_batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that one epoch trains on."""
        return self.steps_per_epoch * self.global_batch_size if self.drop_last else self.length

    def epoch_of(self, step: int) -> int:
        """The epoch that global step `step` belongs to."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> Indices:
        """All samples in the order of `epoch`: (length,) int64, read-only. The last two epochs are kept."""
        return _order(self.seed, epoch, self.length, self.shuffle, self.weights)

    def batch(self, step: int) -> Indices:
        """The samples of global step `step`: (n,) int64, n = global_batch_size except in a smaller last step."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = k * self.global_batch_size
        return self.order(epoch)[start : start + self.global_batch_size]

    def batch_samples(self, step: int) -> int:
        """How many samples global step `step` takes, without computing the order."""
        start = (step % self.steps_per_epoch) * self.global_batch_size
        return min(self.global_batch_size, self.length - start)

    def share(self, n: int, rank: int, world_size: int) -> slice:
        """The part of a global batch of n samples that `rank` takes; empty if it has none."""
        if self.leaf_size is None:
            return rank_slice(n, rank, world_size)
        mine = leaf_slices(n, rank, world_size, self.leaf_size)
        return slice(mine[0].start, mine[-1].stop) if mine else slice(n, n)

    def slices(self, n: int, rank: int, world_size: int, micro: int) -> tuple[slice, ...]:
        """The micro-batches of `rank` in a global batch of n samples, as slices of that batch; empty without samples."""
        if self.leaf_size is None:
            return micro_slices(n, rank, world_size, micro)
        return leaf_slices(n, rank, world_size, self.leaf_size)

    def leaves(self, n: int) -> int:
        """How many leaves a global batch of n samples has; 0 without `leaf_size`."""
        return 0 if self.leaf_size is None else -(-n // self.leaf_size)

    def local(self, step: int, rank: int, world_size: int) -> Indices:
        """The samples of global step `step` that `rank` takes; empty if it has none."""
        batch = self.batch(step)
        return batch[self.share(len(batch), rank, world_size)]

    def micro_batches(self, step: int, rank: int, world_size: int, micro: int, neighbours: int = 0) -> list[MicroBatch]:
        """What `rank` reads in global step `step`: at least one micro-batch, none of more than `micro` samples.

        `neighbours` more samples are read behind each: those that follow it in the global batch, which wraps around
        at its end. A rank without samples gets the batch's first two (BatchNorm needs two; one if the batch is a single
        sample) with zero weight, since every rank must join the collectives of the step.
        """
        batch = self.batch(step)
        n, epoch = len(batch), self.epoch_of(step)
        mine, leaves = self.slices(n, rank, world_size, micro), self.leaves(n)
        leaf = leaf_shares(leaves, world_size)[rank].start if leaves else 0
        first = (step % self.steps_per_epoch) * self.global_batch_size  # place of the batch in the epoch

        def part(values: Indices, start: int, stop: int) -> Indices:
            return (
                values.take(range(start, stop + neighbours), mode="wrap") if neighbours else values[start:stop].copy()
            )

        def read(start: int, stop: int, samples: int, last: bool, k: int = 0) -> MicroBatch:
            keys = None if self.weights is None else part(np.arange(first, first + n), start, stop)
            indices = part(batch, start, stop)
            return MicroBatch(epoch, step, indices, start, samples, last, keys=keys, leaf=leaf + k, leaves=leaves)

        if not mine:
            return [read(0, min(2, n), 0, True)]
        return [read(one.start, one.stop, one.stop - one.start, one is mine[-1], k) for k, one in enumerate(mine)]

    def following(self, step: int, position: int) -> Iterator[int]:
        """The samples behind the one at `position` of a step's batch in the order of its epoch, which wraps around at its end.

        As many as make a global batch with it. Positions behind the batch's end count from its start.
        """
        order = self.order(self.epoch_of(step))
        first = (step % self.steps_per_epoch) * self.global_batch_size + position % self.batch_samples(step)
        for place in range(first + 1, first + min(self.global_batch_size, len(order))):
            yield int(order[place % len(order)])

    def smallest_micro_batch(self, world_size: int, micro: int) -> int:
        """The fewest samples that any forward of training gets, zero-weight ones apart (BatchNorm can't train on one)."""
        return min(
            one.stop - one.start
            for n in {self.batch_samples(0), self.batch_samples(self.steps_per_epoch - 1)}
            for rank in range(world_size)
            for one in self.slices(n, rank, world_size, micro)
        )

    def fingerprint(self) -> str:
        """16 hex digits, equal on machines that produce the same order (a hash of the start of epoch 0's)."""
        head = self.order(0)[:4096].astype("<i8").tobytes()
        return hashlib.sha256(head).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds to see whether a position means the same: length and fingerprint, the digest of any weights."""
        weights = {} if self.weights is None else {"weights": self.weights.digest}
        return {"length": self.length, "fingerprint": self.fingerprint(), **weights}


@dataclass(frozen=True)
class EvalPlan:
    """Evaluation in fixed batches of the dataset, so that its result is bitwise identical for any world size."""

    length: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def batches(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """The eval batches of `rank`: every world_size-th, never split."""
        starts = range(rank * self.batch_size, self.length, world_size * self.batch_size)
        return [range(start, min(self.length, start + self.batch_size)) for start in starts]


class StepSampler(DistributedSampler[Any]):
    """A `DistributedSampler` for use as the `batch_sampler` of a DataLoader: yields each `MicroBatch`, to be read.

    Unlike its parent it neither pads nor repeats samples, and it can start at any optimizer step. `set_epoch` selects
    one epoch, as its users expect; `set_steps` any range of global steps, without an end if `stop` is None.
    The arguments are those of `Plan.micro_batches`.
    """

    def __init__(self, plan: Plan, *, rank: int, world_size: int, micro_batch_size: int, neighbours: int = 0) -> None:
        samples: Any = range(plan.length)  # the parent only asks for its length
        super().__init__(samples, world_size, rank, plan.shuffle, plan.seed, plan.drop_last)
        self.plan, self.micro_batch_size, self.neighbours = plan, micro_batch_size, neighbours
        self.set_steps(0, plan.steps_per_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Iterate over the steps of `epoch` (also called by code that knows only DistributedSampler)."""
        super().set_epoch(epoch)
        self.set_steps(epoch * self.plan.steps_per_epoch, (epoch + 1) * self.plan.steps_per_epoch)

    def set_steps(self, start: int, stop: int | None) -> None:
        """Iterate over the global steps start, start + 1, ... before `stop`, across the ends of epochs."""
        self.start_step, self.stop_step = start, stop

    def __iter__(self) -> Iterator[Any]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            yield from self.plan.micro_batches(
                step, self.rank, self.num_replicas, self.micro_batch_size, self.neighbours
            )
            step += 1

    def __len__(self) -> int:
        """Micro-batches of this rank in the selected steps (in one epoch, if they have no end)."""
        steps = range(self.plan.steps_per_epoch) if self.stop_step is None else range(self.start_step, self.stop_step)
        sizes = (self.plan.batch_samples(step) for step in steps)
        return sum(max(1, len(self.plan.slices(n, self.rank, self.num_replicas, self.micro_batch_size))) for n in sizes)
