"""Which parameter group each parameter belongs to: `optimizer.groups` and `optimizer.layer_decay`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_train.config.components import reserved
from dist_train.config.errors import ConfigError
from dist_train.models.depth import depths
from dist_train.models.transfer import match_parameters

_SELECTS = ("match", "ndim_below")  # keys of a group that choose its parameters; the others are its options


class Home(NamedTuple):
    """Where a parameter belongs.

    Attributes:
        group: the index of the config's group that takes it; None for the default one.
        layer: with `layer_decay`, its layer; else 0.
    """

    group: int | None
    layer: int


class Grouping:
    """The groups of a config's optimizer, for the parameters of a model that train now or later.

    A parameter is in the first of `groups` that matches it, else in the default group. With `layer_decay` each of them is one
    group for each layer, with `lr_scale` = layer_decay ** (number of layers above it), as in BEiT (Bao et al. 2021,
    https://arxiv.org/abs/2106.08254) and timm's `param_groups_layer_decay`; what a loss or task trains has 1.

    Attributes:
        decay: `layer_decay`, or None.
        home: of each parameter, by name, frozen ones included.
        key: that of the optimizer in the config, for messages.
        depth: the number of the last layer. found_by: what tells the layers.

    Raises:
        ConfigError: a pattern matches no parameter.
    """

    def __init__(self, modules: nn.Module, spec: Any, key: str = "optimizer"):
        self.key = key
        extra = reserved(spec, ("groups", "layer_decay"))[1]
        self.groups: list[dict[str, Any]] = extra.get("groups") or []
        self.decay: float | None = extra.get("layer_decay")
        self._parameters = dict(modules.named_parameters())
        taken: dict[str, int] = {}
        for index, group in enumerate(self.groups):
            patterns = group.get("match", "*")
            patterns = [patterns] if isinstance(patterns, str) else list(patterns)
            below = group.get("ndim_below")
            for name in match_parameters(modules, patterns, f"{key}.groups.{index}.match"):
                if below is None or self._parameters[name].ndim < below:
                    taken.setdefault(name, index)
        layers: dict[str, int] = {}
        self.depth, self.found_by = 0, ""
        if self.decay is not None:
            layers, self.found_by = depths(getattr(modules, "model", modules))
            self.depth = max(layers.values(), default=0)
        self.home = {name: Home(taken.get(name), layers.get(name, self.depth)) for name in self._parameters}

    def options(self, home: Home) -> dict[str, Any]:
        """The options of a group, as torch takes them, with `lr_scale` under `layer_decay`."""
        group = {} if home.group is None else self.groups[home.group]
        options = {key: value for key, value in group.items() if key not in _SELECTS}
        return options | ({} if self.decay is None else {"lr_scale": self.scale(home)})

    def scale(self, home: Home) -> float:
        """The factor of the lr that a layer has."""
        return 1.0 if self.decay is None else self.decay ** (self.depth - home.layer)

    def groups_of(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the default group, then the config's, each from the first layer to the last.

        Raises:
            ConfigError: there are no names, or a group of the config gets none of them.
        """
        if not names:
            message = "it has no parameter that requires a gradient, so there is nothing to train"
            raise ConfigError.single("model", message)
        members: dict[Home, list[nn.Parameter]] = {}
        for name in names:
            members.setdefault(self.home[name], []).append(self._parameters[name])
        for index, group in enumerate(self.groups):
            if not any(home.group == index for home in members):
                patterns = group.get("match", "*")
                shown = patterns if isinstance(patterns, str) else ", ".join(patterns)
                if group.get("ndim_below") is not None:
                    shown += f" (with fewer than {group['ndim_below']} dimensions)"
                message = f"{shown} matches no parameter that is left and trains"
                raise ConfigError.single(f"{self.key}.groups.{index}.match", message)
        order = sorted(members, key=lambda home: (-1 if home.group is None else home.group, home.layer))
        return [{"params": members[home], **self.options(home)} for home in order]

    def note(self, optimizer: torch.optim.Optimizer) -> str:
        """For the user: the lr of the layers under `layer_decay`, the first and the last ones; "" without it."""
        if self.decay is None:
            return ""
        first = {home.layer: name for name, home in reversed(self.home.items())}
        shares = {layer: self.scale(Home(None, layer)) for layer in sorted(first)}
        lr = float(optimizer.defaults["lr"])
        shown = [f"{lr * share:.3g} {first[layer]}" for layer, share in shares.items()]
        if len(shown) > 6:
            shown[3:-2] = ["..."]
        return f"{len(shares)} layers by {self.found_by}: {', '.join(shown)}"


def add_group(
    optimizer: torch.optim.Optimizer, members: Mapping[str, nn.Parameter], options: Mapping[str, Any]
) -> None:
    """`add_param_group`, with the parameters' names where the optimizer has them (torch refuses a mixture)."""
    has_names = "param_names" in optimizer.param_groups[0]
    optimizer.add_param_group({"params": list(members.items() if has_names else members.values()), **options})


def add_to_group(group: dict[str, Any], name: str, parameter: nn.Parameter) -> None:
    """Append a parameter to a group of an optimizer."""
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)


def scale_lr_by_layer(optimizer: torch.optim.Optimizer, key: str) -> None:
    """Let each step use `lr * lr_scale` of a group; outside a step `lr` is what the schedule says, the same for every layer.

    So any schedule keeps the ratio of the layers' lr, also one that sets the lr (OneCycleLR, a cosine down to `eta_min`).

    Raises:
        ConfigError: the optimizer has no lr.
    """
    if any(group.get("lr") is None for group in optimizer.param_groups):
        message = (
            f"{type(optimizer).__name__} has no lr here that could be scaled: give it one, or leave layer_decay out"
        )
        raise ConfigError.single(f"{key}.layer_decay", message)
    unscaled: list[Any] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        unscaled[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_scale", 1.0)

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, lr in zip(optimizer.param_groups, unscaled, strict=True):
            group["lr"] = lr

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
