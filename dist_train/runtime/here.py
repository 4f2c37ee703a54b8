"""Where the main thread of this process stands: plain attributes that it writes, and that another thread reads.

Writing them costs an attribute each; nothing is locked and nobody is told. `runtime.peers` looks about twice a second.
"""

from __future__ import annotations

STARTING = "starting"
DATA = "waiting for data"
FORWARD = "forward"
BACKWARD = "backward and reduction"
UPDATE = "update"
CALLBACK = "callback"
LOG = "logging"
EVALUATION = "evaluation"
SAVING = "saving"
MEETING = "waiting for the other ranks"
DONE = "done"
CONFIG = "wrong config"

# Within a step every rank comes through these in this order, so the rank whose (step, phase) is least is the one behind.
ORDER = (STARTING, DATA, FORWARD, BACKWARD, UPDATE, LOG, CALLBACK, EVALUATION, SAVING, MEETING, DONE, CONFIG)


class Here:
    """What this process is doing.

    Attributes:
        phase: one of `ORDER`. step: the optimizer step (from 1) that it belongs to; 0 before the first.
        item: micro-batches and evaluation rounds begun; together with `bytes` it tells slow from stuck.
        bytes: bytes written to storage, by any thread.
        began: `time.perf_counter()` when this step began. busy: seconds from there to the last backward, over all steps: a
            rank's own time, before it waits for the others (on CUDA: until its kernels are queued).
        waited: seconds that the main thread has waited for data.
        steps: optimizer steps that `busy` and `waited` are sums over.
    """

    def __init__(self) -> None:
        self.phase = STARTING
        self.step = 0
        self.item = 0
        self.bytes = 0
        self.began = 0.0
        self.busy = 0.0
        self.waited = 0.0
        self.steps = 0

    def reset(self) -> None:
        """Begin anew; a notebook may train twice."""
        self.__init__()  # type: ignore[misc]

    def position(self) -> list[object]:
        """What changes while anything moves."""
        return [self.step, self.phase, self.item, self.bytes]


here = Here()
