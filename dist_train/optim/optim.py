"""The optimizer with its parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as hooks
from torch.optim.lr_scheduler import LRScheduler

from dist_train.config.components import build, locate, reserved, signature
from dist_train.config.errors import ConfigError
from dist_train.optim.groups import Grouping, scale_lr_by_layer
from dist_train.optim.parameters import fill_momentum, is_dense, sparse_parameters
from dist_train.runtime.compiler import defer_compiler

_PROFILED: Any = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__
RESERVED = ("groups", "layer_decay", "named_parameters")


def build_optimizer(spec: Any, model: nn.Module, device: torch.device, key: str = "optimizer") -> torch.optim.Optimizer:
    """The optimizer of `optimizer:` (or another `key`); its groups are those of `Grouping`.

    One whose first argument is called `named_parameters`, or for which the config says so, gets (name, parameter) pairs, as
    torch's own take them.

    A fused kernel is used where the class has one and the config names neither `fused` nor `foreach`: it is the fastest, and
    it can skip an update by a flag on the device.

    Raises:
        ConfigError: a group matches no parameter, there is nothing to train, or `layer_decay` has no lr to scale, or Muon would
            get what isn't a matrix.
    """
    own, extra = reserved(spec, RESERVED)
    grouping = Grouping(model, spec, key)
    groups = grouping.groups_of([name for name, parameter in model.named_parameters() if parameter.requires_grad])
    if isinstance(own, dict) and locate(own["_target_"]) is torch.optim.Muon:
        _check_matrices(model, key)
    if isinstance(own, dict):
        defer_compiler(locate(own["_target_"]))
        form = signature(locate(own["_target_"]))
        plain = device.type in ("cpu", "cuda") and all(
            p.is_floating_point() and is_dense(p) for p in model.parameters()
        )
        plain = plain and next(sparse_parameters(model), None) is None
        # torch's first step leaves dampening out, which is lost where that step is skipped (see `fill_momentum`).
        plain = plain and not any(group.get("dampening") for group in (own, *groups))
        if plain and form and "fused" in form.parameters and not {"fused", "foreach", "differentiable"} & own.keys():
            own = {**own, "fused": True}
        first = next(iter(form.parameters), "") if form else ""
        wants_names = extra.get("named_parameters", first == "named_parameters")
        optimizer = build(own, _named(groups, model) if wants_names else groups)
    else:
        optimizer = own(groups) if callable(own) else own
    fill_momentum(optimizer)
    if grouping.decay is not None:
        scale_lr_by_layer(optimizer, key)
    return optimizer


def _check_matrices(model: nn.Module, key: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim != 2:
            raise ConfigError.single(
                key,
                f"torch.optim.Muon trains matrices only, but {name} has the shape {tuple(parameter.shape)}: give the others to a "
                "second optimizer, as in optimizer: {muon: {_target_: torch.optim.Muon, match: Linear.weight}, rest: {_target_: "
                "torch.optim.AdamW}}",
            )


def _named(groups: list[dict[str, Any]], model: nn.Module) -> list[Any]:
    """Groups with (name, parameter) pairs; where there is one without options, the pairs themselves."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [{**group, "params": [(names[id(p)], p) for p in group["params"]]} for group in groups]
    return named[0]["params"] if len(named) == 1 and len(named[0]) == 1 else named


def take_step(optimizer: Any) -> None:
    """`optimizer.step()`; where neither hooks nor a profiler see it, without what torch puts around it for them (20 us)."""
    step = bare_step(optimizer)
    # an LR scheduler wants to hear of the first one
    first = "step" in vars(optimizer) and not hasattr(optimizer, "_opt_called")
    if step is None or first or torch.autograd._profiler_enabled():
        optimizer.step()
    else:
        step(optimizer)


def bare_step(optimizer: Any) -> Callable[[Any], Any] | None:
    """What its `step` calls, if there is nothing around that but what torch puts there itself, and there are no hooks.

    By the code: what `functools.wraps` makes of torch's wrappers has their attributes, too.
    """
    step, own = type(optimizer).step, vars(optimizer).get("step")
    if getattr(step, "__code__", None) is not _PROFILED:
        return None
    observed = (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
    )
    return None if observed or not (own is None or _is_of_scheduler(own, step)) else step.__wrapped__


def _is_of_scheduler(own: Any, step: Any) -> bool:
    return _file_of(own) == _file_of(LRScheduler.step) and getattr(own, "__wrapped__", None) is step


def _file_of(function: Any) -> str | None:
    return getattr(getattr(function, "__code__", None), "co_filename", None)


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has `train()` and `eval()`, between which it changes the weights, as schedulefree's optimizers do."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
