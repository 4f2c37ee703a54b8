"""One pass over a stream, or over a part of one: what an IterableDataset gives, read with seeds of its own."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from dist_train.data.errors import DataError, SampleError, dataset_name, told
from dist_train.runtime.seeding import seed_sample

# What the two parameters of a `shard` method are called: here, in Hugging Face's datasets, torchdata, tf.data, MONAI.
_INDEX = ("index", "shard_index", "shard_id", "shard", "instance_id", "worker_id", "worker", "rank", "idx", "i")
_COUNT = (
    "count",
    "num_shards",
    "shard_count",
    "num_of_instances",
    "num_workers",
    "num_replicas",
    "world_size",
    "total",
    "n",
)


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be iterated over; as torch's DataLoader, an IterableDataset is, whatever else it has.

    Hugging Face's IterableDataset has a `__getitem__` for its columns, and no length.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")


def stream_length(dataset: Any) -> int | None:
    """The length that a stream gives itself; None without one (some, as torch's ChainDataset, raise when asked)."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError, AssertionError):
        return None


def _names_of_shard(dataset: Any) -> tuple[str, str] | None:
    """What a dataset's `shard` method calls the part and the number of parts; None without such a method."""
    shard = getattr(dataset, "shard", None)
    if not callable(shard):
        return None
    names = list(inspect.signature(shard).parameters)
    index, count = next((n for n in _INDEX if n in names), None), next((n for n in _COUNT if n in names), None)
    if index is not None and count is not None:
        return index, count
    if len(names) < 2:
        return None  # something else
    raise DataError(
        f"{dataset_name(dataset)}.shard{inspect.signature(shard)}: which parameter is the number of the part, and which "
        f"the number of parts? Name them index and count, or index and num_shards"
    )


def shards_itself(dataset: Any) -> bool:
    """Whether a stream can give each reader a part of its own. Raises DataError where it isn't clear how."""
    return _names_of_shard(dataset) is not None


def part_of(dataset: Any, index: int, count: int) -> Any:
    """The part of a stream that reader `index` of `count` takes: `shard` changes the dataset, or returns another."""
    names = _names_of_shard(dataset)
    if names is None:
        return dataset
    part = dataset.shard(**{names[0]: index, names[1]: count})
    return dataset if part is None else part


class Pass:
    """One pass over a stream: an iterator whose k-th sample is read with the generators seeded by (seed, number, k).

    Args:
        dataset: the stream, or a part of one.
        seed: the run's seed.
        number: of the pass, from 0; `set_epoch(number)` tells the dataset, if it has that.
        lane: (index, count) of a part: the k-th sample of part i is seeded as sample k * count + i, but the first one in
            all parts alike, since there a generator shuffles what it then takes a part of.
        place: samples that are behind `state`, what the dataset's `state_dict` gave after them.
    """

    def __init__(
        self, dataset: Any, seed: int, number: int, lane: tuple[int, int] = (0, 1), *, place: int = 0, state: Any = None
    ) -> None:
        self.dataset, self.seed, self.number, self.lane, self.place = dataset, seed, number, lane, place
        if callable(getattr(dataset, "set_epoch", None)):
            dataset.set_epoch(number)
        if state is not None:
            dataset.load_state_dict(state)
        seed_sample(seed, number, -1)  # an __iter__ that isn't a generator may shuffle now
        self._iterator = iter(dataset)
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        index, count = self.lane
        seed_sample(self.seed, self.number, self.place * count + index if self.place else 0)
        try:
            sample = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        except (Exception, SystemExit) as error:
            where = f"sample {self.place} of pass {self.number} over {dataset_name(self.dataset)}"
            raise SampleError(f"reading {where} failed: {told(error)}") from error
        self.place += 1
        return sample

    def skip(self, samples: int) -> None:
        """Read so many samples and drop them; fewer where the pass ends."""
        for _ in itertools.islice(self, samples):
            pass
