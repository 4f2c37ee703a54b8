"""What the main thread of this process is doing: plain attributes that it writes and other threads and processes read.

They live in shared memory that the kernel keeps for as long as anybody maps it, so another process on this machine can read
the last position of one that was killed. Writing an attribute costs about 40 ns and takes no lock; `watch.peers` reads twice
a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

# Within a step every rank goes through these in this order, so the rank with the lowest (step, phase) is the one behind.
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
    "invalid config",
    "stopped before the run started",
)
STARTING, DATA, FORWARD, BACKWARD, UPDATE, LOGGING, CALLBACK, EVALUATION, SAVING, SYNC, *_ = range(len(PHASES))
DONE, CONFIG, STOPPED = range(SYNC + 1, len(PHASES))


class Status(ctypes.Structure):
    """What a process is doing.

    Attributes:
        phase: index into `PHASES`. step: the current optimizer step (from 1); 0 before the first.
        item: micro-batches and evaluation rounds started; with `bytes`, it distinguishes slow from stuck.
        bytes: bytes written to storage, by any thread.
        steps: optimizer steps that `busy` and `waited` are summed over.
        began: `time.perf_counter()` at the start of this step.
        busy: seconds from there to the last backward: a rank's own time, before it waits for the others (on CUDA: until its
            kernels are queued).
        waited: seconds that the main thread has waited for data.
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
        """Set everything to 0: a notebook may train twice."""
        ctypes.memset(ctypes.addressof(self), 0, ctypes.sizeof(self))

    def progress(self) -> list[int]:
        """The values that change while there is progress."""
        return [self.step, self.phase, self.item, self.bytes]


status = Status()
status_fd: int | None = None
with contextlib.suppress(OSError, AttributeError):  # memfd_create exists on Linux only
    _fd = os.memfd_create("dist_train-status")
    os.ftruncate(_fd, ctypes.sizeof(Status))
    status, status_fd = Status.from_buffer(mmap.mmap(_fd, ctypes.sizeof(Status))), _fd


def status_of(pid: int, fd: int | None) -> Status | None:
    """The status of a running process on this machine, from its `status_fd`; it stays readable after that process exits."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/fd/{fd}", "r+b", buffering=0) as file:
        return Status.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(Status)))
    return None
