"""What an IterableDataset (a stream) can do, and one pass over it or over a shard, read with seeds of its own."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from dist_train.data.errors import DataError, SampleError, dataset_name, describe_error
from dist_train.runtime.seeding import seed_sample

# Names of the two parameters of a `shard` method: here, in Hugging Face's datasets, torchdata, tf.data, MONAI.
_INDEX = ("index", "shard_index", "shard_id", "shard", "instance_id", "worker_id", "worker", "rank", "idx", "i")
_COUNT = (
    "count", "num_shards", "shard_count", "num_of_instances", "num_workers", "num_replicas", "world_size", "total", "n"
)  # fmt: skip

Shard = tuple[int, int]  # index and count
WHOLE: Shard = (0, 1)


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be iterated over; as for torch's DataLoader, an IterableDataset is, whatever else it has.

    Hugging Face's IterableDataset has a `__getitem__` for its columns, and no length.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")


def stream_length(dataset: Any) -> int | None:
    """The `len` of a stream; None without one (some raise when asked, as torch's ChainDataset)."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError, AssertionError):
        return None


def shard_parameters(dataset: Any) -> tuple[str, str] | None:
    """What a dataset's `shard` method calls the shard and the number of shards; None without such a method.

    Raises DataError for a `shard` method with unclear parameters.
    """
    shard = getattr(dataset, "shard", None)
    if not callable(shard):
        return None
    names = list(inspect.signature(shard).parameters)
    index, count = (next((n for n in known if n in names), None) for known in (_INDEX, _COUNT))
    if index is not None and count is not None:
        return index, count
    if len(names) < 2:
        return None  # something else
    raise DataError(
        f"{dataset_name(dataset)}.shard{inspect.signature(shard)}: which parameter is the number of the shard, and which "
        f"the number of shards? Name them index and count, or index and num_shards"
    )


def shard_of(dataset: Any, index: int, count: int) -> Any:
    """Shard `index` of `count` of a stream: `shard` changes the dataset, or returns another one."""
    names = shard_parameters(dataset)
    shard = None if names is None else dataset.shard(**dict(zip(names, (index, count))))
    return dataset if shard is None else shard


class Pass:
    """One pass over a stream: an iterator whose k-th sample is read with the generators seeded by (seed, number, k).

    Args:
        dataset: the stream, or a shard of one.
        number: of the pass, from 0; given to the dataset's `set_epoch`, if it has one.
        shard: (index, count): the k-th sample of shard i is seeded as sample k * count + i, but the first one with the
            same seed in all shards: a generator may shuffle its input on the first draw, before taking its shard.
        place: samples read before `state`, the dataset's `state_dict` after them.
    """

    def __init__(
        self, dataset: Any, seed: int, number: int, shard: Shard = WHOLE, *, place: int = 0, state: Any = None
    ) -> None:
        self.dataset, self.seed, self.number, self.shard, self.place = dataset, seed, number, shard, place
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
        index, count = self.shard
        seed_sample(self.seed, self.number, self.place * count + index if self.place else 0)
        try:
            sample = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        except (Exception, SystemExit) as error:
            where = f"sample {self.place} of pass {self.number} over {dataset_name(self.dataset)}"
            raise SampleError(f"reading {where} failed: {describe_error(error)}") from error
        self.place += 1
        return sample

    def skip(self, samples: int) -> None:
        """Read that many samples and drop them; fewer where the pass ends."""
        for _ in itertools.islice(self, samples):
            pass
