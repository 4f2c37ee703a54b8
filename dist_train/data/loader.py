"""Batches for the engine: torch's DataLoader, driven by the plan, from any step on and over the ends of epochs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_train.data.errors import DataError
from dist_train.data.plan import EvalPlan, Indices, Plan, share
from dist_train.data.reading import Collate, Seeded, dataset_length, dataset_name
from dist_train.data.sampler import Request, StepSampler
from dist_train.data.stream import StreamReader, is_stream, stream_length
from dist_train.data.workers import init_worker, run_signals_blocked, stop_at_exit
from dist_train.runtime.seeding import mix

if TYPE_CHECKING:
    from dist_train.config.schema import DataConfig

# Evaluation reads under an epoch of its own, so that a random transform there draws the same in every evaluation.
_EVAL_EPOCH = -1


class MicroBatch(NamedTuple):
    """What one forward takes."""

    batch: Any
    """The collated batch, on the CPU (pinned if so configured)."""
    indices: Indices
    """Its rows' samples in the dataset: (n + neighbours,) int64, as `Augmentation` wants them."""
    position: int
    """Place of its first sample in the global batch."""
    samples: int
    """Samples that count: n, or 0 if weightless."""
    weightless: bool
    """Run the forward for the collectives' sake, with weight 0."""
    last: bool
    """The rank's last micro-batch of this step: gradients are exchanged after it."""


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


def build_plan(dataset: Any, *, seed: int, config: DataConfig, steps_per_epoch: int | None = None) -> Plan:
    """The plan of the training data by the `data` section's global_batch_size, shuffle and drop_last.

    Args:
        dataset: the training data. A stream comes in its own order: it isn't shuffled.
        steps_per_epoch: for a stream, the steps that count as an epoch; None takes its length.

    Raises:
        DataError: no samples, no full batch, or a stream of unknown length.
    """
    size = config.global_batch_size
    if not is_stream(dataset):
        length = dataset_length(dataset)
        return Plan(seed, length, length if size == "all" else int(size), config.shuffle, config.drop_last)
    if size == "all":
        raise DataError(f"data.global_batch_size: all needs a map-style dataset, found {dataset_name(dataset)}")
    length = stream_length(dataset, steps_per_epoch, int(size))
    return Plan(seed, length, int(size), shuffle=False, drop_last=config.drop_last)


def _options(config: DataConfig, num_workers: int, device: torch.device, seed: int) -> dict[str, Any]:
    """The DataLoader's arguments that train and evaluation share."""
    pin = device.type == "cuda" if config.pin_memory == "auto" else bool(config.pin_memory)
    # A generator of its own: each iterator draws a base seed, by default from the global one.
    generator = torch.Generator().manual_seed(mix(seed))
    options: dict[str, Any] = {"collate_fn": _keep, "pin_memory": pin, "generator": generator}
    if num_workers > 0:
        method = config.worker_start_method
        options |= {
            "num_workers": num_workers,
            "worker_init_fn": init_worker,
            "prefetch_factor": config.prefetch_factor,
            "timeout": config.timeout,
            "multiprocessing_context": None if method == "auto" else method,
        }
    return options


def _next(iterator: Iterator[Any], timeout: float) -> Any:
    """The next batch, with torch's messages about lost workers completed by what to do."""
    try:
        return next(iterator)
    except RuntimeError as error:
        text = str(error)
        if text.startswith("DataLoader timed out"):
            raise DataError(
                f"no batch came within data.timeout={timeout:g} s: a worker hangs while reading, or reading is slower "
                f"than that; raise data.timeout, or find the sample with data.num_workers=0"
            ) from error
        if text.startswith("DataLoader worker (pid"):
            raise DataError(
                f"{text.splitlines()[0]}: a loader worker died without a Python error. Usually memory ran out (see "
                f"dmesg) or /dev/shm is full (df -h /dev/shm; docker run --shm-size=8g); fewer data.num_workers need "
                f"less of both, and data.num_workers=0 shows an error in the dataset itself"
            ) from error
        raise


class TrainLoader:
    """The training batches of one rank. Use it from one thread, and close it.

    Args:
        dataset: map-style with `len(dataset) == plan.length`, or an IterableDataset.
        plan: the order of samples.
        rank, world_size: this rank and how many share each global batch.
        micro_batch_size: most samples of one forward.
        seed: the run's seed, for what transforms draw.
        config: the `data` section (pin_memory, persistent_workers, prefetch_factor, timeout, worker_start_method).
        num_workers: see `resolve_workers`.
        device: where the model is; decides on pinning.
        collate: list of samples -> batch, torch's by default.
        neighbours: `Augmentation.neighbours`: rows beyond each micro-batch for augmentations that mix samples.

    Attributes:
        sampler: the `StepSampler` that the DataLoader got as its batch sampler.
        num_workers: worker processes, 0 for none.
        waited: seconds that the caller has waited for batches since the loader was made; may be set back to 0.
    """

    def __init__(
        self,
        dataset: Any,
        plan: Plan,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        seed: int,
        config: DataConfig,
        num_workers: int,
        device: torch.device,
        collate: Collate | None = None,
        neighbours: int = 0,
    ) -> None:
        if is_stream(dataset):
            if plan.shuffle or neighbours:
                what = "Mixup and CutMix need" if neighbours else "shuffling needs"
                raise DataError(f"{what} a map-style dataset; {dataset_name(dataset)} is an IterableDataset")
            reader: Any = StreamReader(dataset, plan.length, seed, rank=rank, world_size=world_size, collate=collate)
        else:
            if dataset_length(dataset) != plan.length:
                raise DataError(f"the plan is for {plan.length} samples, but data.train has {len(dataset)}")
            reader = Seeded(dataset, seed, collate)
        self.plan = plan
        self.rank, self.world_size = rank, world_size
        self.num_workers = num_workers
        self.waited = 0.0
        self.sampler = StepSampler(
            plan, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, neighbours=neighbours
        )
        self._timeout = config.timeout
        # Workers outlive epochs because the sampler crosses their ends; else each epoch gets new ones.
        self._endless = num_workers == 0 or config.persistent_workers in ("auto", True)
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_sampler=self.sampler,
            **_options(config, num_workers, device, seed),
        )
        self._iterator: Iterator[Any] | None = None
        self._at_exit: Any = None

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[StepWork]:
        """The work of the global steps start, start + 1, ... before `stop`, over the ends of epochs.

        Nothing is read that doesn't belong to one of them, so give `stop` where the end is known: without it workers
        read ahead. A second call ends the first one's workers.

        Raises:
            SampleError: the dataset failed; names the sample.
            DataError: a worker died or took longer than `data.timeout`.
        """
        self.close()
        plan = self.plan
        epoch = -1
        step = start
        while stop is None or step < stop:
            if plan.epoch_of(step) != epoch:
                epoch = plan.epoch_of(step)
                if self._iterator is None or not self._endless:
                    self._start(step, stop)
            indices = plan.batch(step)
            n = len(indices)
            local = indices[share(n, self.rank, self.world_size)]
            micro_batches = self._micro_batches()
            yield StepWork(step, epoch, n, indices, local, micro_batches)
            for _ in micro_batches:  # the caller may have left a step early
                pass
            step += 1
        self.close()

    def _start(self, step: int, stop: int | None) -> None:
        self.close()
        if not self._endless:
            end = (self.plan.epoch_of(step) + 1) * self.plan.steps_per_epoch
            stop = end if stop is None else min(stop, end)
        self.sampler.set_steps(step, stop)
        if self.num_workers == 0:
            self._iterator = iter(self._loader)
            return
        with run_signals_blocked():
            self._iterator = iter(self._loader)
        self._at_exit = stop_at_exit(self._iterator)

    def _micro_batches(self) -> Iterator[MicroBatch]:
        iterator = self._iterator
        assert iterator is not None
        while True:
            began = time.perf_counter()
            request, batch = _next(iterator, self._timeout)
            self.waited += time.perf_counter() - began
            samples = 0 if request.weightless else len(request.indices) - self.sampler.neighbours
            yield MicroBatch(batch, request.indices, request.position, samples, request.weightless, request.last)
            if request.last:
                return

    def close(self) -> None:
        """End the workers; the loader can be started again by `steps`."""
        if self._at_exit is not None:
            self._at_exit()  # runs once, and no longer at exit
            self._at_exit = None
        self._iterator = None


build_train_loader = TrainLoader


class EvalLoader:
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

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        config: DataConfig,
        num_workers: int,
        device: torch.device,
        collate: Collate | None = None,
    ) -> None:
        self.dataset = dataset
        self.plan = EvalPlan(dataset_length(dataset, "val/test"), batch_size)
        self.cuts = self.plan.cuts(rank, world_size)
        self.rounds = -(-len(self.plan) // world_size)
        self.num_workers = min(num_workers, len(self.cuts))
        self._timeout = config.timeout
        requests = [
            Request(_EVAL_EPOCH, k, np.arange(cut.start, cut.stop, dtype=np.int64), cut.start, False, True)
            for k, cut in enumerate(self.cuts)
        ]
        if is_stream(dataset):
            reader: Any = StreamReader(
                dataset, self.plan.length, seed, rank=rank, world_size=world_size, collate=collate, exact=True
            )
        else:
            reader = Seeded(dataset, seed, collate)
        self._keep = self.num_workers > 0 and config.persistent_workers in ("auto", True)
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_sampler=requests,  # type: ignore[arg-type]
            persistent_workers=self._keep,
            **_options(config, self.num_workers, device, seed),
        )
        self._at_exit: Any = None

    def __len__(self) -> int:
        """Cuts that this rank evaluates."""
        return len(self.cuts)

    def __iter__(self) -> Iterator[tuple[range, Any]]:
        with run_signals_blocked():
            iterator = iter(self._loader)
        if self.num_workers > 0 and self._at_exit is None:
            self._at_exit = stop_at_exit(iterator)
        try:
            for cut in self.cuts:
                _, batch = _next(iterator, self._timeout)
                yield cut, batch
        finally:
            if not self._keep:
                self.close()

    def close(self) -> None:
        """End the workers that are kept between passes."""
        if self._at_exit is not None:
            self._at_exit()
            self._at_exit = None
            self._loader._iterator = None  # torch keeps persistent workers here; the next pass starts new ones
