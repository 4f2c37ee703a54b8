"""How fast each rank is by itself, before it waits for the others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

IN_A_ROW = 5  # log intervals that find the same rank slow
SLOW = 1.5  # times the median
NOTICEABLE = 0.01  # seconds per step


class Pace:
    """Seconds per step of each rank: its own time until its gradients are ready, and of that the wait for data.

    One thread calls `update`, another asks; nothing is locked, and an answer may be one heartbeat old.
    """

    def __init__(self, size: int):
        self.size = size
        self._known: dict[int, tuple[float, float]] = {}
        self._candidate, self._times = -1, 0
        self._reported: set[int] = set()

    def update(self, rank: int, sums: Sequence[float], before: Sequence[float]) -> None:
        """Two readings of a rank's (steps, own seconds, seconds of waiting for data), each a sum since its start."""
        if sums[0] > before[0]:
            steps, own, waited = (new - old for new, old in zip(sums, before, strict=True))
            self._known[rank] = (own / steps, waited / steps)

    def spread(self) -> dict[str, float]:
        """Minimum and maximum over all ranks; {} until every rank has been heard, and with one process."""
        known = list(self._known.values())
        if len(known) < self.size or self.size == 1:
            return {}
        columns = zip(("step_s", "data_wait_s"), zip(*known, strict=True), strict=True)
        return {f"{name}_{of.__name__}": of(column) for name, column in columns for of in (min, max)}

    def slow(self) -> tuple[int | None, str]:
        """A rank that was slow at the last few calls, and how slow; each rank is reported once."""
        known = dict(self._known)
        if not self.spread():
            return None, ""
        usual = statistics.median_low(own for own, _ in known.values())
        rank, (own, waited) = max(known.items(), key=lambda item: item[1][0])
        slow = own > SLOW * usual and own - usual > NOTICEABLE
        self._times = 0 if not slow else self._times + 1 if rank == self._candidate else 1
        self._candidate = rank
        if self._times < IN_A_ROW or rank in self._reported:
            return None, ""
        self._reported.add(rank)
        return rank, (
            f"{own * 1e3:.0f} ms per step until its gradients are ready ({waited * 1e3:.0f} ms of it waiting for data), "
            f"{usual * 1e3:.0f} ms on the others, which wait for it"
        )
