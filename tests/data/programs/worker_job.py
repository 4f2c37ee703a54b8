"""A process with loader workers, for test_workers: reads 41 steps and says what happens; run as a script.

Arguments: start method, and what to do: read (then leave without closing) | hang (in a sample) | bare (read, but start
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
from dist_train.data.loader import TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions
from dist_train.data.workers import RUN_SIGNALS


class Items:
    def __init__(self, hang: bool) -> None:
        self.hang = hang

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> int:
        if self.hang:
            print("WORKERS", os.getpid(), flush=True)
        time.sleep(60 if self.hang else 0.02)
        return os.getpid()


def main(method: str, action: str) -> None:
    from dist_train.config.schema import DataConfig  # not at the top: workers that are spawned read this file as well

    if action == "bare":
        dist_train.data.loader.run_signals_blocked = contextlib.nullcontext
    reading = LoaderOptions(
        DataConfig(train=object(), num_workers=1, worker_start_method=method), 0, torch.device("cpu")
    )
    loader = TrainLoader(Items(action == "hang"), Plan(0, 80, 2), reading, micro_batch_size=2)
    for work in loader.steps():
        pids = {pid for m in work.micro_batches for pid in m.batch.tolist()}
        assert len(pids) == 1
        if work.step == 40:
            for number in RUN_SIGNALS:  # a Python that ends takes its signal handlers away first
                signal.signal(number, signal.SIG_IGN)
            print("WORKERS", *pids, flush=True)
            sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
