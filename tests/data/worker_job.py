"""A process with loader workers, for test_workers: reads 40 steps and says what happens; run as a script.

Arguments: start method, and what to do: read | hang (in a sample) | leave (without closing) | bare (read, but start
the workers without protection: the negative control).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

if __name__ == "__main__":  # as the engine does: handlers come first
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), lambda *_: None)
    print("HANDLERS", flush=True)

import torch

import dist_train.data.loader
from dist_train.config.schema import DataConfig
from dist_train.data.loader import Reading, TrainLoader
from dist_train.data.plan import Plan


class Items:
    def __init__(self, hang: bool) -> None:
        self.hang = hang

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> int:
        time.sleep(60 if self.hang else 0.02)
        return os.getpid()


def main(method: str, action: str) -> None:
    if action == "bare":
        dist_train.data.loader.run_signals_blocked = contextlib.nullcontext
    config = DataConfig(train=object(), num_workers=2, worker_start_method=method)
    reading = Reading(config, seed=0, device=torch.device("cpu"))
    loader = TrainLoader(Items(action == "hang"), Plan(0, 80, 2), reading, micro_batch_size=2)
    if action == "hang":
        steps = loader.steps(0, 40)
        import threading

        threading.Timer(1.0, lambda: print("WORKERS", *children(), flush=True)).start()
        list(next(steps).micro_batches)
    for work in loader.steps(0, 40):
        pids = {pid for m in work.micro_batches for pid in m.batch.tolist()}
        if work.step == 1:
            print("WORKERS", *children(), flush=True)
        assert len(pids) == 1
        if action == "leave" and work.step == 4:
            sys.exit(0)
    loader.close()
    print("DONE", flush=True)
    os._exit(0)  # a Python that ends takes its signal handlers away first


def children() -> list[int]:
    """Loader workers of this process (their resource tracker and fork server apart)."""
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid]


if __name__ == "__main__":
    main(*sys.argv[1:])
