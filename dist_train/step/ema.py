"""An exponential moving average of the weights, used for evaluation and for the model that is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.task.batch import HALF


class EMA:
    """`average = decay * average + (1 - decay) * weights` after every optimizer step; buffers are the model's own.

    The average starts as the initial weights.
    """

    def __init__(self, modules: nn.Module, decay: float):
        self.decay, self._modules = decay, modules
        self._weights: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self.follow()

    def follow(self, names: Collection[str] = ()) -> None:
        """Take in parameters that train by now, and those called so; their average begins as what they are."""
        for name, parameter in self._modules.named_parameters():
            if name not in self._weights and (parameter.requires_grad or name in names):
                if parameter.dtype in HALF:
                    raise ConfigError.single(
                        "trainer.ema_decay",
                        f"{name} is {str(parameter.dtype).removeprefix('torch.')}, whose few digits swallow what an average "
                        "takes in a step: keep the weights in float32 (trainer.precision=bf16 for speed), or no average",
                    )
                self._weights[name], self._average[name] = parameter, parameter.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average as its weights inside, and its own again after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._weights.items():
            parameter.data, self._average[name] = self._average[name], parameter.data

    def restart(self) -> None:
        """Begin again with the weights as they are now."""
        for name, parameter in self._weights.items():
            self._average[name].copy_(parameter.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by parameter name."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved average; that of a parameter which was frozen then begins with its value now."""
        self.follow(state)
        for name, average in self._average.items():
            if name in state:
                average.copy_(state[name])


class OptimizerEMA(EMA):
    """The weights that an optimizer with `train()` and `eval()` of its own (schedulefree's) evaluates with, used as an EMA is.

    Its `eval()` computes them and its `train()` goes back, which rounds: training goes on with copies of its weights instead.
    """

    def __init__(self, modules: nn.Module, optimizer: Callable[[], torch.optim.Optimizer]):
        self._optimizer = optimizer
        self._loaded: dict[str, Tensor] | None = None
        super().__init__(modules, 0.0)
        self._average.clear()

    def follow(self, names: Collection[str] = ()) -> None:
        """Take in parameters that train by now."""
        self._weights = {name: p for name, p in self._modules.named_parameters() if p.requires_grad or name in names}

    @torch.no_grad()
    def update(self) -> None:
        """The optimizer has done it; what was loaded is history."""
        self._loaded = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """See `EMA`."""
        optimizer: Any = self._optimizer()
        raw = {name: parameter.detach().clone() for name, parameter in self._weights.items()}
        optimizer.eval()
        self._put(self._loaded or {})
        try:
            yield
        finally:
            optimizer.train()
            self._put(raw)

    def restart(self) -> None:
        """Nothing is kept here."""

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by parameter name."""
        with self.applied():
            return {name: parameter.detach().clone() for name, parameter in self._weights.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Use a saved average until the next step: the optimizer may be further by now."""
        self._loaded = state

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name in self._weights:
                self._weights[name].copy_(value)
