"""Training equals the loop of a course to ten digits: mean losses over the whole batch, `loss.backward()`, no fused kernels.

In double precision, so that what is left of a difference is an error of the arithmetic and not of rounding.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import trained
from oracle_configs import ADAMW, CE, SGD, layers, piece
from oracle_pieces import Points
from runs import rows
from torch import Tensor, nn

from dist_train.data.plan import Plan

CONFIG: dict[str, Any] = {
    "data": {"global_batch_size": 8, "drop_last": False},
    "model": layers(("Linear", 5, 8), ("Tanh",), ("Linear", 8, 3), kind="oracle_pieces.Double"),
    "metrics": ["accuracy"],
    "checkpoint": {"keep_best": None},
    "trainer": {"duration": "4ep", "micro_batch_size": 3, "log_every": "1step"},
}
WEIGHT = [0.5, 1.25, 3.0]  # a config's list becomes float32


def textbook(loss_of: Any, optimizer_of: Any, ignored: int, schedule_of: Any, clip: float, decay: float) -> Any:
    """(model, average, losses by step, (val loss, val accuracy) by epoch) of 22 samples in batches of 8."""
    train, val = Points(22, ignored=ignored, double=True), Points(11, seed=1, double=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer)
    average = copy.deepcopy(model)
    losses, figures = [], []
    for epoch in range(4):
        order = Plan(0, 22, 8, drop_last=False).order(epoch).tolist()
        for first in range(0, 22, 8):
            inputs, targets = train.inputs[order[first : first + 8]], train.targets[order[first : first + 8]]
            optimizer.zero_grad()
            loss = loss_of(model(inputs), targets)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                    mean.copy_(decay * mean + (1 - decay) * weight)
        schedule.step()
        with torch.no_grad():
            outputs = average(val.inputs)
            accuracy = (outputs.argmax(1) == val.targets).double().mean()
            figures.append((loss_of(outputs, val.targets).item(), accuracy.item()))
    return model, average, losses, figures


def weighted() -> tuple[Any, dict[str, Any]]:
    """Class weights and labels that don't count: no micro-batch has the denominator of another."""
    book = textbook(
        nn.CrossEntropyLoss(torch.tensor(WEIGHT).double()),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01),
        ignored=6,
        schedule_of=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1),
        clip=0.1,
        decay=0.9,
    )
    return book, {
        "loss": {"_target_": CE, "weight": WEIGHT},
        "optimizer": {"_target_": SGD, "lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        "scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2, "gamma": 0.1},
        "trainer": {**CONFIG["trainer"], "clip_grad_norm": 0.1, "ema_decay": 0.9},
    }


def adaptive() -> tuple[Any, dict[str, Any]]:
    """AdamW with two groups under a cosine, without an average."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        kernels, biases = ([p for p in model.parameters() if (p.dim() == 1) == flat] for flat in (False, True))
        return [{"params": kernels}, {"params": biases, "weight_decay": 0.0, "lr": 0.1}]

    book = textbook(
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda model: torch.optim.AdamW(groups(model), lr=0.05, weight_decay=0.2, foreach=False),
        ignored=0,
        schedule_of=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        clip=0.0,
        decay=0.0,
    )
    no_decay = [{"match": "*.bias", "weight_decay": 0.0, "lr": 0.1}]
    return book, {
        "loss": {"_target_": CE, "label_smoothing": 0.1},
        "optimizer": {"_target_": ADAMW, "lr": 0.05, "weight_decay": 0.2, "groups": no_decay},
        "scheduler": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 4},
    }


def compared(book: Any, run: Path) -> float:
    """The largest difference of a loss, figure or weight."""
    model, average, losses, figures = book
    train, val = rows(run, "train"), rows(run, "val")
    step = max((run / "checkpoints").iterdir())
    state = torch.load(step / "model.pt", weights_only=True)
    kept = torch.load(run / "model.pt", weights_only=True)
    pairs: list[tuple[Tensor, Tensor]] = [
        (torch.tensor(losses).double(), torch.tensor([row["loss"] for row in train]).double()),
        (torch.tensor(figures).double(), torch.tensor([[row["loss"], row["accuracy"]] for row in val]).double()),
        *((value, state[name]) for name, value in model.state_dict().items()),
        *((value, kept[name]) for name, value in average.state_dict().items()),
    ]
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("case", [weighted, adaptive])
def test_training_is_the_textbook_to_ten_digits(case: Any, tmp_path: Path) -> None:
    book, options = case()
    classes = options["loss"].get("weight")
    data = {
        "train": piece("Points", samples=22, ignored=6 if classes else 0, double=True),
        "val": piece("Points", samples=11, seed=1, double=True),
    }
    config = {**CONFIG, **options, "data": {**CONFIG["data"], **data}}
    assert compared(book, trained(tmp_path / "same", config)) < 1e-10
    other = {**config, "optimizer": {**config["optimizer"], "weight_decay": 0.0100001}}
    assert compared(book, trained(tmp_path / "other", other)) > 1e-10, "a negative control"
