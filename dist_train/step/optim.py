"""The optimizer with its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_train.config.components import build, locate, reserved, signature
from dist_train.step.groups import Grouping, scale_lr_by_layer
from dist_train.step.parameters import fill_momentum, is_dense, sparse_parameters

RESERVED = ("groups", "layer_decay")


def build_optimizer(spec: Any, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `optimizer:`; its groups are those of `Grouping`.

    A fused kernel is used where the class has one and the config names neither `fused` nor `foreach`: it is the fastest, and
    it can skip an update by a flag on the device.

    Raises:
        ConfigError: a group matches no parameter, there is nothing to train, or `layer_decay` has no lr to scale.
    """
    own, _ = reserved(spec, RESERVED)
    grouping = Grouping(model, spec)
    groups = grouping.groups_of([name for name, parameter in model.named_parameters() if parameter.requires_grad])
    if isinstance(own, dict):
        form = signature(locate(own["_target_"]))
        plain = device.type in ("cpu", "cuda") and all(
            p.is_floating_point() and is_dense(p) for p in model.parameters()
        )
        plain = plain and next(sparse_parameters(model), None) is None
        # torch's first step leaves dampening out, which is lost where that step is skipped (see `fill_momentum`).
        plain = plain and not any(group.get("dampening") for group in (own, *groups))
        if plain and form and "fused" in form.parameters and not {"fused", "foreach", "differentiable"} & own.keys():
            own = {**own, "fused": True}
        optimizer = build(own, groups)
    else:
        optimizer = own(groups) if callable(own) else own
    fill_momentum(optimizer)
    if grouping.decay is not None:
        scale_lr_by_layer(optimizer)
    return optimizer


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has `train()` and `eval()`, between which it changes the weights, as schedulefree's optimizers do."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
