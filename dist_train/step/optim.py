"""The optimizer with its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_train.config.components import build, locate, reserved, signature
from dist_train.config.errors import ConfigError
from dist_train.models.transfer import match_parameters
from dist_train.step.parameters import fill_momentum, is_dense, sparse_parameters


def build_optimizer(spec: Any, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `optimizer:`; groups take parameters by name pattern, the rest are in the first group.

    A fused kernel is used where the class has one and the config names neither `fused` nor `foreach`: it is the fastest, and
    it can skip an update by a flag on the device.

    Raises:
        ConfigError: a group matches no parameter, or there is nothing to train.
    """
    own, extra = reserved(spec, {"groups"})
    groups = _grouped(model, extra.get("groups") or [])
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
    return optimizer


def _grouped(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups, in the config's order after the default one; the first pattern that matches takes a parameter."""
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not left:
        raise ConfigError.single("model", "it has no parameter that requires a gradient, so there is nothing to train")
    result = []
    for index, group in enumerate(groups):
        key, patterns = f"optimizer.groups.{index}.match", _patterns(group)
        taken = [name for name in match_parameters(model, patterns, key) if name in left]
        if not taken:
            raise ConfigError.single(key, f"{', '.join(patterns)} matches no parameter that is left and trains")
        options = {name: value for name, value in group.items() if name != "match"}
        result.append({"params": [left.pop(name) for name in taken], **options})
    return [{"params": list(left.values())}, *result] if left else result


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has `train()` and `eval()`, between which it changes the weights, as schedulefree's optimizers do."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def group_indices(modules: nn.Module, spec: Any) -> dict[str, int | None]:
    """For each parameter, by name, the index of the config's group whose pattern takes it; None for the default group."""
    groups = reserved(spec, {"groups"})[1].get("groups") or []
    home: dict[str, int | None] = dict.fromkeys(name for name, _ in modules.named_parameters())
    for index, group in enumerate(groups):
        for name in match_parameters(modules, _patterns(group), f"optimizer.groups.{index}.match"):
            home[name] = index if home.get(name) is None else home[name]
    return home


def _patterns(group: dict[str, Any]) -> list[str]:
    return [group["match"]] if isinstance(group["match"], str) else list(group["match"])
