"""Checks on a stream before training: whether all readers get the same samples, and how it resumes."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dist_train.data.digest import content_digest
from dist_train.data.errors import DataError, SampleError, dataset_name, describe_error
from dist_train.data.reading import LoaderOptions
from dist_train.data.stream import Pass, shard_of, shard_parameters
from dist_train.data.workers import context_for, hide_rank, init_worker, run_signals_blocked, stop_workers

_COMPARED = 8  # samples
_PLACE = 3  # samples before the position at which state_dict is tried


class _Probe(Dataset[dict[str, Any]]):
    """One reader's findings about a stream, as JSON-serializable values."""

    def __init__(self, dataset: Any, seed: int, count: bool) -> None:
        self.dataset, self.seed, self.count = dataset, seed, count

    def __getitem__(self, index: int) -> dict[str, Any]:
        private = get_worker_info() is not None  # a worker's dataset is a copy already
        if private:
            hide_rank()
        try:
            dataset = self.dataset
            if not private:  # what a pass leaves behind in the dataset must not affect training
                with contextlib.suppress(Exception):
                    dataset, private = copy.deepcopy(dataset), True
            return self._probe(shard_of(dataset, 0, 1), private)
        except Exception as error:
            return {"error": str(error) if isinstance(error, DataError | SampleError) else describe_error(error)}

    def _probe(self, dataset: Any, private: bool) -> dict[str, Any]:
        first = Pass(dataset, self.seed, 0)
        head = _read(first)
        length = len(head) + sum(1 for _ in first) if self.count else None
        repeatable = head == _read(Pass(dataset, self.seed, 0))
        resumable = False
        if callable(getattr(dataset, "state_dict", None)) and callable(getattr(dataset, "load_state_dict", None)):
            resumable = self._resumable(dataset, private)
        elif shard_parameters(dataset) and not repeatable:
            raise DataError(
                f"{dataset_name(dataset)} returns different samples when it is read again, so that a resumed run couldn't "
                f"find its position in a shard: draw from torch, numpy or random, which are seeded, or by set_epoch"
            )
        return {"first": head, "length": length, "resumable": resumable, "repeatable": repeatable}

    def _resumable(self, dataset: Any, private: bool) -> bool:
        """Whether a loaded state restores the position (a shuffle buffer isn't in it), and in that pass only."""
        begun = Pass(dataset, self.seed, 0)
        begun.skip(_PLACE)
        state = copy.deepcopy(dataset.state_dict())
        try:  # a checkpoint is read without running code
            torch.save(state, out := io.BytesIO())
            torch.load(io.BytesIO(out.getvalue()), weights_only=True)
        except Exception:
            return False
        following, next_pass = _read(begun), _read(Pass(dataset, self.seed, 1))
        resumed = _read(Pass(dataset, self.seed, 0, place=_PLACE, state=state)) == following
        forgotten = _read(Pass(dataset, self.seed, 1)) == next_pass
        if not forgotten and not private:
            raise DataError(
                f"{dataset_name(dataset)}: after load_state_dict every pass starts at that position, not only the next; "
                f"forget it at the end of __iter__, or leave state_dict out"
            )
        return resumed and forgotten


def _read(samples: Pass) -> list[str]:
    return [content_digest(sample) for sample in itertools.islice(samples, _COMPARED)]


def check_stream(
    dataset: Any, slot: str, workers: int, options: LoaderOptions, *, count: bool = False
) -> dict[str, Any]:
    """Read the beginning of a stream as its readers will, or an entire pass to `count` it, on all ranks, which all call this.

    It is probed in up to two of the rank's loader workers, or in this process, which can see its rank, if there are none.
    Raises DataError if it can't be read, or its readers don't get the same samples.

    Returns:
        {"first": digests of the first samples, "length": samples of a pass if `count`, else None, "resumable": whether its
        state_dict can be relied on, "repeatable": whether a second reading gives the same samples}.
    """
    name = dataset_name(dataset)
    if hasattr(type(dataset), "__next__"):
        raise DataError(
            f"data.{slot}: {name} is an iterator, which can be read once only; expected an object whose __iter__ starts "
            f"over (a torch IterableDataset; torchdata.nodes.Loader around a node; a class around a generator)"
        )
    if slot == "train" and options.config.on_error == "skip":
        raise DataError(
            f"data.on_error: skip needs a map-style dataset (__len__, __getitem__); {name} is an IterableDataset"
        )
    probe = _Probe(dataset, options.seed, count)
    try:
        found = _in_workers(probe, min(workers, 2), options) if workers else [probe[0]]
    except Exception as error:  # no worker could be started: the other ranks, which wait for this one, hear of it
        found = [{"error": describe_error(error)}]
    readers = [(rank, k, one) for rank, every in enumerate(options.all_gather(found)) for k, one in enumerate(every)]
    for rank, _, one in readers:
        if "error" in one:
            raise DataError(f"data.{slot}: {name} can't be read on rank {rank}: {one['error']}")
    reference = readers[0][2]
    for rank, k, one in readers:
        if one["first"] != reference["first"] or one["length"] != reference["length"]:
            who = f"rank {rank}" + f", worker {k}," * (workers > 1)
            raise DataError(
                f"data.{slot}: {name} returns different samples on {who} than on rank 0: {_split(workers > 0)}"
            )
    return {**reference, "resumable": all(one["resumable"] for _, _, one in readers)}


def _split(hidden: bool) -> str:
    """Why a stream's readers get different samples, and what to do; `hidden`: no reader can see its rank."""
    cause = "it splits itself by rank (data.num_workers: 1 reads it in a worker, where the rank is hidden)"
    if hidden:
        cause = "in loader workers rank and worker are hidden, so it did so where it was built"
    return (
        f"here every reader reads the whole stream and keeps its part, and a split one would lose or repeat samples; {cause}. "
        f"Don't split it (webdataset: nodesplitter=None, workersplitter=None; datasets: without split_dataset_by_node) or give "
        f"it a method shard(index, count). If it draws from a generator that isn't seeded alike, draw from torch, numpy or "
        f"random, which are seeded for each sample"
    )


def _in_workers(probe: _Probe, workers: int, options: LoaderOptions) -> list[dict[str, Any]]:
    loader: DataLoader[Any] = DataLoader(
        probe, batch_size=None, sampler=range(workers), num_workers=workers, worker_init_fn=init_worker,
        multiprocessing_context=context_for(options.config.worker_start_method),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with run_signals_blocked():
        iterator = iter(loader)
    try:
        return list(iterator)
    finally:
        stop_workers(iterator)
