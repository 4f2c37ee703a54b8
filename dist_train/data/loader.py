"""Batches for the engine: torch's DataLoader, driven by the plan, from any step on and over the ends of epochs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_train.data.deal import Deal
from dist_train.data.errors import DataError, SampleError, dataset_name, shortage
from dist_train.data.passes import is_stream, shards_itself, stream_length
from dist_train.data.plan import EvalPlan, Indices, Plan
from dist_train.data.reading import Collate, Seeded, dataset_length
from dist_train.data.sampler import MicroBatch, StepSampler
from dist_train.data.stream import StreamReader
from dist_train.data.survey import Gather, survey
from dist_train.data.workers import (
    context_for,
    how_ended,
    init_worker,
    resolve_workers,
    run_signals_blocked,
    stop_workers,
)
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
    gather: Gather = lambda value: [value]
    """Every rank's value, in order of rank, on all ranks; they all call it (`World.gather`)."""


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


def _workers_of(dataset: Any, reading: Reading) -> int:
    setting = reading.config.num_workers
    return resolve_workers(setting, dataset, collate=reading.collate, local_ranks=reading.local_ranks)


def _survey(dataset: Any, slot: str, workers: int, reading: Reading, *, count: bool = False) -> dict[str, Any]:
    context = context_for(reading.config.worker_start_method) if workers else None
    return survey(
        dataset, reading.seed, slot=slot, workers=workers, context=context, gather=reading.gather, count=count,
        world_size=reading.world_size,
    )  # fmt: skip


def build_plan(dataset: Any, *, seed: int, config: DataConfig) -> Plan:
    """The plan of the training data by the `data` section's global_batch_size, shuffle, drop_last and steps_per_epoch.

    A stream comes in its own order: it isn't shuffled, and its epoch is `steps_per_epoch` steps, else its own length.

    Raises:
        DataError: no samples, no full batch, or a stream of unknown length.
    """
    size, steps = config.global_batch_size, config.steps_per_epoch
    if not is_stream(dataset):
        samples = dataset_length(dataset)
        return Plan(seed, samples, samples if size == "all" else int(size), config.shuffle, config.drop_last)
    if size == "all":
        raise DataError(f"data.global_batch_size: all needs a map-style dataset, found {dataset_name(dataset)}")
    length = stream_length(dataset) if steps is None else steps * int(size)
    if length is None:
        raise DataError(
            f"data.train: {dataset_name(dataset)} is an IterableDataset without a length: give it a __len__ (samples "
            f"of one pass), or set data.steps_per_epoch"
        )
    return Plan(seed, length, int(size), shuffle=False, drop_last=config.drop_last)


class _Loader:
    """What training and evaluation share: a DataLoader for requests, whose workers live and die with this process."""

    def __init__(self, reader: Seeded, workers: int, requests: Any, reading: Reading, *, evaluates: bool) -> None:
        config = reading.config
        self.num_workers = workers
        self._persistent = workers > 0 and config.persistent_workers in ("auto", True)
        self._timeout = config.timeout
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
            multiprocessing_context=context_for(config.worker_start_method) if workers else None,
            persistent_workers=self._persistent and evaluates,
        )

    def _begin(self) -> Iterator[Any]:
        if self.num_workers == 0:
            return iter(self._loader)
        try:
            with run_signals_blocked():
                iterator = iter(self._loader)
        except OSError as error:
            raise DataError(f"loader workers couldn't be started: {error}{shortage(error)}") from error
        if self._at_exit is None:
            # multiprocessing would send them SIGTERM at exit, which they block, and wait for ever
            self._at_exit = Finalize(None, stop_workers, args=(iterator,), exitpriority=10)
        return iterator

    def _next(self, iterator: Iterator[MicroBatch]) -> MicroBatch:
        """The next batch, with torch's messages about lost workers completed by what to do."""
        try:
            return next(iterator)
        except SampleError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            text = str(error).partition("\n")[0]
            lost = text.startswith("DataLoader worker (pid") or isinstance(
                error, ConnectionError | EOFError | FileNotFoundError
            )
            if lost and (how := how_ended(iterator)):
                raise DataError(
                    f"a loader worker died without a Python error ({how}). If it was killed by SIGKILL or SIGBUS, memory ran "
                    f"out (see dmesg) or /dev/shm is full (df -h /dev/shm; docker run --shm-size=8g), and fewer "
                    f"data.num_workers need less of both; else the dataset's own code ended it: data.num_workers=0 shows where"
                ) from error
            if text.startswith("DataLoader timed out"):
                raise DataError(
                    f"no batch came within data.timeout={self._timeout:g} s: a worker hangs while reading, or reading "
                    f"is slower than that; raise data.timeout, or find the sample with data.num_workers=0"
                ) from error
            if cure := shortage(error):
                raise DataError(f"a batch didn't come through from a loader worker: {text}{cure}") from error
            raise

    def close(self) -> None:
        """End the workers; the loader can be used again, with new ones."""
        if self._at_exit is not None:
            self._at_exit()  # runs once, and no longer at exit
            self._at_exit = None
            self._loader._iterator = None  # where torch keeps persistent workers


def _other_readers(name: str, begun: list[int] | None, deal: Deal | None) -> str:
    def told(key: list[int] | None) -> str:
        if key is None:
            return "one reader of the whole"
        micro = f" with micro-batches of {key[2]}" if key[2] else ""
        return f"{key[0]} ranks x {key[1]} readers{micro}"

    return (
        f"data.train: {name} gives each reader a part of its own (shard), and this pass over it was begun by {told(begun)}; "
        f"now it would be {told(None if deal is None else deal.key())}, and what is left of the pass can't be told. Go on "
        f"with as many processes and data.num_workers as before (a stream with a length: or at the end of an epoch)"
    )


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
        self.notes: list[str] = []
        self.sampler = StepSampler(
            plan, rank=reading.rank, world_size=reading.world_size, micro_batch_size=micro_batch_size,
            neighbours=neighbours,
        )  # fmt: skip
        workers = _workers_of(dataset, reading)
        reader = Seeded(dataset, reading.seed, reading.collate)
        self._stream: StreamReader | None = None
        if is_stream(dataset):
            reader = self._stream = self._open_stream(dataset, workers, reading)
        super().__init__(reader, workers, self.sampler, reading, evaluates=False)

    def _open_stream(self, dataset: Any, workers: int, reading: Reading) -> StreamReader:
        deal = Deal(self.plan, reading.world_size, max(1, workers), self.sampler.micro_batch_size)
        pieces = getattr(dataset, "num_shards", 0)  # Hugging Face's; more readers than these can't have a part each
        parted = shards_itself(dataset) and deal.readers > 1 and isinstance(pieces, int) and pieces % deal.readers == 0
        self.sampler.deal = deal if parted else None
        reader = StreamReader(
            dataset, reading.seed, reading.collate, length=self.plan.length, rank=reading.rank,
            finite=stream_length(dataset) == self.plan.length, deal=self.sampler.deal,
        )  # fmt: skip
        found = _survey(dataset, "train", workers, reading)
        reader.resumes, reader.steady, self._first = found["resumes"], found["steady"], found["first"]
        self.notes = reader.notes()
        return reader

    def state_dict(self, every: Callable[[Any], list[Any]]) -> dict[str, Any] | None:
        """Where the readers of a stream stood after the last micro-batch that was taken; None without a stream.

        `every` gathers each rank's value on rank 0; all ranks call this. Where all read the whole, one place is enough.
        """
        if self._stream is None:
            return None
        deal, saved = self._stream.deal, dict(self._stream.saved)
        if deal is None:
            return {"deal": None, "readers": saved, "first": self._first}
        readers = {k: v for one in every(saved) for k, v in one.items()}
        return {"deal": deal.key(), "readers": readers, "first": self._first}

    def load_state_dict(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on from there at `step`.

        Raises:
            DataError: other readers have begun this pass over a stream that gives each a part of its own, or the stream
                isn't the one that was read.
        """
        if self._stream is None or state is None:
            return
        if state.get("first", self._first) != self._first:
            raise DataError(
                f"data.train: {dataset_name(self._stream.whole)} gives other samples than when this run began, so that what "
                f"was trained of it can't be told: its data have changed, or it draws from a generator of its own or the "
                f"clock. Draw from torch, numpy or random, which are seeded for each sample, under another run.name"
            )
        deal, begun = self._stream.deal, state["deal"]
        if begun == (None if deal is None else deal.key()):
            self._stream.saved = state["readers"]
        elif step % self.plan.steps_per_epoch or not self._stream.finite:
            raise DataError(_other_readers(dataset_name(self._stream.whole), begun, deal))

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
                if self._stream is not None:
                    self._stream.rewind()
                iterator = self._begin()
            indices = plan.batch(step)
            local = plan.local(step, self.sampler.rank, self.sampler.num_replicas)
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
            if self._stream is not None:
                if not len(micro.indices):  # see `Deal.rest`
                    continue
                self._stream.keep(micro)
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

    def __init__(self, dataset: Any, batch_size: int, reading: Reading, slot: str = "val") -> None:
        self.dataset = dataset
        reader, workers = Seeded(dataset, reading.seed, reading.collate), _workers_of(dataset, reading)
        if is_stream(dataset):
            known = stream_length(dataset)
            found = _survey(dataset, slot, workers, reading, count=known is None)
            length = found["length"] if known is None else known
            if not length:
                raise DataError(f"data.{slot}: a pass over {dataset_name(dataset)} gave no sample; expected at least 1")
            reader = StreamReader(dataset, reading.seed, reading.collate, length=length, rank=reading.rank, finite=True)
        else:
            length = dataset_length(dataset, slot)
        self.plan = EvalPlan(length, batch_size)
        self.cuts = self.plan.cuts(reading.rank, reading.world_size)
        self.rounds = -(-len(self.plan) // reading.world_size)
        requests = [
            MicroBatch(_EVAL_EPOCH, k, np.arange(cut.start, cut.stop), cut.start, len(cut), True)
            for k, cut in enumerate(self.cuts)
        ]
        super().__init__(reader, min(workers, len(requests)), requests, reading, evaluates=True)

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
