"""Batches for the engine: torch's DataLoader, driven by the plan, from any step on and over the ends of epochs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_train.data.errors import DataError
from dist_train.data.plan import EvalPlan, Indices, Plan, share
from dist_train.data.reading import Collate, Seeded, dataset_length, dataset_name
from dist_train.data.sampler import MicroBatch, StepSampler
from dist_train.data.stream import StreamReader, is_stream
from dist_train.data.workers import context_for, init_worker, resolve_workers, run_signals_blocked, stop_workers
from dist_train.runtime.seeding import mix

if TYPE_CHECKING:
    from dist_train.config.schema import DataConfig

# Evaluation reads under an epoch of its own, so that a random transform there draws the same in every evaluation.
_EVAL_EPOCH = -1


@dataclass(frozen=True)
class Reading:
    """How this process reads, whatever the dataset."""

    config: DataConfig
    """The `data` section: num_workers, pin_memory, persistent_workers, prefetch_factor, timeout, worker_start_method."""
    seed: int
    """The run's seed, for what transforms draw."""
    device: torch.device
    """Where the model is; decides on pinning."""
    rank: int = 0
    world_size: int = 1
    """How many ranks share each global batch."""
    local_ranks: int = 1
    """How many ranks share this machine's CPUs."""
    collate: Collate | None = None
    """List of samples -> batch, torch's by default."""


@dataclass(slots=True)
class StepWork:
    """One optimizer step of one rank."""

    step: int
    """Global step, from 0."""
    epoch: int
    samples: int
    """Samples of the global batch, over all ranks."""
    indices: Indices
    """The global batch: (samples,) int64."""
    local_indices: Indices
    """This rank's part of it, known before anything is read; empty if it has none."""
    micro_batches: Iterator[MicroBatch]
    """Read when asked for."""


def _keep(batch: Any) -> Any:
    """The collate function given to torch: `Seeded` has collated already."""
    return batch


def build_plan(dataset: Any, *, seed: int, config: DataConfig) -> Plan:
    """The plan of the training data by the `data` section's global_batch_size, shuffle, drop_last and steps_per_epoch.

    A stream comes in its own order: it isn't shuffled, and its epoch is `steps_per_epoch` steps, else its own length.

    Raises:
        DataError: no samples, no full batch, or a stream of unknown length.
    """
    size, steps = config.global_batch_size, config.steps_per_epoch
    if not is_stream(dataset):
        length = dataset_length(dataset)
        return Plan(seed, length, length if size == "all" else int(size), config.shuffle, config.drop_last)
    if size == "all":
        raise DataError(f"data.global_batch_size: all needs a map-style dataset, found {dataset_name(dataset)}")
    if steps is None and not hasattr(dataset, "__len__"):
        raise DataError(
            f"data.train: {dataset_name(dataset)} is an IterableDataset without a length: give it a __len__ (samples "
            f"of one pass), or set data.steps_per_epoch"
        )
    length = len(dataset) if steps is None else steps * int(size)
    return Plan(seed, length, int(size), shuffle=False, drop_last=config.drop_last)


class _Loader:
    """What training and evaluation share: a DataLoader for requests, whose workers live and die with this process."""

    def __init__(self, dataset: Any, length: int, requests: Any, reading: Reading, *, evaluates: bool) -> None:
        config = reading.config
        reader = Seeded(dataset, reading.seed, reading.collate)
        if is_stream(dataset):
            reader = StreamReader(
                dataset, reading.seed, reading.collate, length=length, rank=reading.rank,
                world_size=reading.world_size, exact=evaluates,
            )  # fmt: skip
        workers = resolve_workers(config.num_workers, dataset, collate=reading.collate, local_ranks=reading.local_ranks)
        self.num_workers = workers = min(workers, len(requests)) if evaluates else workers
        self._persistent = workers > 0 and config.persistent_workers in ("auto", True)
        self._timeout, method = config.timeout, config.worker_start_method
        self._at_exit: Any = None
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_sampler=requests,
            collate_fn=_keep,
            pin_memory=reading.device.type == "cuda" if config.pin_memory == "auto" else bool(config.pin_memory),
            # Of its own: each iterator draws a base seed, by default from the global generator.
            generator=torch.Generator().manual_seed(mix(reading.seed)),
            num_workers=workers,
            worker_init_fn=init_worker,
            prefetch_factor=config.prefetch_factor if workers else None,
            timeout=self._timeout if workers else 0,
            multiprocessing_context=context_for(method) if workers else None,
            persistent_workers=self._persistent and evaluates,
        )

    def _begin(self) -> Iterator[Any]:
        if self.num_workers == 0:
            return iter(self._loader)
        with run_signals_blocked():
            iterator = iter(self._loader)
        if self._at_exit is None:
            # multiprocessing would send them SIGTERM at exit, which they block, and wait for ever
            self._at_exit = Finalize(None, stop_workers, args=(iterator,), exitpriority=10)
        return iterator

    def _next(self, iterator: Iterator[MicroBatch]) -> MicroBatch:
        """The next batch, with torch's messages about lost workers completed by what to do."""
        try:
            return next(iterator)
        except RuntimeError as error:
            text = str(error)
            if text.startswith("DataLoader timed out"):
                raise DataError(
                    f"no batch came within data.timeout={self._timeout:g} s: a worker hangs while reading, or reading "
                    f"is slower than that; raise data.timeout, or find the sample with data.num_workers=0"
                ) from error
            if text.startswith("DataLoader worker (pid"):
                raise DataError(
                    f"{text.splitlines()[0]}: a loader worker died without a Python error. Usually memory ran out (see "
                    f"dmesg) or /dev/shm is full (df -h /dev/shm; docker run --shm-size=8g); fewer data.num_workers "
                    f"need less of both, and data.num_workers=0 shows an error in the dataset itself"
                ) from error
            raise

    def close(self) -> None:
        """End the workers; the loader can be used again, with new ones."""
        if self._at_exit is not None:
            self._at_exit()  # runs once, and no longer at exit
            self._at_exit = None
            self._loader._iterator = None  # where torch keeps persistent workers


class TrainLoader(_Loader):
    """The training batches of one rank. Use it from one thread, and close it.

    Args:
        dataset: map-style with `len(dataset) == plan.length`, or an IterableDataset.
        plan: the order of samples.
        micro_batch_size: most samples of one forward.
        neighbours: `Augmentation.neighbours`: rows beyond each micro-batch for augmentations that mix samples.

    Attributes:
        sampler: the `StepSampler` that the DataLoader got as its batch sampler.
        num_workers: worker processes, 0 for none.
        waited: seconds that the caller has waited for batches since the loader was made; may be set back to 0.
    """

    def __init__(
        self, dataset: Any, plan: Plan, reading: Reading, *, micro_batch_size: int, neighbours: int = 0
    ) -> None:
        if not is_stream(dataset):
            if dataset_length(dataset) != plan.length:
                raise DataError(f"the plan is for {plan.length} samples, but data.train has {len(dataset)}")
        elif plan.shuffle or neighbours:
            what = "Mixup and CutMix need" if neighbours else "shuffling needs"
            raise DataError(f"{what} a map-style dataset; {dataset_name(dataset)} is an IterableDataset")
        self.plan = plan
        self.waited = 0.0
        self.sampler = StepSampler(
            plan, rank=reading.rank, world_size=reading.world_size, micro_batch_size=micro_batch_size,
            neighbours=neighbours,
        )  # fmt: skip
        super().__init__(dataset, plan.length, self.sampler, reading, evaluates=False)

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[StepWork]:
        """The work of the global steps start, start + 1, ... before `stop`, over the ends of epochs.

        Nothing is read that doesn't belong to one of them, so give `stop` where the end is known: without it workers
        read ahead. A second call ends the first one's workers.

        Raises:
            SampleError: the dataset failed; names the sample.
            DataError: a worker died or took longer than `data.timeout`.
        """
        plan = self.plan
        # Workers outlive epochs because the sampler crosses their ends; else each epoch gets new ones.
        endless = self.num_workers == 0 or self._persistent
        iterator: Iterator[Any] = iter(())
        for step in itertools.count(start) if stop is None else range(start, stop):
            epoch = plan.epoch_of(step)
            if step == start or not (endless or step % plan.steps_per_epoch):
                self.close()
                end = (epoch + 1) * plan.steps_per_epoch
                self.sampler.set_steps(step, stop if endless else min(end, stop or end))
                iterator = self._begin()
            indices = plan.batch(step)
            local = indices[share(len(indices), self.sampler.rank, self.sampler.num_replicas)]
            micro_batches = self._micro_batches(iterator)
            yield StepWork(step, epoch, len(indices), indices, local, micro_batches)
            for _ in micro_batches:  # the caller may have left a step early
                pass
        self.close()

    def _micro_batches(self, iterator: Iterator[Any]) -> Iterator[MicroBatch]:
        last = False
        while not last:
            began = time.perf_counter()
            micro = self._next(iterator)
            self.waited += time.perf_counter() - began
            last = micro.last
            yield micro


class EvalLoader(_Loader):
    """Every sample of a dataset once, over all ranks, in fixed cuts: iterates (samples as a range, batch).

    Each pass reads the same with the same draws. Workers are kept between passes unless
    `data.persistent_workers: false`; `close()` ends them.

    Attributes:
        dataset: what is read.
        plan: the `EvalPlan`.
        cuts: the cuts that this rank evaluates.
        rounds: the most cuts that any rank evaluates; equal on all ranks.
        num_workers: worker processes, 0 for none.
    """

    def __init__(self, dataset: Any, batch_size: int, reading: Reading) -> None:
        self.dataset = dataset
        self.plan = EvalPlan(dataset_length(dataset, "val/test"), batch_size)
        self.cuts = self.plan.cuts(reading.rank, reading.world_size)
        self.rounds = -(-len(self.plan) // reading.world_size)
        requests = [
            MicroBatch(_EVAL_EPOCH, k, np.arange(cut.start, cut.stop), cut.start, len(cut), True)
            for k, cut in enumerate(self.cuts)
        ]
        super().__init__(dataset, self.plan.length, requests, reading, evaluates=True)

    def __len__(self) -> int:
        """Cuts that this rank evaluates."""
        return len(self.cuts)

    def __iter__(self) -> Iterator[tuple[range, Any]]:
        iterator = self._begin()
        try:
            for cut in self.cuts:
                yield cut, self._next(iterator).batch
        finally:
            if not self._persistent:
                self.close()
