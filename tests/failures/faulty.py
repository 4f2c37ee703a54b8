"""A user's code that fails in a chosen way, on a chosen rank: FAIL=kind@rank, at step 13 (or in the second evaluation)."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import get_worker_info

from dist_train.callbacks import Callback
from dist_train.data import Digits
from dist_train.models import MLP

KIND, _, RANK = os.environ.get("FAIL", "none@0").partition("@")
HERE = RANK in ("any", os.environ.get("RANK", "0"))
STEP = 13  # of the first start; 19 make an epoch of the digits
steps = 0


def mark(condition: bool) -> bool:
    """Leave the time at which it happens, for the test to count from."""
    if condition:
        Path("happened").write_text(str(time.time()))
    return condition


def due(kind: str) -> bool:
    """Whether it is time for `kind` to happen here."""
    return mark(HERE and kind == KIND and steps == STEP - 1)


class Model(MLP):
    """Fails in its forward."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        late = HERE and not self.training and steps > STEP
        if mark(late and KIND == "evaluation"):
            raise ValueError("an evaluation that fails")
        if mark(late and KIND == "hang-evaluation"):
            time.sleep(1000)
        if self.training:
            if HERE and "slow" in KIND:
                time.sleep(0.06)
            if due("model"):
                raise RuntimeError("a model that fails")
            if due("hang-model"):
                time.sleep(1000)
            if due("deaf"):  # in C code that holds the GIL: no other thread runs
                ctypes.PyDLL(None).sleep(1000)
            if due("stop"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if due("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if due("exit"):
                os._exit(0)
            if due("leak"):
                token, secret = os.environ["SERVICE_TOKEN"], os.environ["AWS_SECRET_ACCESS_KEY"]
                warnings.warn(f"a warning with {secret}", stacklevel=1)
                raise OSError(f"https://user:{secret}@host/x?X-Amz-Signature={secret} denied ({token})")
            if due("memory"):
                raise MemoryError
            if "large" in KIND and len(inputs) > 16 and mark(HERE):
                raise MemoryError
            if due("allocation"):
                torch.empty(1 << 58)
            if due("segfault"):
                ctypes.string_at(0)
            if due("nan"):
                return super().forward(inputs) * float("nan")
        return super().forward(inputs)


class Loss(nn.CrossEntropyLoss):
    """Fails."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if due("loss"):
            raise KeyError("a loss that fails")
        return super().forward(outputs, targets)


class Data(Digits):
    """Fails at a sample."""

    read_batch = None
    reads = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        Data.reads += 1
        late = HERE and Data.reads > 200
        if mark(late and KIND == "dataset"):
            raise OSError("a file that is torn")
        if mark(late and KIND == "hang-dataset"):
            time.sleep(1000)
        if mark(late and KIND == "worker" and get_worker_info() is not None):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Optimizer(torch.optim.SGD):
    """Fails in its step."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        if due("optimizer"):
            raise ArithmeticError("an optimizer that fails")
        super().step()


class Watch(Callback):
    """Counts steps, and fails."""

    def on_step_end(self, trainer: object) -> None:
        """At each step."""
        global steps
        if due("callback"):
            raise LookupError("a callback that fails")
        steps += 1
        if HERE and KIND in ("save", "hang-save") and steps == 5:
            import dist_train.checkpoint.manager as manager

            def save(state: object, file: object) -> None:
                mark(True)
                if KIND == "hang-save":
                    time.sleep(1000)
                raise OSError(28, "No space left on device")

            manager.torch = type("torch", (), {"save": staticmethod(save), "Tensor": torch.Tensor})  # type: ignore[assignment]
