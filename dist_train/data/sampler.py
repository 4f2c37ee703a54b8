"""From the plan to what one rank reads: a batch sampler whose items carry everything that a worker must know."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
from torch.utils.data import DistributedSampler

from dist_train.data.deal import Deal
from dist_train.data.plan import Indices, Plan, parts


class MicroBatch(NamedTuple):
    """What one forward of one rank takes: first without its batch, as it is handed to workers, which keep no state."""

    epoch: int
    step: int
    """Global optimizer step, from 0."""
    indices: Indices
    """Its rows' samples in the dataset: (n + neighbours,) int64, a copy, so that nobody can harm the plan's order."""
    position: int
    """Place of its first sample in the global batch."""
    samples: int
    """Samples that count: n, or 0 if this rank has none in the step and runs the forward for the collectives' sake."""
    last: bool
    """The rank's last micro-batch of this step: gradients are exchanged after it."""
    batch: Any = None
    """The collated batch, on the CPU (pinned if so configured)."""
    state: Any = None
    """Where a stream's reader stands after it (see `StreamReader`)."""

    @property
    def zero_weight(self) -> bool:
        """Whether it is padding: its result doesn't count."""
        return self.samples == 0


def requests(plan: Plan, step: int, rank: int, world_size: int, micro: int, neighbours: int = 0) -> list[MicroBatch]:
    """What `rank` reads in global step `step`, at least one micro-batch.

    `neighbours` more samples are read behind each micro-batch: those that follow it in the global batch, whose end is
    followed by its beginning. A rank without samples gets the batch's first two (BatchNorm needs two; one if the
    batch is a single sample), with zero weight, since every rank must take part in the collectives of the step.
    """
    batch = plan.batch(step)
    n = len(batch)
    epoch = plan.epoch_of(step)
    mine = parts(n, rank, world_size, micro)

    def read(start: int, stop: int) -> Indices:
        return batch.take(range(start, stop + neighbours), mode="wrap") if neighbours else batch[start:stop].copy()

    if not mine:
        return [MicroBatch(epoch, step, read(0, min(2, n)), 0, 0, True)]
    return [
        MicroBatch(epoch, step, read(part.start, part.stop), part.start, part.stop - part.start, part is mine[-1])
        for part in mine
    ]


class StepSampler(DistributedSampler[Any]):
    """A `DistributedSampler` for use as the `batch_sampler` of a DataLoader: yields each `MicroBatch`, to be read.

    Unlike its parent it neither pads nor repeats samples, and it can begin at any optimizer step. `set_epoch` selects
    one epoch, as its users expect; `set_steps` any range of global steps, without an end if `stop` is None.

    Args:
        plan: the order of samples.
        rank, world_size: this rank and how many share each global batch.
        micro_batch_size: most samples of one forward.
        neighbours: samples to read beyond each micro-batch, see `dist_train.data.augment`.
    """

    def __init__(self, plan: Plan, *, rank: int, world_size: int, micro_batch_size: int, neighbours: int = 0) -> None:
        super().__init__(
            cast("Any", range(plan.length)),  # the parent only asks for its length
            num_replicas=world_size,
            rank=rank,
            shuffle=plan.shuffle,
            seed=plan.seed,
            drop_last=plan.drop_last,
        )
        self.plan = plan
        self.micro_batch_size = micro_batch_size
        self.neighbours = neighbours
        self.deal: Deal | None = None  # with parts of a stream, whose readers must get their own requests
        self.start_step = 0
        self.stop_step: int | None = plan.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Iterate over the steps of `epoch` (also called by code that knows only DistributedSampler)."""
        super().set_epoch(epoch)
        self.set_steps(epoch * self.plan.steps_per_epoch, (epoch + 1) * self.plan.steps_per_epoch)

    def set_steps(self, start: int, stop: int | None) -> None:
        """Iterate over the global steps start, start + 1, ... before `stop`, over the ends of epochs."""
        self.start_step, self.stop_step = start, stop

    def __iter__(self) -> Iterator[Any]:
        step = self.start_step
        if self.deal is not None:
            yield from self._empty(self.deal.rest(self.rank, step))
        while self.stop_step is None or step < self.stop_step:
            yield from requests(self.plan, step, self.rank, self.num_replicas, self.micro_batch_size, self.neighbours)
            step += 1
            if self.deal is not None and step % self.plan.steps_per_epoch == 0:
                yield from self._empty(self.deal.fill(self.rank))

    def _empty(self, count: int) -> Iterator[MicroBatch]:
        nothing = np.zeros(0, dtype=np.int64)
        return itertools.repeat(MicroBatch(0, 0, nothing, 0, 0, False), count)

    def __len__(self) -> int:
        """Micro-batches of this rank in the selected steps (in one epoch, if they have no end)."""
        start, stop = self.start_step, self.stop_step
        if stop is None:
            start, stop = 0, self.plan.steps_per_epoch
        sizes = (self.plan.batch_samples(step) for step in range(start, stop))
        return sum(max(1, len(parts(n, self.rank, self.num_replicas, self.micro_batch_size))) for n in sizes)
