"""Samples of training that couldn't be read, and were replaced (`data.on_error: skip`)."""

from __future__ import annotations

import logging

log = logging.getLogger("dist_train")

MOST_NAMED = 10  # in the log of a rank


class Skipped:
    """Counts those of a rank, and names the first ones in its log."""

    def __init__(self) -> None:
        self._count = self._named = 0

    def add(self, skipped: tuple[tuple[int, str], ...]) -> None:
        """Those of a micro-batch (`MicroBatch.skipped`)."""
        for _, error in skipped[: max(0, MOST_NAMED - self._named)]:
            log.warning("data.on_error=skip: %s", error)
        self._named += len(skipped)
        self._count += len(skipped)

    def take(self) -> int:
        """How many since the last call."""
        count, self._count = self._count, 0
        return count
