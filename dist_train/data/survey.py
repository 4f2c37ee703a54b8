"""What is found out about a stream before anything is written: whether all who read it whole get the same."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dist_train.data.errors import DataError, SampleError, dataset_name, told
from dist_train.data.hiding import hide_placement
from dist_train.data.passes import Pass, part_of, shards_itself
from dist_train.data.workers import init_worker, run_signals_blocked, stop_workers

FIRST = 8  # samples that are compared
_PLACE = 3  # where a state is tried

Gather = Callable[[Any], list[Any]]


class _Look(Dataset[dict[str, Any]]):
    """What one reader sees of a stream, as anything that JSON can hold."""

    def __init__(self, dataset: Any, seed: int, count: bool) -> None:
        self.dataset, self.seed, self.count = dataset, seed, count

    def __getitem__(self, index: int) -> dict[str, Any]:
        inside = get_worker_info() is not None
        if inside:
            hide_placement()
        try:
            return self.look(inside)
        except Exception as error:
            return {"error": str(error) if isinstance(error, DataError | SampleError) else told(error)}

    def look(self, inside: bool) -> dict[str, Any]:
        """First samples, their number where it is asked for, and whether the dataset's own state leads back to a place."""
        whole = self.dataset
        if (
            not inside
        ):  # what a pass leaves behind in the dataset must not move the training's; a worker's is a copy already
            with contextlib.suppress(Exception):
                whole = copy.deepcopy(whole)
        dataset = part_of(whole, 0, 1)
        first = Pass(dataset, self.seed, 0)
        head = [content_digest(sample) for sample in itertools.islice(first, FIRST)]
        length = len(head) + sum(1 for _ in first) if self.count else None
        steady = head == [content_digest(sample) for sample in itertools.islice(Pass(dataset, self.seed, 0), FIRST)]
        resumes = False
        if callable(getattr(dataset, "state_dict", None)) and callable(getattr(dataset, "load_state_dict", None)):
            resumes = self._leads_back(dataset, stays=whole is self.dataset and not inside)
        elif shards_itself(whole) and not steady:
            raise DataError(
                f"{dataset_name(dataset)} gives other samples when it is read again, so that a start that goes on couldn't "
                f"find its place in a part (shard): draw from torch, numpy or random, which are seeded, or by set_epoch"
            )
        return {"first": head, "length": length, "resumes": resumes, "steady": steady}

    def _leads_back(self, dataset: Any, stays: bool) -> bool:
        """Whether a loaded state goes on as the stream did (a shuffle buffer isn't in it), and in that pass only.

        `stays`: training reads this very object.
        """
        begun = Pass(dataset, self.seed, 0)
        begun.skip(_PLACE)
        state = copy.deepcopy(dataset.state_dict())
        try:  # a checkpoint is read without running code
            torch.save(state, out := io.BytesIO())
            torch.load(io.BytesIO(out.getvalue()), weights_only=True)
        except Exception:
            return False
        after = [content_digest(sample) for sample in itertools.islice(begun, FIRST)]
        other = [content_digest(sample) for sample in itertools.islice(Pass(dataset, self.seed, 1), FIRST)]
        loaded = Pass(dataset, self.seed, 0, place=_PLACE, state=state)
        back = [content_digest(sample) for sample in itertools.islice(loaded, FIRST)] == after
        again = [content_digest(sample) for sample in itertools.islice(Pass(dataset, self.seed, 1), FIRST)] == other
        if not again and stays:
            raise DataError(
                f"{dataset_name(dataset)}: after load_state_dict every pass begins at that place, not only the next; "
                f"forget it at the end of __iter__, or leave state_dict out"
            )
        return back and again


def survey(
    dataset: Any, seed: int, *, slot: str, workers: int, context: Any, gather: Gather, count: bool, world_size: int
) -> dict[str, Any]:
    """{"length": samples, where `count` asks for them, "resumes": whether its state_dict can be relied on, "first": the
    first samples, hashed, "steady": whether a second reading gives the same}.

    All ranks call it. As many workers as read later, two at most, look at the stream; without any this process does,
    which can see its rank.

    Raises:
        DataError: it can't be read, or its readers don't get the same samples.
    """
    name = dataset_name(dataset)
    if hasattr(type(dataset), "__next__"):
        raise DataError(
            f"data.{slot}: {name} is an iterator, which can be read once only; expected an object whose __iter__ begins "
            f"again (a torch IterableDataset; torchdata.nodes.Loader around a node; a class around a generator)"
        )
    look = _Look(dataset, seed, count)
    try:
        answers = _in_workers(look, min(workers, 2), context) if workers else [look[0]]
    except Exception as error:  # a worker that couldn't be started: the other ranks must hear of it, too
        answers = [{"error": told(error)}]
    readers = [(rank, k, found) for rank, every in enumerate(gather(answers)) for k, found in enumerate(every)]
    for rank, _, found in readers:
        if "error" in found:
            raise DataError(f"data.{slot}: {name} can't be read on rank {rank}: {found['error']}")
    for rank, k, found in readers[1:]:
        if found["first"] != readers[0][2]["first"] or found["length"] != readers[0][2]["length"]:
            raise DataError(_differ(f"data.{slot}", name, rank, k, workers))
    return {**readers[0][2], "resumes": all(found["resumes"] for _, _, found in readers)}


def _differ(slot: str, name: str, rank: int, worker: int, workers: int) -> str:
    who = f"rank {rank}" + (f", worker {worker}," if workers > 1 else "")
    hidden = (
        "in loader workers rank and worker are hidden, so it did so where it was built, or draws from a generator that "
        "isn't seeded alike"
        if workers
        else "it splits itself by rank, or draws from a generator that isn't seeded alike (data.num_workers: 1 reads it in "
        "a worker, where the rank is hidden)"
    )
    return (
        f"{slot}: {name} gives other samples on {who} than on rank 0: here every reader reads the whole stream and keeps "
        f"its part, and a split one would lose or repeat samples; {hidden}. Don't split it (webdataset: "
        f"nodesplitter=None, workersplitter=None; datasets: without split_dataset_by_node) or give it a method "
        f"shard(index, count); draw from torch, numpy or random, which are seeded for each sample"
    )


def _in_workers(look: _Look, workers: int, context: Any) -> list[dict[str, Any]]:
    loader: DataLoader[Any] = DataLoader(
        look, batch_size=None, sampler=range(workers), num_workers=workers, worker_init_fn=init_worker,
        multiprocessing_context=context, generator=torch.Generator().manual_seed(0), collate_fn=_keep,
    )  # fmt: skip
    with run_signals_blocked():
        iterator = iter(loader)
    try:
        return list(iterator)
    finally:
        stop_workers(iterator)


def _keep(value: Any) -> Any:
    return value


class _Content(pickle.Pickler):
    """Pickles tensors by what they hold, and nothing by which objects are the same one."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().resolve_conj().resolve_neg()
            flat = (
                value.contiguous().reshape(-1).view(torch.uint8) if value.layout == torch.strided else value.to_dense()
            )
            return str, (f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()}",)
        if isinstance(value, np.ndarray) and value.dtype != object:
            digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return str, (f"{value.dtype} {value.shape} {digest}",)
        return NotImplemented


def content_digest(sample: Any) -> str:
    """The same for equal samples in any process; of what can't be pickled, its type."""
    out = io.BytesIO()
    pickler = _Content(out, protocol=4)
    pickler.fast = True
    try:
        pickler.dump(sample)
    except Exception:
        return type(sample).__name__
    return hashlib.sha256(out.getvalue()).hexdigest()[:16]
