"""IterableDataset behind the same requests as any other dataset: its stream is read forward to what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from dist_train.data.errors import DataError, SampleError
from dist_train.data.reading import Collate, Seeded, dataset_name, told
from dist_train.data.sampler import MicroBatch
from dist_train.runtime.seeding import seed_sample


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be iterated over."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def shards_itself(dataset: Any) -> bool:
    """Whether each reader of a stream gets a part of its own from it."""
    return callable(getattr(dataset, "shard", None))


def stream_notes(dataset: Any) -> list[str]:
    """What a stream can't promise, to be said at the start of a run."""
    if shards_itself(dataset):
        return [
            "the dataset shards its own stream: the samples of a step depend on the number of ranks and workers, and a "
            "resumed run begins its current pass anew"
        ]
    return [
        "an IterableDataset is not shuffled here; every rank and worker reads the whole stream and keeps its part, and "
        "resuming reads forward to the place (give it a method shard(index, count) to read a part only)"
    ]


class StreamReader(Seeded):
    """Fills in a `MicroBatch` from an IterableDataset, whose samples are numbered as they come.

    The stream is taken to be endless: when it ends it is iterated over again, after `set_epoch(pass)` if the dataset
    has that. Sample k is read with torch, numpy and `random` seeded by (seed, pass, place in the pass), so that the
    same numbers are drawn by every reader. Two ways of sharing it between ranks and workers:

    * by default each reads the whole stream and keeps what its requests name: exact over any number of either;
    * a dataset with a method `shard(index, count)`, called once in each of `count` readers before iterating, gives
      only its part, and requests are answered with what comes next.

    Args:
        dataset: the stream.
        seed: the run's seed.
        collate: list of samples -> batch; None is torch's `default_collate`.
        length: samples of an epoch, the unit of the requests' indices.
        rank, world_size: of this process.
        exact: read the whole stream also where the dataset could shard it, as evaluation must.
    """

    def __init__(
        self, dataset: Any, seed: int, collate: Collate | None, *, length: int, rank: int, world_size: int, exact: bool
    ) -> None:
        super().__init__(dataset, seed, collate)
        self.read = None
        self.length, self.rank, self.world_size = length, rank, world_size
        self.sharded = not exact and shards_itself(dataset)
        self._iterator: Iterator[Any] | None = None
        self._pass, self._place = 0, 0  # of the sample that comes next
        self._next = 0  # its number, counted over all passes

    def samples(self, request: MicroBatch) -> list[Any]:
        """The samples of a request; requests that come in order are read in one go."""
        if self._iterator is None:
            self._begin(request)
        samples = []
        for index in request.indices.tolist():
            if not self.sharded:
                self._go_to(max(0, request.epoch) * self.length + index)
            samples.append(self._advance())
        return samples

    def _begin(self, request: MicroBatch) -> None:
        if self.sharded:
            worker = get_worker_info()
            count, mine = (worker.num_workers, worker.id) if worker is not None else (1, 0)
            self.dataset.shard(self.rank * count + mine, self.world_size * count)
            self._pass = max(0, request.epoch)
        elif shards_itself(self.dataset):
            self.dataset.shard(0, 1)
        self._open()

    def _go_to(self, number: int) -> None:
        if number < self._next:  # another evaluation, or another start
            self._pass, self._next = 0, 0
            self._open()
        while self._next < number:
            self._advance()

    def _open(self) -> None:
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(self._pass)
        self._place = 0
        seed_sample(self.seed, self._pass, -1)  # an __iter__ that isn't a generator may shuffle now
        self._iterator = iter(self.dataset)

    def _advance(self) -> Any:
        while True:
            assert self._iterator is not None
            seed_sample(self.seed, self._pass, self._place)
            try:
                sample = next(self._iterator)
            except StopIteration:
                if self._place == 0:
                    name = dataset_name(self.dataset)
                    raise DataError(f"{name}: pass {self._pass} over the stream gave no sample") from None
                self._pass += 1
                self._open()
                continue
            except Exception as error:
                where = f"sample {self._place} of pass {self._pass} over {dataset_name(self.dataset)}"
                raise SampleError(f"reading {where} failed: {told(error)}") from error
            self._place += 1
            self._next += 1
            return sample
