"""Loader workers: how many, and how to start and stop them so that no signal meant for the run kills one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from dist_train.data.reading import Collate, batch_reader
from dist_train.data.stream import is_stream, shards_itself
from dist_train.runtime.world import usable_cpus

# Sent to whole process groups by terminals, torchrun and Slurm, to ask for a clean stop. A worker that died of one
# would take the batch with it that the last save waits for.
RUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_STOP_GRACE = 3.0  # seconds for a worker to finish the sample that it is reading
_MOST_WORKERS = 8  # per rank, when chosen here: beyond that the parent process is the limit, not the reading


def resolve_workers(setting: int | str, dataset: Any, *, collate: Collate | None = None, local_ranks: int = 1) -> int:
    """Worker processes for one rank: the number that was asked for, or for "auto" a fair share of this node's CPUs.

    "auto" is 0 for datasets that read whole batches (a worker would only add copying) and where a rank has less than
    three CPUs (workers would take turns with the training process); 1 for streams of which every worker reads all.
    """
    if setting != "auto":
        return int(setting)
    mine = usable_cpus() // max(1, local_ranks)
    if mine < 3 or (collate is None and batch_reader(dataset) is not None):
        return 0
    if is_stream(dataset) and not shards_itself(dataset):
        return 1
    return min(mine - 1, _MOST_WORKERS)


@contextlib.contextmanager
def run_signals_blocked() -> Iterator[None]:
    """Processes started inside are born with the run's signals blocked, by fork, spawn and forkserver alike.

    Blocking them in `worker_init_fn` would be too late under spawn, whose child imports torch for seconds before.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        # Starting the resource tracker unblocks SIGINT and SIGTERM in the caller (CPython), so it is started first;
        # under the block, since it ignores only those two and would die of the others.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """The `worker_init_fn`: the run's signals stay blocked, and the worker ends when its parent does.

    torch's own watch compares parent process ids, which misses a parent that died while the worker was starting, any
    parent behind a fork server, and all of them during a long read.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)  # as they are, unless a fork server was running before
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()  # waits on a pipe that the kernel closes, whatever the parent died of
    os._exit(1)


def stop_workers(iterator: Any) -> None:
    """End the workers of a DataLoader iterator now: asked first, killed after three seconds."""
    workers: list[multiprocessing.process.BaseProcess] = list(getattr(iterator, "_workers", []))
    if not workers:
        return

    def kill() -> None:
        for worker in workers:
            worker.kill()

    timer = threading.Timer(_STOP_GRACE, kill)
    timer.daemon = True
    timer.start()
    with contextlib.suppress(RuntimeError):  # which torch's SIGCHLD handler makes of a worker that was killed
        iterator._shutdown_workers()
    timer.cancel()
    kill()
    for worker in workers:
        worker.join()
