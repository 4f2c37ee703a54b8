"""EMA weights (exponential moving average, Polyak and Juditsky 1992), used for evaluation and for the final model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.task.batch import HALF


class EMA:
    """`average = decay * average + (1 - decay) * weights` after every optimizer step; buffers are the model's own.

    The average starts as the initial weights.

    Args:
        decay: of all parameters, or of those that are averaged each.
    """

    def __init__(self, modules: nn.Module, decay: float | Mapping[nn.Parameter, float]):
        self._decay, self._modules = decay, modules
        self._names: dict[float, list[str]] = {}  # by their decay
        self._weights: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self.follow()

    def follow(self, names: Collection[str] = ()) -> None:
        """Include the parameters that train now, and those named; their average starts as their current values."""
        for name, parameter in self._modules.named_parameters():
            decay = self._decay.get(parameter) if isinstance(self._decay, Mapping) else self._decay
            if decay is not None and name not in self._weights and (parameter.requires_grad or name in names):
                if parameter.dtype in HALF:
                    raise ConfigError.single(
                        "trainer.ema_decay",
                        f"{name} is {str(parameter.dtype).removeprefix('torch.')}, whose few digits swallow what an average "
                        "changes in a step: keep the weights in float32 (trainer.precision=bf16 for speed), or use no EMA",
                    )
                self._weights[name], self._average[name] = parameter, parameter.detach().clone()
                self._names.setdefault(decay, []).append(name)

    @torch.no_grad()
    def update(self) -> None:
        """Include the current weights."""
        for decay, names in self._names.items():
            weights: list[Tensor] = [self._weights[name] for name in names]
            torch._foreach_lerp_([self._average[name] for name in names], weights, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the EMA weights inside, and its own again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._weights.items():
            parameter.data, self._average[name] = self._average[name], parameter.data

    def restart(self) -> None:
        """Start over from the current weights."""
        for name, parameter in self._weights.items():
            self._average[name].copy_(parameter.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """The EMA weights, by parameter name."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore saved EMA weights; for a parameter that was frozen then, they start as its current values."""
        self.follow(state)
        for name, average in self._average.items():
            if name in state:
                average.copy_(state[name])


class OptimizerEMA(EMA):
    """The EMA weights of an optimizer that has `train()` and `eval()` (schedulefree's), between which it changes the weights.

    Its `eval()` computes them and its `train()` reverts that, with rounding: training continues with copies of its weights.
    """

    def __init__(self, modules: nn.Module, optimizer: Callable[[], torch.optim.Optimizer]):
        self._optimizer = optimizer
        self._loaded: dict[str, Tensor] = {}  # used until the next step: the optimizer may be further by now
        super().__init__(modules, 0.0)

    def follow(self, names: Collection[str] = ()) -> None:
        """Include the parameters that train now, and those named."""
        self._weights = {name: p for name, p in self._modules.named_parameters() if p.requires_grad or name in names}

    def update(self) -> None:
        """The optimizer has done it."""
        self._loaded = {}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        optimizer: Any = self._optimizer()
        raw = {name: parameter.detach().clone() for name, parameter in self._weights.items()}
        optimizer.eval()
        self._set_weights(self._loaded)
        try:
            yield
        finally:
            optimizer.train()
            self._set_weights(raw)

    def restart(self) -> None:
        """The optimizer starts over by itself."""

    def state_dict(self) -> dict[str, Tensor]:
        """The EMA weights, by parameter name."""
        with self.applied():
            return {name: parameter.detach().clone() for name, parameter in self._weights.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Use saved EMA weights until the next step."""
        self._loaded = state

    @torch.no_grad()
    def _set_weights(self, values: dict[str, Tensor]) -> None:
        for name in values.keys() & self._weights.keys():
            self._weights[name].copy_(values[name])
