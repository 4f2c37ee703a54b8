"""Loader workers: how many, how they start and stop so that no signal meant for the run kills one, what is hidden from them."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import context, popen_fork, queues, resource_tracker
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data._utils import worker as torch_worker

from dist_train.data.errors import DataError, resource_hint
from dist_train.data.reading import Collate, batch_reader
from dist_train.data.stream import is_stream, shard_parameters
from dist_train.runtime.world import usable_cpus

# Sent to entire process groups by terminals, torchrun and Slurm, to ask for a clean stop. A worker killed by one would
# lose the batch that the last save needs.
RUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_STOP_GRACE = 3.0  # seconds for a worker to finish the sample that it is reading
_MOST_WORKERS = 8  # per rank, when chosen here: beyond that the parent process is the limit, not the reading


def resolve_workers(setting: int | str, dataset: Any, *, collate: Collate | None = None, local_ranks: int = 1) -> int:
    """Worker processes for one rank: the number that was asked for, or for "auto" a fair share of this node's CPUs.

    "auto" is 0 for datasets that read whole batches (a worker would only add copying) and where a rank has less than
    three CPUs (workers would compete with the training process); 1 for streams of which every worker reads all.
    """
    cpus = usable_cpus() // max(1, local_ranks)
    if setting != "auto":
        most = max(64, 16 * cpus)
        if int(setting) > most:
            raise DataError(
                f"data.num_workers: expected at most {most} (16 for each of the {max(1, cpus)} CPUs that a rank has here, or "
                f"64), found {setting}: each is a process that imports torch; auto chooses by the CPUs"
            )
        return int(setting)
    if cpus < 3 or (collate is None and batch_reader(dataset) is not None):
        return 0
    if is_stream(dataset) and not shard_parameters(dataset):
        return 1
    return min(cpus - 1, _MOST_WORKERS)


# --- starting --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_signals_blocked() -> Iterator[None]:
    """Processes started inside start with the run's signals blocked, by fork, spawn and forkserver alike.

    Blocking them in `worker_init_fn` would be too late under spawn, whose child imports torch for seconds before.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        # Starting the resource tracker unblocks SIGINT and SIGTERM in the caller (CPython), so it is started first;
        # under the block, since it ignores only those two and would be killed by the others.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Before 3.11.8 a forked child deadlocks on a lock of CPython's if a C thread was just entering or leaving Python (its issue
# 112275; 7 of 3,000 forks hung while C threads did so 18,000 times a second).
_FORKS_MAY_HANG = sys.version_info < (3, 11, 8)
_START_SECONDS = 5.0


def context_for(method: str) -> context.BaseContext:
    """What a DataLoader takes as `multiprocessing_context` for `data.worker_start_method`."""
    made: Any = type(multiprocessing.get_context(None if method == "auto" else method))()
    made.Queue = partial(_ReportingQueue, ctx=made)
    if _FORKS_MAY_HANG and made.get_start_method() == "fork":
        made.Process = _ConfirmedProcess
    return made  # type: ignore[no-any-return]


class _ReportingQueue(queues.Queue):  # type: ignore[type-arg]  # not subscriptable when it runs
    """A queue that reports what it couldn't send: multiprocessing's only prints it, and the reader waits forever."""

    def _on_queue_feeder_error(self, error: BaseException, item: Any) -> None:
        failed = DataError(
            f"a loader worker couldn't send a batch: {type(error).__name__}: {error}{resource_hint(error)}"
        )
        # torch's worker puts (number of the batch, batch)
        self.put((item[0], ExceptionWrapper((type(failed), failed, None), where="in a loader worker")))


class _ConfirmedProcess(context.ForkProcess):
    """A forked process that is forked again when its interpreter doesn't run within 5 s."""

    @staticmethod
    def _Popen(process: Any) -> Any:  # noqa: N802
        patience = _START_SECONDS
        while True:
            reader, process.started_fd = os.pipe()
            child = popen_fork.Popen(process)  # the child doesn't return
            os.close(process.started_fd)
            runs = select.select([reader], [], [], patience)[0]
            os.close(reader)
            if runs:
                return child
            child.kill()
            child.wait()
            child.close()
            patience *= 2

    def _bootstrap(self, parent_sentinel: Any = None) -> Any:
        os.write(self.started_fd, b"1")  # type: ignore[attr-defined]
        return super()._bootstrap(parent_sentinel)  # type: ignore[misc]


def init_worker(worker: int) -> None:
    """The `worker_init_fn`: the run's signals stay blocked, and the worker ends when its parent does.

    torch's own watch compares parent process ids, which misses a parent that died while the worker was starting, any
    parent behind a fork server, and all of them during a long read.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)  # as they are, unless a fork server was running before
    gc.freeze()  # the parent's objects are no garbage, and inspecting them would copy their memory
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()  # waits on a pipe that the kernel closes, however the parent ended
    os._exit(1)


# --- ending ----------------------------------------------------------------------------------------------------------


def exit_causes(iterator: Any) -> str:
    """`pid 12 was killed by SIGKILL`, of the workers of a DataLoader iterator that ended within a second; "" if none did."""
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        with contextlib.suppress(RuntimeError):  # raised anywhere by torch's SIGCHLD handler after a worker was killed
            if ended := [(w.pid, w.exitcode) for w in iterator._workers if w.exitcode is not None]:
                return ", ".join(
                    f"pid {pid} was killed by {signal.Signals(-code).name}"
                    if code < 0
                    else f"pid {pid} exited with code {code}"
                    for pid, code in ended
                )
            time.sleep(0.02)
    return ""


def stop_workers(iterator: Any) -> None:
    """End the workers of a DataLoader iterator now: asked first, killed after three seconds."""
    workers: list[multiprocessing.process.BaseProcess] = list(getattr(iterator, "_workers", []))
    while workers:
        with contextlib.suppress(RuntimeError):  # as in `exit_causes`, at most once per loader, so retry
            _stop(iterator, workers)
            return


def _stop(iterator: Any, workers: list[multiprocessing.process.BaseProcess]) -> None:
    def kill() -> None:
        for worker in workers:
            worker.kill()

    timer = threading.Timer(_STOP_GRACE, kill)
    timer.daemon = True
    timer.start()
    try:
        iterator._shutdown_workers()
    finally:
        timer.cancel()
        kill()
    for worker in workers:
        worker.join()


# --- what is hidden from them ----------------------------------------------------------------------------------------

# Variables in which launchers (torchrun, accelerate, Slurm, MPI) and webdataset pass ranks and world sizes.
_PLACEMENT = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "NODE_RANK", "WORKER", "NUM_WORKERS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS",
    "SLURM_STEP_NUM_TASKS",
}  # fmt: skip
_PLACEMENT_PREFIXES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MV2_COMM_WORLD_")

_hidden: Any = None  # what get_worker_info gave before


def hide_rank() -> None:
    """Hide worker and rank for the rest of this process, so that no stream splits itself by them.

    That is `get_worker_info`, the launcher's variables and `torch.distributed`.
    """
    global _hidden
    _hidden = _hidden or torch_worker._worker_info
    torch_worker._worker_info = None
    for name in [name for name in os.environ if name in _PLACEMENT or name.startswith(_PLACEMENT_PREFIXES)]:
        del os.environ[name]
    if torch.distributed.is_available():
        torch.distributed.GroupMember.WORLD = None  # inherited by fork, and of no use here


@contextlib.contextmanager
def worker_visible() -> Iterator[None]:
    """`get_worker_info` as torch has set it."""
    hidden, torch_worker._worker_info = torch_worker._worker_info, torch_worker._worker_info or _hidden
    try:
        yield
    finally:
        torch_worker._worker_info = hidden
