"""Muon and AdamW on one loss, each with its schedule and layer-wise lr decay, are a plain loop, whole or stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import rows
from test_unfreezing import DATA
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler as lrs

from dist_train import train
from dist_train.config.errors import ConfigError
from dist_train.data.plan import Plan


class Net(nn.Sequential):
    """Modules 0, 1 and 2."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))


def config(folder: Path, name: str, **trainer: Any) -> dict[str, Any]:
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total_steps", "every": "1step"}
    constant = {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0, "every": "1step"}
    return {
        "run": {"name": name, "dir": str(folder), "code_paths": [str(Path(__file__).parent)]},
        "data": {"train": DATA, "global_batch_size": 6},
        "model": {"_target_": "test_several_optimizers.Net"},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {
            "muon": {"_target_": "torch.optim.Muon", "lr": 0.02, "match": "Linear.weight", "layer_decay": 0.5},
            "adamw": {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.1},
        },
        "scheduler": {
            "muon": cosine | {"warmup": "5step"},
            "adamw": constant | {"warmup": {"duration": "1ep", "from": 0.1}},
        },
        "trainer": {"duration": "3ep", "log_every": "1step", **trainer},
        "checkpoint": {"keep_best": None, "every": "1ep"},
        "tracking": {"tensorboard": False, "report": False},
    }


def plain() -> tuple[nn.Module, list[tuple[float, float]]]:
    """Twelve steps by hand; the lr of both in each."""
    torch.manual_seed(0)
    net, plan, used = Net(), Plan(0, 24, 6), []
    shares = [0.25, 0.5, 1.0]
    muon = torch.optim.Muon([{"params": [layer.weight]} for layer in net], lr=0.02)
    adamw = torch.optim.AdamW([layer.bias for layer in net], lr=0.1, weight_decay=0.1)
    of_muon = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.02)
    warm = lrs.LinearLR(of_muon, 1 / 6, total_iters=5)
    schedules = [lrs.SequentialLR(of_muon, [warm, lrs.CosineAnnealingLR(of_muon, 7)], [5])]
    warm = lrs.LinearLR(adamw, 0.1, total_iters=4)
    schedules.append(lrs.SequentialLR(adamw, [warm, lrs.ConstantLR(adamw, 1.0)], [4]))
    for step in range(12):
        used.append((of_muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]))
        for group, share in zip(muon.param_groups, shares, strict=True):
            group["lr"] = used[-1][0] * share
        inputs, targets = DATA[plan.batch(step).tolist()]
        functional.cross_entropy(net(inputs), targets).backward()
        for optimizer in (muon, adamw, of_muon):
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    return net, used


def test_it_is_the_plain_loop_and_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    train(config(tmp_path, "whole"))
    for stop in ("3step", "7step", None):
        train(config(tmp_path, "stopped", stop_at=stop))
    net, used = plain()
    found, resumed = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "stopped"))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(found[name], resumed[name])
    assert [(row["lr/muon"], row["lr/adamw"]) for row in rows(tmp_path / "whole", "train")] == used
    assert rows(tmp_path / "whole", "train") == rows(tmp_path / "stopped", "train")


def test_on_one_loss_the_order_of_the_config_changes_nothing_when_a_run_resumes(tmp_path: Path) -> None:
    train(config(tmp_path, "whole"))
    for number, stop in enumerate(("3step", "7step", None)):
        turned = config(tmp_path, "turned", stop_at=stop)
        for section in ("optimizer", "scheduler") if number % 2 else ("optimizer",):
            turned[section] = dict(reversed(turned[section].items()))
        train(turned)
    found, resumed = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "turned"))
    assert all(torch.equal(value, resumed[name]) for name, value in found.items())
    assert rows(tmp_path / "whole", "train") == rows(tmp_path / "turned", "train")


def test_patterns_that_overlap_are_of_the_first_and_so_their_order_is_a_change(tmp_path: Path) -> None:
    """Else the state of one would go on with parameters of the other."""
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    both = {"one": {**sgd, "match": "0.*"}, "other": {**sgd, "match": "*.weight"}, "rest": sgd}
    base = {**config(tmp_path, "run", stop_at="3step"), "scheduler": None, "optimizer": both}
    train(base)
    turned = {name: both[name] for name in ("other", "one", "rest")}
    with pytest.raises(ConfigError, match="matched by several optimizers, of which the first trains them"):
        train({**base, "optimizer": turned, "trainer": {"duration": "3ep"}})


def test_a_run_is_not_resumed_with_other_optimizers(tmp_path: Path) -> None:
    train(config(tmp_path, "run", stop_at="3step"))
    other = config(tmp_path, "run")
    for section in ("optimizer", "scheduler"):
        other[section] = {"sgd" if name == "adamw" else name: spec for name, spec in other[section].items()}
    other["checkpoint"]["accept_changes"] = True
    with pytest.raises(ConfigError, match="was started with adamw, muon, and the config has muon, sgd"):
        train(other)
