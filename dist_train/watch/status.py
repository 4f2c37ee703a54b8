"""Where the main thread of this process stands: plain attributes that it writes, and that others read.

They lie in memory that the kernel keeps for as long as anybody looks at it, so that another process of the same machine sees
where this one stood when it was killed. Writing an attribute costs some 40 ns; nothing is locked and nobody is told.
`runtime.peers` looks about twice a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

# Within a step every rank comes through these in this order, so the rank whose (step, phase) is least is the one behind.
PHASES = (
    "starting",
    "waiting for data",
    "forward",
    "backward and reduction",
    "update",
    "logging",
    "callback",
    "evaluation",
    "saving",
    "waiting for the other ranks",
    "done",
    "wrong config",
    "stopped before the run had begun",
)
STARTING, DATA, FORWARD, BACKWARD, UPDATE, LOGGING, CALLBACK, EVALUATION, SAVING, MEETING, DONE, CONFIG, STOPPED = (
    range(13)
)


class Here(ctypes.Structure):
    """What a process is doing.

    Attributes:
        phase: a number that names one of `PHASES`. step: the optimizer step (from 1) that it belongs to; 0 before the first.
        item: micro-batches and evaluation rounds begun; together with `bytes` it tells slow from stuck.
        bytes: bytes written to storage, by any thread.
        began: `time.perf_counter()` when this step began. busy: seconds from there to the last backward, over all steps: a
            rank's own time, before it waits for the others (on CUDA: until its kernels are queued).
        waited: seconds that the main thread has waited for data.
        steps: optimizer steps that `busy` and `waited` are sums over.
    """

    _fields_ = [(name, ctypes.c_int64) for name in ("phase", "step", "item", "bytes", "steps")] + [
        (name, ctypes.c_double) for name in ("began", "busy", "waited")
    ]
    phase: int
    step: int
    item: int
    bytes: int
    steps: int
    began: float
    busy: float
    waited: float

    def reset(self) -> None:
        """Begin anew; a notebook may train twice."""
        ctypes.memset(ctypes.addressof(self), 0, ctypes.sizeof(self))

    def position(self) -> list[int]:
        """What changes while anything moves."""
        return [self.step, self.phase, self.item, self.bytes]


def _make() -> tuple[Here, int | None]:
    with contextlib.suppress(OSError, AttributeError):  # memfd_create is Linux's
        number = os.memfd_create("dist_train-here")
        os.ftruncate(number, ctypes.sizeof(Here))
        return Here.from_buffer(mmap.mmap(number, ctypes.sizeof(Here))), number
    return Here(), None


here, descriptor = _make()


def of_process(pid: int, number: int | None) -> Here | None:
    """The `here` of a living process of this machine, from its `descriptor`; it can be read after that process has gone."""
    if number is None:
        return None
    try:
        other = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        try:
            return Here.from_buffer(mmap.mmap(other, ctypes.sizeof(Here)))
        finally:
            os.close(other)
    except (OSError, ValueError):
        return None
