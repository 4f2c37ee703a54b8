"""What the ranks post about themselves, and what one knows of another from it."""

from __future__ import annotations

import time
from typing import Any

from dist_train.watch.failure import standing
from dist_train.watch.processes import machine, process_state
from dist_train.watch.status import status, status_fd, status_of


def heartbeat(rank: int) -> dict[str, Any]:
    """Who this rank is, where it stands, how far it has come, and how long its steps have taken."""
    return {
        **standing(rank),
        "n": time.monotonic(),
        "machine": machine(),
        "status_fd": status_fd,
        "progress": status.progress(),
        "sums": [status.steps, status.busy, status.waited],
    }


class Seat:
    """What a rank has posted last.

    Attributes:
        heard, moved: since when, by this rank's clock, its heartbeat and its position are what they are.
        near: whether it runs on this machine, so that its process can be looked up.
    """

    def __init__(self, beat: dict[str, Any]):
        self.beat, self.heard, self.moved = beat, time.monotonic(), time.monotonic()
        self.near = beat["machine"] == machine()
        self._memory = status_of(beat["pid"], beat["status_fd"]) if self.near else None

    def hear(self, beat: dict[str, Any]) -> None:
        """Take its next heartbeat, or the same one again."""
        now = time.monotonic()
        self.heard = now if beat["n"] != self.beat["n"] else self.heard
        self.moved = now if beat["progress"] != self.beat["progress"] else self.moved
        self.beat = beat

    def stands(self) -> dict[str, Any]:
        """Where it stands: on this machine to the moment, even when it is gone; else as of its last heartbeat."""
        memory = self._memory
        return self.beat if memory is None else {**self.beat, "phase": memory.phase, "step": memory.step}

    def silence(self) -> float:
        """Seconds without a new heartbeat."""
        return time.monotonic() - self.heard

    def state(self) -> str:
        """Its process: `running`, `stopped` or `gone`; `out of sight` on another machine."""
        return process_state(self.beat["pid"]) if self.near else "out of sight"
