"""How much of the interpreter a training step uses: Python function calls, as a count that doesn't depend on the machine."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from dist_train import train
from dist_train.training.trainer import Trainer

BEYOND_A_RAW_LOOP = 95


def test_a_step_makes_fewer_than_95_calls_beyond_those_of_a_raw_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the loader to the update, in steps 11 to 40 of a run with all defaults, where nothing is logged or saved."""
    calls: Counter[str] = Counter()
    run_step = Trainer._run_step

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1

    def watched(trainer: Trainer, work: Any) -> None:
        if work.step == 10:
            sys.setprofile(count)
        run_step(trainer, work)
        if work.step == 40:
            sys.setprofile(None)

    monkeypatch.setattr(Trainer, "_run_step", watched)
    config = {
        "run": {"dir": str(tmp_path)},
        "data": {"train": {"_target_": "dist_train.data.Digits", "flat": True}, "global_batch_size": 16},
        "model": {"_target_": "dist_train.models.MLP", "in_features": 64, "hidden": [128], "out_features": 10},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        "trainer": {"duration": "49step"},
    }
    assert train(config)["step"] == 49
    per_step = sum(calls.values()) / 30
    beyond = per_step - calls_of_a_raw_loop()
    assert 30 < beyond < BEYOND_A_RAW_LOOP, "\n".join(f"{n / 30:.1f} {c}" for c, n in calls.most_common(150))


def calls_of_a_raw_loop() -> int:
    """Of a step without a loader."""
    calls: Counter[str] = Counter()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    batch, labels = torch.randn(16, 64), torch.randint(10, (16,))

    def step() -> None:
        nn.functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    sys.setprofile(lambda frame, event, _: calls.update([event]))
    step()
    sys.setprofile(None)
    return calls["call"]
