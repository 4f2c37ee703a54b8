"""States in which every value encodes the step."""

from __future__ import annotations

from typing import Any

import torch

from dist_train.checkpoint.manager import CheckpointManager


def state_of(step: int) -> dict[str, Any]:
    """A small state in which every value encodes the step."""
    model = {"weight": torch.full((3, 5), float(step)), "bias": torch.arange(4) + step}
    return {"model": model, "optimizer": {"state": {0: {"exp_avg": torch.full((7,), -float(step))}}, "step": step}}


def assert_intact(found: Any, step: int) -> None:
    """The checkpoint is that of ``step``, all of it."""
    assert found is not None
    assert found.step == step
    expected = state_of(step)
    model, optimizer = found.load("model"), found.load("optimizer")
    assert all(torch.equal(model[name], tensor) for name, tensor in expected["model"].items())
    assert torch.equal(optimizer["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    assert optimizer["step"] == step


def save(manager: CheckpointManager, *steps: int, **metrics: float) -> None:
    """Save and publish these steps one after the other."""
    for step in steps:
        manager.save(step, state_of(step), {"position": step}, metrics, wait=True)


def save_and_wait(manager: CheckpointManager, state: dict[str, Any], step: int = 2) -> None:
    """Save a step; either call may raise what the writing thread has found by then."""
    manager.save(step, state, {})
    manager.wait()
