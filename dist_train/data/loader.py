"""Batches for training and evaluation: torch's DataLoader, driven by the plan, from any step on and across epochs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_train.data.errors import CollateError, DataError, SampleError, dataset_name, resource_hint
from dist_train.data.placement import OnDevice
from dist_train.data.plan import EvalPlan, Indices, MicroBatch, Plan, StepSampler, StepWork
from dist_train.data.reading import LoaderOptions, SampleReader, dataset_length
from dist_train.data.skipping import Skipped
from dist_train.data.stream import is_stream, shard_parameters, stream_length
from dist_train.data.stream_check import check_stream
from dist_train.data.stream_reader import ShardPlan, ShardReader, StreamInfo, StreamReader, describe_readers
from dist_train.data.workers import (
    context_for,
    exit_causes,
    init_worker,
    resolve_workers,
    run_signals_blocked,
    stop_workers,
)
from dist_train.runtime.seeding import mix

# Evaluation reads under an epoch of its own, so that a random transform there draws the same in every evaluation.
_EVAL_EPOCH = -1


def _no_collate(batch: Any) -> Any:
    return batch  # `SampleReader` has collated already


class _Loader:
    """What training and evaluation share: a DataLoader, whose workers (`num_workers`) live and die with this process."""

    def __init__(
        self, reader: SampleReader, workers: int, requests: Any, options: LoaderOptions, *, evaluates: bool
    ) -> None:
        config = options.config
        self.reader, self.options = reader, options
        self.num_workers = workers
        self._persistent = workers > 0 and config.persistent_workers in ("auto", True)
        self._timeout = config.timeout
        self._at_exit: Any = None
        pinned = options.device.type == "cuda" if config.pin_memory == "auto" else bool(config.pin_memory)
        pinned = pinned and not isinstance(reader.dataset, OnDevice)  # whose batches are on the device already
        # Without workers and pinning a DataLoader would only call the reader, for as long as reading takes.
        self._direct = requests if workers == 0 and not pinned else None
        # in_order must stay True: steps take micro-batches by position (`_check_order`).
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_sampler=requests,
            collate_fn=_no_collate,
            pin_memory=pinned,
            # Of its own: each iterator draws a base seed, by default from the global generator.
            generator=torch.Generator().manual_seed(mix(options.seed)),
            num_workers=workers,
            worker_init_fn=init_worker,
            prefetch_factor=config.prefetch_factor if workers else None,
            timeout=self._timeout if workers else 0,
            multiprocessing_context=context_for(config.worker_start_method) if workers else None,
            persistent_workers=self._persistent and evaluates,
        )

    def _start(self, ahead: bool = False) -> Iterator[Any]:
        if self._direct is not None:
            return self.reader.read_ahead(self._direct) if ahead else map(self.reader.__getitems__, self._direct)
        if self.num_workers == 0:
            return iter(self._loader)
        try:
            with run_signals_blocked():
                iterator = iter(self._loader)
        except OSError as error:
            raise DataError(f"loader workers couldn't be started: {error}{resource_hint(error)}") from error
        if self._at_exit is None:
            # multiprocessing would send them SIGTERM at exit; workers block SIGTERM, so joining them would hang
            self._at_exit = Finalize(None, stop_workers, args=(iterator,), exitpriority=10)
        return iterator

    def _next(self, iterator: Iterator[MicroBatch]) -> MicroBatch:
        """The next batch. What torch says about lost workers becomes a DataError with the cause and what to do."""
        try:
            return next(iterator)
        except SampleError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            text, sockets = str(error).partition("\n")[0], ConnectionError | EOFError | FileNotFoundError
            lost = text.startswith("DataLoader worker (pid") or isinstance(error, sockets)
            if lost and (causes := exit_causes(iterator)):
                raise DataError(
                    f"a loader worker died without a Python error ({causes}). If it was killed by SIGKILL or SIGBUS, memory "
                    f"ran out (see dmesg) or /dev/shm is full (df -h /dev/shm; docker run --shm-size=8g), and fewer "
                    f"data.num_workers need less of both; else the dataset's own code ended it: data.num_workers=0 shows where"
                ) from error
            if text.startswith("DataLoader timed out"):
                raise DataError(
                    f"no batch arrived within data.timeout={self._timeout:g} s: a worker hangs while reading, or reading "
                    f"is slower than that; raise data.timeout, or find the sample with data.num_workers=0"
                ) from error
            if hint := resource_hint(error):
                raise DataError(f"a batch from a loader worker was lost: {text}{hint}") from error
            raise

    def close(self) -> None:
        """End the workers; the loader can be used again, with new ones."""
        if self._at_exit is not None:
            self._at_exit()  # runs once, and no longer at exit
            self._at_exit = None
            self._loader._iterator = None  # where torch keeps persistent workers


def _read_apart(
    reader: SampleReader, requests: list[MicroBatch], workers: int, options: LoaderOptions
) -> Iterator[MicroBatch]:
    """These, collated, in a worker of their own if others are read in workers."""
    loader = _Loader(reader, min(workers, 1), requests, options, evaluates=False)
    try:
        iterator = loader._start()
        yield from (loader._next(iterator) for _ in requests)
    finally:
        loader.close()


def _workers_for(dataset: Any, options: LoaderOptions) -> int:
    return resolve_workers(
        options.config.num_workers, dataset, collate=options.collate, local_ranks=options.local_ranks
    )


class TrainLoader(_Loader):
    """The training batches of one rank. Use it from one thread, and close it.

    Args:
        dataset: map-style with `len(dataset) == plan.length`, or an IterableDataset.
        plan: the order of samples.
        micro_batch_size: maximum number of samples per forward.
        neighbours: `Augmentation.neighbours`: rows beyond each micro-batch for augmentations that mix samples.

    Attributes:
        waited: seconds that the caller has waited for batches since the loader was made; may be set back to 0.
        notes: how a stream is read, for the log.
        skipped: samples of this rank that were replaced.
    """

    def __init__(
        self, dataset: Any, plan: Plan, options: LoaderOptions, *, micro_batch_size: int, neighbours: int = 0
    ) -> None:
        self.plan = plan
        self.waited = 0.0
        self.notes: list[str] = []
        self.skipped = Skipped()
        self._stream: StreamReader | None = None
        workers = _workers_for(dataset, options)
        if is_stream(dataset):
            if plan.shuffle or neighbours:
                what = "Mixup and CutMix need" if neighbours else "shuffling needs"
                raise DataError(f"{what} a map-style dataset; {dataset_name(dataset)} is an IterableDataset")
            reader: SampleReader = self._open_stream(dataset, workers, micro_batch_size, options)
        elif dataset_length(dataset) == plan.length:
            reader = SampleReader(
                dataset, options.seed, options.collate, plan if options.config.on_error == "skip" else None
            )
        else:
            raise DataError(f"the plan is for {plan.length} samples, but data.train has {len(dataset)}")
        self.sampler = StepSampler(
            plan, rank=options.rank, world_size=options.world_size, micro_batch_size=micro_batch_size,
            neighbours=neighbours,
        )  # fmt: skip
        super().__init__(reader, workers, self.sampler, options, evaluates=False)

    def _open_stream(self, dataset: Any, workers: int, micro_batch_size: int, options: LoaderOptions) -> StreamReader:
        plan, seed, collate = self.plan, options.seed, options.collate
        finite = stream_length(dataset) == plan.length
        shards = ShardPlan(plan, options.world_size, max(1, workers), micro_batch_size, finite)
        available = getattr(dataset, "num_shards", 0)  # Hugging Face's; more readers than these can't have a shard each
        sharded = bool(shard_parameters(dataset)) and shards.readers > 1 and isinstance(available, int)
        found = check_stream(dataset, "train", workers, options)
        info = StreamInfo(plan.length, finite, found["resumable"], found["repeatable"])
        self._first_samples = found["first"]
        if sharded and available % shards.readers == 0:
            self._stream = ShardReader(dataset, seed, collate, info, shards, options.rank)
        else:
            self._stream = StreamReader(dataset, seed, collate, info)
        self.notes.append(self._stream.note())
        return self._stream

    def first(self, count: int) -> list[MicroBatch]:
        """Up to `count` micro-batches of the first step as one process takes them, read in a worker if others are.

        Raises as `steps`.
        """
        sampler = self.sampler
        requests = self.plan.micro_batches(0, 0, 1, sampler.micro_batch_size, sampler.neighbours)
        return list(_read_apart(self.reader, requests[:count], self.num_workers, self.options))

    def state_dict(self, gather: Callable[[Any], list[Any]]) -> dict[str, Any] | None:
        """The positions of a stream's readers after the last micro-batch that was taken; None without a stream.

        All ranks call this; `gather` collects each one's value on rank 0 (where all read the entire stream, one is enough).
        """
        if self._stream is None:
            return None
        readers, key = dict(self._stream.saved), self._shard_key()
        if key is not None:
            readers = {reader: state for saved in gather(readers) for reader, state in saved.items()}
        return {"deal": key, "readers": readers, "first": self._first_samples}

    def load_state_dict(self, state: dict[str, Any] | None, step: int) -> None:
        """Resume from there at `step`.

        Raises DataError if this pass over a sharded stream was begun by another number of readers, or the stream isn't the
        one that was read.
        """
        if self._stream is None or state is None:
            return
        name, begun, key = dataset_name(self._stream.source), state["deal"], self._shard_key()
        if state.get("first", self._first_samples) != self._first_samples:
            raise DataError(
                f"data.train: {name} returns different samples than when this run began, so it isn't known which ones it was "
                f"trained on: its data have changed, or it draws from a generator of its own or the clock. Draw from torch, "
                f"numpy or random, which are seeded for each sample, under another run.name"
            )
        if begun == key:
            self._stream.saved = state["readers"]
        elif step % self.plan.steps_per_epoch or not self._stream.info.finite:
            raise DataError(
                f"data.train: {name} gives each reader a shard, and this pass over it was begun by {describe_readers(begun)}; "
                f"now it would be {describe_readers(key)}, and the rest of the pass isn't known. Resume with as many processes "
                f"and data.num_workers as before (a stream with a length: or at the end of an epoch)"
            )

    def _shard_key(self) -> list[int] | None:
        return self._stream.shards.key() if isinstance(self._stream, ShardReader) else None

    def steps(self, start: int = 0, stop: int | None = None, *, ahead: bool = False) -> Iterator[StepWork]:
        """The work of the global steps start, start + 1, ... before `stop`, across the ends of epochs.

        Nothing is read that doesn't belong to one of them, so give `stop` where the end is known: without it workers
        read ahead, and with `ahead` this process may (see `SampleReader.read_ahead`). A second call ends the first one's workers.

        Raises:
            SampleError: the dataset failed; names the sample.
            DataError: a worker died or took longer than `data.timeout`.
        """
        plan, sampler = self.plan, self.sampler
        # Workers outlive epochs because the sampler crosses their ends; else each epoch gets new ones.
        endless = self.num_workers == 0 or self._persistent
        iterator: Iterator[Any] = iter(())
        for step in itertools.count(start) if stop is None else range(start, stop):
            epoch = plan.epoch_of(step)
            if step == start or not (endless or step % plan.steps_per_epoch):
                self.close()
                end = (epoch + 1) * plan.steps_per_epoch
                sampler.set_steps(step, stop if endless else min(end, stop or end))
                if self._stream is not None:
                    self._stream.rewind()
                iterator = self._start(ahead)
            samples = plan.batch_samples(step)
            mine = plan.share(samples, sampler.rank, sampler.num_replicas)
            micro_batches = self._micro_batches(iterator, step, mine.start if mine.stop > mine.start else 0)
            yield StepWork(step, epoch, samples, micro_batches)
            for _ in micro_batches:  # the caller may have left a step early
                pass
        self.close()

    def _micro_batches(self, iterator: Iterator[Any], step: int, position: int) -> Iterator[MicroBatch]:
        while True:
            began = time.perf_counter()
            micro = self._next(iterator)
            self.waited += time.perf_counter() - began
            _check_order(micro, step, position)
            position += micro.samples
            if micro.skipped:
                self.skipped.add(micro.skipped)
            if self._stream is not None:
                self._stream.commit(micro)
            yield micro
            if micro.last:
                return


def _check_order(micro: MicroBatch, step: int, position: int) -> None:
    """Raises DataError for any other micro-batch than the one that is due: its samples would count for another step."""
    if (micro.step, micro.position) != (step, position):
        raise DataError(
            f"the DataLoader returned batches out of order: expected position {position} of step {step}, found position "
            f"{micro.position} of step {micro.step}; something has replaced or changed torch's DataLoader, which must "
            f"keep in_order=True"
        )


class EvalLoader(_Loader):
    """Every sample of a dataset once, over all ranks, in fixed eval batches: iterates (samples as a range, batch).

    Each pass reads the same with the same draws. Workers are kept between passes unless
    `data.persistent_workers: false`; `close()` ends them.

    Attributes:
        dataset: what is read.
        plan: the `EvalPlan`.
        batches: the samples of each eval batch of this rank.
        rounds: maximum number of eval batches per rank; equal on all ranks.
    """

    def __init__(self, dataset: Any, batch_size: int, options: LoaderOptions, slot: str = "val") -> None:
        self.dataset = dataset
        workers = _workers_for(dataset, options)
        if is_stream(dataset):
            known = stream_length(dataset)
            found = check_stream(dataset, slot, workers, options, count=known is None)
            length = found["length"] if known is None else known
            if not length:
                raise DataError(f"data.{slot}: a pass over {dataset_name(dataset)} gave no sample; expected at least 1")
            reader: SampleReader = StreamReader(dataset, options.seed, options.collate, StreamInfo(length))
        else:
            length = dataset_length(dataset, slot)
            reader = SampleReader(dataset, options.seed, options.collate)
        self.plan = EvalPlan(length, batch_size)
        self.batches = self.plan.batches(options.rank, options.world_size)
        self.rounds = -(-len(self.plan) // options.world_size)
        requests = [
            MicroBatch(_EVAL_EPOCH, k, np.arange(samples.start, samples.stop), samples.start, len(samples), True)
            for k, samples in enumerate(self.batches)
        ]
        self._workers = workers
        super().__init__(reader, min(workers, len(requests)), requests, options, evaluates=True)

    def some(self, count: int, batches: int = 1) -> Generator[tuple[int, Any]]:
        """Batches of up to `count` samples each, spread over the dataset, all different: (how many, the batch).

        The first ones of a stream, and of a dataset in which only neighbours can be batched.
        They are read as others are, in a worker of their own where there are workers: a file that the dataset opened in this
        process would be shared by all that are forked later. Without workers a copy of a stream is read, if it can be copied.

        Raises SampleError: the dataset failed; names the sample. DataError: the worker died.
        """
        total, reader = min(count * batches, self.plan.length), self.reader
        first = [np.arange(k, min(k + count, total)) for k in range(0, total, count)]
        spread = np.linspace(0, self.plan.length - 1, total).round().astype(np.int64)
        parts = [spread[k :: len(first)] for k in range(len(first))]
        if isinstance(reader, StreamReader):
            stream = reader.source
            if not self._workers:
                with contextlib.suppress(Exception):
                    stream = copy.deepcopy(stream)
            reader, parts = StreamReader(stream, reader.seed, reader.collate, reader.info), first
        done = 0
        try:
            for batch in self._read_apart(reader, parts):
                yield batch
                done += 1
        except CollateError:
            yield from self._read_apart(reader, first[done:])

    def _read_apart(self, reader: SampleReader, parts: list[Indices]) -> Iterator[tuple[int, Any]]:
        requests = [MicroBatch(_EVAL_EPOCH, k, part, 0, len(part), True) for k, part in enumerate(parts)]
        for micro in _read_apart(reader, requests, self._workers, self.options):
            yield micro.samples, micro.batch

    def __len__(self) -> int:
        """Eval batches of this rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[range, Any]]:
        iterator = self._start()
        try:
            for k, samples in enumerate(self.batches):
                micro = self._next(iterator)
                _check_order(micro, k, samples.start)
                yield samples, micro.batch
        finally:
            if not self._persistent:
                self.close()
