"""The first step and the first tensors at which the digests of two runs, or of the ranks of one, part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dist_train.tracking.digests import Digests

_SHOWN = 5  # tensors


@dataclass(frozen=True)
class Parting:
    """`step` (from 1), `where` in a few words, and `details`, a line each."""

    step: int
    where: str
    details: list[str]


def common_steps(one: Mapping[int, Digests], other: Mapping[int, Digests]) -> list[int]:
    """The steps of which rank 0 of both runs has digests."""
    if 0 not in one or 0 not in other:
        return []
    steps: list[int] = np.intersect1d(one[0].steps, other[0].steps).tolist()
    return steps


def parting(one: Mapping[int, Digests], other: Mapping[int, Digests]) -> Parting | None:
    """Where two runs part, each rank compared with the same rank of the other; None if they don't."""
    ranks = sorted(one.keys() & other.keys())
    pairs = {rank: _Pair(one[rank], other[rank]) for rank in ranks}
    return _first(pairs, " (each rank against the same rank)" if len(ranks) > 1 else "")


def disagreement(ranks: Mapping[int, Digests], *, buffers: bool) -> Parting | None:
    """Where the ranks of one run part, which must have the same loss, gradients and weights; None if they don't.

    `buffers`: they must be the same too. (BatchNorm's statistics are each rank's own otherwise, as in any DDP loop.)
    """
    if 0 not in ranks:
        return None
    skipped = () if buffers else ("buffer ",)
    pairs = {rank: _Pair(ranks[0], digests, skipped) for rank, digests in ranks.items() if rank}
    return _first(pairs, " (against rank 0)")


class _Pair:
    """Two ranks' digests, at the steps that both have."""

    def __init__(self, one: Digests, other: Digests, skipped: tuple[str, ...] = ()):
        self.steps, mine, theirs = np.intersect1d(one.steps, other.steps, assume_unique=True, return_indices=True)
        names = [name for name in dict.fromkeys((*one.names, *other.names)) if not name.startswith(skipped or ("\0",))]
        self.names = sorted(names, key=_order)
        self._mine, self._theirs = _Columns(one, mine), _Columns(other, theirs)
        wrong = np.zeros(len(self.steps), bool)
        for name in self.names:
            wrong |= self._mine[name] != self._theirs[name]
        self.first = int(self.steps[wrong][0]) if wrong.any() else None

    def at(self, step: int) -> list[str]:
        """The tensors that differ at a step, in words."""
        place = int(np.searchsorted(self.steps, step))
        if place == len(self.steps) or self.steps[place] != step:
            return []
        found = []
        for name in self.names:
            values = self._mine[name][place], self._theirs[name][place]
            if values[0] != values[1]:
                found.append(_words(name) + ("" if all(values) else " (in one of them only)"))
        return found

    def count(self, step: int) -> int:
        """How many tensors have a value at a step, in one of them at least."""
        place = int(np.searchsorted(self.steps, step))
        return sum(bool(self._mine[name][place] or self._theirs[name][place]) for name in self.names)


class _Columns:
    """The digests of a tensor, by its name, in chosen rows; zeros for a name that isn't there."""

    def __init__(self, digests: Digests, rows: np.ndarray):
        self._values, self._rows = digests.values, rows
        self._places = {name: place for place, name in enumerate(digests.names)}

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places.get(name)
        return np.zeros(len(self._rows), np.uint64) if place is None else self._values[self._rows, place]


def _first(pairs: Mapping[int, _Pair], against: str) -> Parting | None:
    """The first step at which one of the pairs differs, by rank."""
    step = min((pair.first for pair in pairs.values() if pair.first is not None), default=None)
    if step is None:
        return None
    differing = {rank: found for rank, pair in pairs.items() if (found := pair.at(step))}
    there = next(iter(differing))
    found, before = differing[there], int((pairs[there].steps < step).sum())
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    ranks = f"rank{'s' * (len(differing) > 1)} {', '.join(map(str, differing))}{against}"
    return Parting(
        step,
        found[0],
        [
            f"{len(found):,} of {pairs[there].count(step):,} tensors differ at this step: {', '.join(found[:_SHOWN])}{more}",
            f"on {ranks}",
            f"equal in the {before:,} step{'s' * (before != 1)} before it that both have"
            if before
            else "it is the first step that both have",
        ],
    )


def _order(name: str) -> int:
    """In a step the loss comes first, then gradients, then what the update has made of the weights."""
    kinds: Sequence[str] = ("loss", "gradient", "weight", "buffer")
    kind = name.partition(" ")[0]
    return kinds.index(kind) if kind in kinds else len(kinds)


def _words(name: str) -> str:
    """`the gradient of 0.weight` of `gradient 0.weight`."""
    kind, _, rest = name.partition(" ")
    return f"the gradient of {rest}" if kind == "gradient" else f"the {name}"
