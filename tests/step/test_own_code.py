"""What users hang on an optimizer, a module or a callback acts in every step, whatever the engine leaves out elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import train
from dist_train.callbacks import Callback
from dist_train.optim.optim import take_step


class Counting(torch.optim.SGD):
    """Its step has the attributes of torch's wrapper."""

    taken = 0

    @functools.wraps(type(torch.optim.SGD([torch.zeros(1)])).step)  # type: ignore[override]  # a constructed one has it
    def step(self, closure: Any = None) -> Any:
        Counting.taken += 1
        return super().step(closure)


def with_hook(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters)
    optimizer.register_step_post_hook(lambda *_: count())
    return optimizer


def count() -> None:
    Counting.taken += 1


def replaced_plainly(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters)
    inner = optimizer.step

    def step(self: Any, closure: Any = None) -> Any:
        count()
        return inner(closure)

    optimizer.step = step.__get__(optimizer)  # type: ignore[method-assign, assignment]
    return optimizer


def replaced_after_the_scheduler(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    inner = optimizer.step

    @functools.wraps(inner)
    def step(*args: Any) -> Any:
        count()
        return inner(*args)

    optimizer.step = step  # type: ignore[method-assign, assignment]
    return optimizer


@pytest.mark.parametrize("make", [Counting, with_hook, replaced_plainly, replaced_after_the_scheduler])
def test_what_users_put_around_a_step_is_called_in_each(make: Callable[..., torch.optim.Optimizer]) -> None:
    Counting.taken = 0
    parameter = nn.Parameter(torch.ones(1))
    optimizer = make([parameter])
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for _ in range(3):
        parameter.grad = torch.ones(1)
        take_step(optimizer)
    assert Counting.taken == 3
    assert parameter.item() == pytest.approx(1 - 3 * 1e-3)


@pytest.mark.filterwarnings("error")
def test_a_scheduler_hears_of_the_first_step_and_doesnt_warn() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for rate in (1e-3, 1e-4, 1e-5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        parameter.grad = torch.ones(1)
        take_step(optimizer)
        scheduler.step()
    assert parameter.item() == pytest.approx(1 - 1.11e-3)


class Replacing(Callback):
    """A hook that is set when others have been called already."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_start(self, trainer: Any) -> None:
        self.on_step_end = lambda trainer: self.steps.append(trainer.step)  # type: ignore[method-assign, assignment]


class Noisy(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + np.random.rand()


def noise(inputs: torch.Tensor) -> torch.Tensor:
    return inputs + np.random.rand()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation=noise, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(8, 3))


@functools.wraps(nn.functional.cross_entropy)
def noisy_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(noise(outputs) * noise(outputs), targets)


def noisy_optimizer(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def shake(*_: Any) -> None:
        for parameter in parameters[0]["params"]:
            parameter.grad.add_(np.random.rand())

    optimizer.register_step_pre_hook(shake)
    return optimizer


def config(path: Path, **more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "run": {"dir": str(path), "name": "noisy"},
        "data": {
            "train": torch.utils.data.TensorDataset(torch.randn(24, 8), torch.arange(24) % 3),
            "global_batch_size": 8,
        },
        "model": nn.Linear(8, 3),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "4step"},
        "tracking": {"tensorboard": False, "report": False},
    } | {key: value() if key == "model" else value for key, value in more.items()}


@pytest.mark.parametrize(
    "parts",
    [
        {"model": lambda: nn.utils.parametrizations.weight_norm(Noisy(8, 3))},
        {"model": encoder},
        {"loss": noisy_loss},
        {"optimizer": noisy_optimizer},
    ],
    ids=["parametrized module", "activation", "wrapped loss", "optimizer hook"],
)
def test_code_that_draws_from_numpy_within_parts_of_torch_is_seeded_in_each_step(
    tmp_path: Path, parts: dict[str, Any]
) -> None:
    whole = train(config(tmp_path / "whole", **parts))
    train(config(tmp_path / "resumed", **parts), "trainer.stop_at=2step")
    resumed = train(config(tmp_path / "resumed", **parts))
    assert resumed["step"] == whole["step"] == 4
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_a_hook_that_is_set_during_a_run_is_called(tmp_path: Path) -> None:
    callback = Replacing()
    train(config(tmp_path, callbacks=[callback]))
    assert callback.steps == [1, 2, 3, 4]
