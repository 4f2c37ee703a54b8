"""Unfreezing with an lr of its own is what a plain loop does with `add_param_group`, whole or stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import rows
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler as lrs
from torch.utils.data import TensorDataset

from dist_train import train
from dist_train.data.plan import Plan

DATA = TensorDataset(
    torch.randn(24, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(0, 2, (24,), generator=torch.Generator().manual_seed(1)),
)


class Net(nn.Sequential):
    """Three layers: 0, 1 and 2."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))


def config(folder: Path, name: str, **trainer: Any) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(folder), "code_paths": [str(Path(__file__).parent)]},
        "data": {"train": DATA, "global_batch_size": 6},
        "model": {"_target_": "test_unfreezing.Net"},
        "transfer": {"freeze": ["0", "1"]},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {
            "_target_": "torch.optim.SGD", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.1, "layer_decay": 0.5,
            "groups": [{"ndim_below": 2, "weight_decay": 0.0}],
        },
        "scheduler": {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total_steps", "every": "1step"
        },
        "callbacks": [
            {"_target_": "dist_train.callbacks.Unfreeze", "match": "1", "after": "1ep", "lr": 0.04},
            {"_target_": "dist_train.callbacks.Unfreeze", "match": "0", "after": "8step"},
        ],
        "trainer": {"duration": "4ep", "log_every": "1step", **trainer},
        "checkpoint": {"keep_best": None, "every": "1ep"},
        "tracking": {"tensorboard": False, "report": False},
    }  # fmt: skip


def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Sixteen steps by hand: layer 2 trains; layer 1 joins after 4 steps at its lr, layer 0 after 8 at the config's by then."""
    torch.manual_seed(0)
    net, plan = Net(), Plan(0, 24, 6)
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)

    def groups(layer: int, lr: float) -> list[dict[str, Any]]:
        return [
            {"params": [net[layer].weight], "lr": lr, "weight_decay": 0.1},
            {"params": [net[layer].bias], "lr": lr, "weight_decay": 0.0},
        ]

    optimizer = torch.optim.SGD(groups(2, 0.2), lr=0.2, momentum=0.9)
    cosine = lrs.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), 16)
    shares = {0: 0.2, 1: 0.2}  # of a group: its lr over that of the schedule
    for step in range(16):
        lr = cosine.get_last_lr()[0]
        if step == 4:
            net[1].requires_grad_(True)
            for group in groups(1, 0.04 * 0.5):
                optimizer.add_param_group(group)
            shares |= {2: 0.02 / lr, 3: 0.02 / lr}
        if step == 8:
            net[0].requires_grad_(True)
            for group in groups(0, 0.0):
                optimizer.add_param_group(group)
            shares |= {4: 0.2 * 0.25, 5: 0.2 * 0.25}
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = shares[number] * lr
        inputs, targets = DATA[plan.batch(step).tolist()]
        optimizer.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        cosine.optimizer.step()
        cosine.step()
    return net, optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfreezing")
    train(config(folder, "whole"))
    return folder / "whole"


def test_an_optimizer_with_names_has_those_of_what_is_unfrozen(whole: Path) -> None:
    for stop in ("6step", "9step", None):
        made = config(whole.parent, "named", stop_at=stop)
        made["optimizer"]["named_parameters"] = True
        train(made)
    assert rows(whole.parent / "named", "train") == rows(whole, "train")
    saved = torch.load(max((whole.parent / "named" / "checkpoints").iterdir()) / "optimizer.pt", weights_only=True)
    assert [group["param_names"] for group in saved["param_groups"]] == [
        [f"{layer}.{kind}"] for layer in (2, 1, 0) for kind in ("weight", "bias")
    ]


def test_it_is_the_plain_loop(whole: Path) -> None:
    net, optimizer = plain()
    found = torch.load(whole / "model.pt", weights_only=True)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    untouched = torch.nn.utils.parameters_to_vector(Net().parameters()).numel()
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == untouched
    saved = torch.load(max((whole / "checkpoints").iterdir()) / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.1, 0.0] * 3


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_a_stopped_run_is_the_whole_one_to_the_bit(whole: Path, stop: int) -> None:
    for trainer in ({"stop_at": f"{stop}step"}, {}):
        train(config(whole.parent, f"stopped-{stop}", **trainer))
    stopped = whole.parent / f"stopped-{stop}"
    assert rows(stopped, "train") == rows(whole, "train")
    one, other = (
        torch.load(max((run / "checkpoints").iterdir()) / "optimizer.pt", weights_only=True) for run in (whole, stopped)
    )
    assert one["param_groups"] == other["param_groups"]
    weights = [torch.load(run / "model.pt", weights_only=True) for run in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Thawing(Net):
    """Unfreezes a part of itself."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self[0].requires_grad_(True)
        return super().forward(inputs)


def test_a_forward_that_unfreezes_parameters_is_an_error_that_names_one(tmp_path: Path) -> None:
    own = config(tmp_path, "thawing", duration="1step") | {
        "callbacks": [],
        "model": {"_target_": "test_unfreezing.Thawing"},
    }
    with pytest.raises(ValueError, match=r"0\.weight: requires_grad was set to True outside of a callback"):
        train(own)
