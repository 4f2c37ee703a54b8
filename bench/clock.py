"""The clock and the data that all contenders of the benchmark share; imports nothing of dist_train."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Clock:
    """Records the time at the end of each optimizer step: one list append per step, the same for all contenders.

    Args:
        warmup: steps at the beginning that are not measured.
        steps: steps after them that are measured.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.total = warmup, warmup + steps
        self.times: list[float] = []
        self.boundaries: list[int] = []
        self.first_step_at = 0.0
        self._cpu: dict[int, float] = {}

    def tick(self) -> bool:
        """To be called at the end of each step; returns True when all steps are done."""
        self.times.append(time.perf_counter())
        done = len(self.times)
        if done == 1:
            self.first_step_at = time.time()
        if done in (self.warmup, self.total):
            self._cpu[done] = time.thread_time()
        return done >= self.total

    def boundary(self) -> None:
        """To be called at the end of each epoch: the interval until the next step includes evaluation and saving, if any."""
        self.boundaries.append(len(self.times))

    def result(self) -> dict[str, Any]:
        """`steps_per_s` over everything; `stepping_per_s` without the intervals that contain the end of an epoch; `cpu_us`,
        the main thread's CPU time per step, which other load on the machine affects less than wall time."""
        if len(self.times) < self.total:
            raise RuntimeError(f"expected {self.total} steps, saw {len(self.times)}")
        times = self.times[: self.total]
        steps = range(self.warmup, self.total)
        inside = [times[i] - times[i - 1] for i in steps if i not in set(self.boundaries)]
        return {
            "steps_per_s": len(steps) / (times[-1] - times[self.warmup - 1]),
            "stepping_per_s": len(inside) / sum(inside),
            "cpu_us": (self._cpu[self.total] - self._cpu[self.warmup]) / len(steps) * 1e6,
            "first_step_at": self.first_step_at,
        }

    def write(self, path: str) -> None:
        """Write the result to `path` as JSON, on rank 0 only."""
        if int(os.environ.get("RANK", "0")) == 0:
            Path(path).write_text(json.dumps(self.result()), encoding="ascii")


def digits(repeat: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Inputs (n, 64) float32 and targets (n,) int64 of 1,257 (train), 180 (val) or 360 (test) digits, `repeat` times over.

    Reads scikit-learn's file without importing scikit-learn (which takes a second), so that no startup time includes that import.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("expected scikit-learn to be installed: the digits come with it")
    with gzip.open(Path(spec.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    where = {"train": slice(1257), "val": slice(1257, 1437), "test": slice(1437, None)}[split]
    part = torch.from_numpy(table[where])
    return (part[:, :-1] / 16).repeat(repeat, 1), part[:, -1].long().repeat(repeat)
