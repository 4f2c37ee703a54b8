"""IterableDataset behind the same requests as any other dataset: its stream is read forward to what is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import get_worker_info

from dist_train.data.deal import Deal
from dist_train.data.errors import DataError, dataset_name
from dist_train.data.hiding import hide_placement, worker_shown
from dist_train.data.passes import Pass, part_of
from dist_train.data.reading import Collate, Seeded
from dist_train.data.sampler import MicroBatch


class StreamReader(Seeded):
    """Fills in a `MicroBatch` from an IterableDataset, whose samples are numbered as they come.

    Nobody in a loader worker can see which one it is, or which rank (`hide_placement`): a stream that splits itself
    by them is whole then. Two ways of sharing it between ranks and workers:

    * by default each reader reads the whole stream and keeps what its requests name: exact over any number of either;
    * by a `Deal` each of its readers has a part of its own, `shard(index, count)` of the dataset.

    Args:
        dataset: the stream.
        seed: the run's seed.
        collate: list of samples -> batch; None is torch's `default_collate`.
        length: samples of an epoch, the unit of the requests' indices.
        rank: of this process.
        finite: a pass over the stream must have just `length` samples; otherwise it may end anywhere, and begins again.
        deal: who reads what of which part; None for reading all.

    Attributes:
        resumes: whether the dataset's own `state_dict` leads back to a place (see `survey`).
        steady: whether it gives the same samples when it is read again.
        saved: by reader, what `MicroBatch.state` held after the last sample of a committed step.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        collate: Collate | None,
        *,
        length: int,
        rank: int,
        finite: bool = False,
        deal: Deal | None = None,
    ) -> None:
        super().__init__(dataset, seed, collate)
        self.read = None
        self.whole = dataset
        self.length, self.rank, self.finite, self.deal = length, rank, finite, deal
        self.resumes, self.steady = False, True
        self.saved: dict[int, dict[str, Any]] = {}
        self._reader = 0
        self._pass: Pass | None = None
        self._next = 0  # the number of the sample that comes next; counted over all passes, of a part in its own
        self._spare: Iterator[Any] | None = None  # what other parts have too much, once this reader's has ended

    def notes(self) -> list[str]:
        """How the stream is read, for the person."""
        if self.deal is not None:
            uneven = "" if self.finite else "; a part that ends begins again, so equal parts should have equal sizes"
            return [
                f"each of {self.deal.readers} readers has a part of the stream of its own (shard), so the samples of a step "
                f"depend on their number{uneven}"
            ]
        how = "by the dataset's state_dict" if self.resumes else "by reading forward to the place"
        if not (self.resumes or self.steady):
            how += (
                "; but each reading of this one gives other samples, so that a start that goes on is refused or trains on some "
                "twice (draw from torch, numpy or random, which are seeded)"
            )
        return [
            f"an IterableDataset is not shuffled here; every rank and worker reads the whole stream and keeps its part "
            f"(a method shard(index, count) gives each its own); resuming goes on {how}"
        ]

    def rewind(self) -> None:
        """Read from the place of the last committed sample when the next request comes."""
        self._pass, self._next = None, 0

    def keep(self, micro: MicroBatch) -> None:
        """In the main process: a micro-batch was taken."""
        if micro.state is not None and not micro.zero_weight:
            self.saved[micro.state["reader"]] = micro.state

    def __getitems__(self, request: MicroBatch) -> MicroBatch:
        """Called once per micro-batch by torch's DataLoader, with what the batch sampler yielded."""
        if not len(request.indices):
            return request  # see `Deal.rest`
        if self._pass is None:
            self._begin(request)
        batch = super().__getitems__(request)
        state = self._state() if self.resumes or self.deal is not None else None
        self._at_end()  # raises now, not in an epoch that may never come
        return batch._replace(state=state)

    def collated(self, samples: list[Any]) -> Any:
        """The batch; torch's default_collate puts it into shared memory where it sees that it runs in a worker."""
        with worker_shown():
            return self.collate(samples)

    def samples(self, request: MicroBatch) -> list[Any]:
        """The samples of a request; requests that come in order are read in one go."""
        if self.deal is not None:
            return self._dealt(self.deal, request)
        samples = []
        for index in request.indices.tolist():
            self._go_to(max(0, request.epoch) * self.length + index)
            samples.append(self._advance())
        return samples

    def _begin(self, request: MicroBatch) -> None:
        """The first request: hide, and go to the place where the last start has ended."""
        info = get_worker_info()
        worker = info.id if info is not None else 0
        if info is not None:
            hide_placement()
        if self.deal is not None:
            self._reader = self.rank * self.deal.workers + worker
            self._begin_part(self.deal, request)
            return
        self.dataset = part_of(self.whole, 0, 1)
        saved = self.saved.get(0)
        if saved is not None and saved["next"] <= max(0, request.epoch) * self.length + int(request.indices[0]):
            self._restore(saved)
        else:
            self._open(0)

    def _restore(self, saved: dict[str, Any]) -> None:
        self._next = saved["next"]
        if self.resumes and saved["state"] is not None:
            self._open(saved["pass"], place=saved["place"], state=saved["state"])
            return
        self._open(saved["pass"])
        self._opened().skip(saved["place"])

    def _state(self) -> dict[str, Any]:
        here = self._opened()
        state = self.dataset.state_dict() if self.resumes else None
        return {"reader": self._reader, "next": self._next, "pass": here.number, "place": here.place, "state": state}

    def _at_end(self) -> bool:
        """Whether the pass has given all its samples. Raises DataError where more come."""
        now = self._opened()
        if not self.finite or self.deal is not None or now.place < self.length:
            return False
        if next(now, self) is not self:
            raise DataError(self._wrong_length(f"more than {self.length}"))
        return True

    def _open(self, number: int, **given: Any) -> None:
        lane = (0, 1) if self.deal is None else (self._reader, self.deal.readers)
        self._pass, self._spare = Pass(self.dataset, self.seed, number, lane, **given), None

    def _opened(self) -> Pass:
        assert self._pass is not None
        return self._pass

    def _go_to(self, number: int) -> None:
        if number < self._next:  # another evaluation
            self._next = 0
            self._open(0)
        while self._next < number:
            self._advance()

    def _advance(self) -> Any:
        """The next sample, of the next pass where this one has ended."""
        while True:
            now = self._opened()
            if self._at_end():
                self._open(now.number + 1)
                continue
            try:
                sample = next(now)
            except StopIteration:
                if now.place == 0:
                    name = dataset_name(self.dataset)
                    raise DataError(f"{name}: pass {now.number} over the stream gave no sample") from None
                if self.finite and self.deal is None and now.place < self.length:
                    raise DataError(self._wrong_length(str(now.place))) from None
                self._open(now.number + 1)
                continue
            self._next += 1
            return sample

    def _wrong_length(self, found: str) -> str:
        return (
            f"{dataset_name(self.dataset)}: its __len__ says {self.length} samples, but a pass over the stream gave "
            f"{found}; mend __len__, or leave it out (training then needs data.steps_per_epoch)"
        )

    # A part each.

    def _begin_part(self, deal: Deal, request: MicroBatch) -> None:
        self.dataset = deal.part(self.whole, self._reader)
        saved, asked = self.saved.get(self._reader), deal.asked(self._reader, request.step, self.finite)
        if saved is not None and saved["next"] == asked and (not self.finite or saved["pass"] == request.epoch):
            self._restore(saved)
            return
        self._open(max(0, request.epoch) if self.finite else 0)
        for _ in range(asked):
            self._deal_one(deal, request.epoch)

    def _dealt(self, deal: Deal, request: MicroBatch) -> list[Any]:
        if request.zero_weight:  # it only fills the forward: a sample of the part must not be lost to it
            spare = Pass(deal.part(self.whole, 0, 1), self.seed, 0)
            return list(itertools.islice(itertools.cycle(itertools.islice(spare, 2)), len(request.indices)))
        if self.finite and self._opened().number != request.epoch:
            self._next = 0
            self._open(request.epoch)
        return [self._deal_one(deal, request.epoch) for _ in request.indices]

    def _deal_one(self, deal: Deal, epoch: int) -> Any:
        if not self.finite:
            return self._advance()
        if self._spare is None:
            sample = next(self._opened(), self)
            if sample is not self:
                self._next += 1
                return sample
            taken = self._next - self._opened().place  # by a start before this one
            self._spare = deal.left_over(self.whole, self._reader, self.seed, epoch, taken)
        for sample in self._spare:
            self._next += 1
            return sample
        raise DataError(self._wrong_length("fewer"))
