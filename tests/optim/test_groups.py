"""Parameter groups and layer-wise lr decay give each parameter the lr and weight decay that a plain loop gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.config.slots import check_components
from dist_train.models.depth import depths
from dist_train.models.transfer import match_parameters
from dist_train.optim.groups import Grouping
from dist_train.optim.optim import build_optimizer
from dist_train.optim.schedule import Schedule, Span

CPU = torch.device("cpu")
L = "torch.optim.lr_scheduler."
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.05}


class Tower(nn.Module):
    """Named as transformers names them; layers are 0: the embeddings, 1 and 2: the blocks, 3: what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))})
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)
        self.temperature = nn.Parameter(torch.ones(()))


def test_tied_weights_are_one_parameter_that_both_names_match() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    assert match_parameters(model, ["1.*"], "transfer.freeze") == match_parameters(model, ["0.*"], "x") == ["0.weight"]
    spec = {"_target_": "torch.optim.SGD", "lr": 0.1, "groups": [{"ndim_below": 3, "lr": 0.2}]}
    [group] = build_optimizer(spec, model, torch.device("cpu")).param_groups
    assert (group["lr"], len(group["params"])) == (0.2, 1)


def settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """(lr in a step, weight decay) of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"] * group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_each_layer_has_its_share_of_the_lr_in_every_group() -> None:
    model = Tower()
    groups = [{"match": "head", "lr": 0.3}, {"ndim_below": 2, "weight_decay": 0.0}]
    optimizer = build_optimizer({**ADAMW, "layer_decay": 0.5, "groups": groups}, model, CPU)
    assert settings(model, optimizer) == {
        "embeddings.weight": (0.0125, 0.05),
        "encoder.layer.0.weight": (0.025, 0.05),
        "encoder.layer.0.bias": (0.025, 0.0),
        "encoder.layer.1.weight": (0.05, 0.05),
        "encoder.layer.1.bias": (0.05, 0.0),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "head.weight": (0.3, 0.05),  # the first group that matches
        "head.bias": (0.3, 0.05),
        "temperature": (0.1, 0.0),
    }
    note = Grouping(model, {**ADAMW, "layer_decay": 0.5}).note(optimizer)
    assert note == (
        "4 layers by the numbers in the names of its blocks: 0.0125 embeddings.weight, 0.025 encoder.layer.0.weight, "
        "0.05 encoder.layer.1.weight, 0.1 temperature"
    )


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (
            ["shared.w", "encoder.block.0.layer.0.w", "encoder.norm.w", "decoder.block.0.w", "lm_head.w"],
            [0, 1, 2, 1, 2],
        ),
        (["a.pos.w", "a.layers.0.w", "a.norm.w", "b.pre.w", "b.layers.0.w", "b.layers.1.w"], [0, 1, 3, 0, 1, 2]),
        (["stem.w", "layers.0.blocks.0.w", "layers.0.down.w", "layers.1.blocks.0.w", "head.w"], [0, 1, 1, 2, 3]),
        (["class_token", "encoder.layers.encoder_layer_0.w", "encoder.ln.w"], [0, 1, 2]),
        (["h.0.w", "wte.w", "out.w"], [1, 0, 2]),
        (["conv.w", "conv.b", "bn.w", "fc.w"], [0, 0, 1, 2]),
    ],
)
def test_layers_are_told_by_the_names_of_blocks_else_by_the_order_of_modules(
    names: list[str], layers: list[int]
) -> None:
    model = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        place: nn.Module = model
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(leaf, nn.Parameter(torch.ones(2)))
    found, _ = depths(model)
    assert [found[name] for name in names] == layers


SCHEDULES: dict[str, tuple[dict[str, Any], Any]] = {
    "one cycle": (
        {"_target_": L + "OneCycleLR", "max_lr": 0.3, "total_steps": "total_steps"},
        lambda o: lrs.OneCycleLR(o, 0.3, total_steps=12),
    ),
    "cosine down to a rest": (
        {"_target_": L + "CosineAnnealingLR", "T_max": "total_steps", "eta_min": 0.01, "every": "1step"},
        lambda o: lrs.CosineAnnealingLR(o, 12, 0.01),
    ),
    "warm-up": (
        {"_target_": L + "ConstantLR", "factor": 1.0, "every": "1step", "warmup": "5step"},
        lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 1 / 6, total_iters=5), lrs.ConstantLR(o, 1.0)], [5]),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_the_ratio_of_the_layers_as_in_the_loop_of_mae(name: str) -> None:
    """There, `group["lr"] = lr * group["lr_scale"]` before each step; ours stops in the middle and resumes."""
    spec, make = SCHEDULES[name]

    def loss(model: nn.Module) -> torch.Tensor:
        return sum(((parameter - 0.5) ** 3).sum() for parameter in model.parameters())  # type: ignore[return-value]

    torch.manual_seed(0)
    model, plain = Tower(), Tower()
    plain.load_state_dict(model.state_dict())
    scales = {name: 0.5 ** (3 - layer) for name, layer in depths(plain)[0].items()}
    groups = [{"params": [p], "lr_scale": scales[name], "weight_decay": 0.05} for name, p in plain.named_parameters()]
    reference = torch.optim.AdamW(groups, lr=0.1, fused=True)
    scheduled = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    schedule = make(scheduled)
    beta = "betas" if name == "one cycle" else None  # which it schedules as well
    optimizer = build_optimizer({**ADAMW, "layer_decay": 0.5}, model, CPU)
    ours = Schedule(spec, optimizer, Span(12, 4, 12), ("val/loss", "min"))
    for step in range(1, 13):
        for group in reference.param_groups:
            group["lr"] = scheduled.param_groups[0]["lr"] * group["lr_scale"]
            if beta:
                group["betas"] = (scheduled.param_groups[0]["momentum"], 0.999)
        for one, other in ((model, optimizer), (plain, reference)):
            other.zero_grad()
            loss(one).backward()
            other.step()
        scheduled.step()
        schedule.step()
        ours.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)), step
        if step == 6:
            saved, state = ours.state_dict(), optimizer.state_dict()
            optimizer = build_optimizer({**ADAMW, "layer_decay": 0.5}, model, CPU)
            ours = Schedule(spec, optimizer, Span(12, 4, 12), ("val/loss", "min"))
            optimizer.load_state_dict(state)
            ours.load_state_dict(saved)


class ByName(torch.optim.SGD):
    """Needs names: it decides by them what it does."""

    def __init__(self, named_parameters: Any, lr: float):
        super().__init__(named_parameters, lr=lr)


class Mixed(torch.optim.Optimizer):
    """As Muon with an Adam for the rest (Jordan): a flag of its groups says which."""

    def __init__(self, param_groups: list[dict[str, Any]]):
        assert all(group.keys() == {"params", "use_muon", "lr"} for group in param_groups)
        super().__init__(param_groups, {})


def test_optimizers_that_want_names_or_options_of_their_own_get_them() -> None:
    model = Tower()
    names = [name for name, _ in model.named_parameters()]
    one = build_optimizer({"_target_": ByName, "lr": 0.1}, model, CPU)
    assert one.param_groups[0]["param_names"] == names
    groups = [{"match": "head.*", "lr": 0.2}]
    asked = {"_target_": torch.optim.SGD, "lr": 0.1, "named_parameters": True, "groups": groups}
    two = build_optimizer(asked, model, CPU).param_groups
    assert [group["param_names"] for group in two] == [
        [n for n in names if "head" not in n],
        ["head.weight", "head.bias"],
    ]
    assert "param_names" not in build_optimizer(ADAMW, model, CPU).param_groups[0]
    mixed = {
        "_target_": Mixed,
        "groups": [
            {"match": "*.layer.*.weight", "use_muon": True, "lr": 0.1},
            {"match": "*", "use_muon": False, "lr": 0.2},
        ],
    }
    flags = build_optimizer(mixed, model, CPU).param_groups
    assert [(group["use_muon"], len(group["params"])) for group in flags] == [(True, 2), (False, 8)]
    config = load_config(
        {
            "data": {"train": {"_target_": "dist_train.data.Digits"}},
            "model": model, "loss": nn.MSELoss(), "optimizer": mixed,
        }
    )  # fmt: skip
    assert check_components(config) == []


def test_what_gets_no_parameter_or_has_no_lr_is_refused() -> None:
    groups = [{"match": "head", "lr": 0.1}, {"match": "head.*", "ndim_below": 2}]
    with pytest.raises(
        ConfigError, match=r"groups.1.match: head.\* \(with fewer than 2 dimensions\) matches no parameter"
    ):
        build_optimizer({**ADAMW, "groups": groups}, Tower(), CPU)
    with pytest.raises(ConfigError, match="Unscheduled has no lr here that could be scaled"):
        build_optimizer({"_target_": Unscheduled, "lr": None, "layer_decay": 0.5}, Tower(), CPU)


def test_muon_says_which_parameter_needs_another_optimizer() -> None:
    spec = {"_target_": "torch.optim.Muon", "lr": 0.02}
    with pytest.raises(
        ConfigError, match=r"optimizer.muon: torch.optim.Muon trains matrices only, but temperature has the shape \(\)"
    ):
        build_optimizer(spec, Tower(), CPU, "optimizer.muon")
    build_optimizer(spec, nn.Linear(2, 2, bias=False), CPU)


class Unscheduled(torch.optim.SGD):
    """An optimizer that finds its own lr, as Adafactor can."""

    def __init__(self, params: Any, lr: float | None = None):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = lr


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "swin_t"])
def test_torchvisions_models_get_deeper_in_the_order_of_their_parameters(name: str) -> None:
    """Numbers of parts inside a block (MBConv's, CNBlock's) are no depth."""
    import torchvision

    with torch.device("meta"):
        found = list(depths(getattr(torchvision.models, name)())[0].values())
    assert found == sorted(found)
    assert len({*found}) > 10
