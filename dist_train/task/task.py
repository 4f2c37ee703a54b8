"""How a batch becomes a loss: the default for (inputs, target), and the interface for everything else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_train.task.batch import call_model, is_pair, split_batch, tensors_in
from dist_train.task.losses import Loss


@dataclass(slots=True)
class StepOutput:
    """The result of a task for one batch.

    Attributes:
        loss: the loss summed over the batch (0-dim tensor); the engine divides it by the weight of the global batch.
        weight: a number, or a 0-dim tensor where it depends on the targets.
        outputs, targets: for the metrics.
    """

    loss: Tensor
    weight: Tensor | float
    outputs: Any = None
    targets: Any = None


@runtime_checkable
class Task(Protocol):
    """One class, used unchanged by train, evaluate and predict.

    `step` runs under autocast where the precision asks for it and returns a `StepOutput` or a tuple (loss summed over the
    batch, weight, outputs, targets), the last two as the metrics need them. `predict` returns the outputs for a batch
    that may have no target.
    """

    def step(self, model: nn.Module, batch: Any) -> StepOutput | tuple[Any, ...]:
        """The loss of a batch."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The outputs of a batch."""


class Supervised:
    """The default task: a batch is (inputs, target) and the loss is `loss(model(inputs), target)`.

    A tuple of inputs is spread over the model's arguments, a mapping is passed by name. The loss runs in float32, outside
    autocast.
    """

    def __init__(self, loss: Loss):
        self.loss = loss

    @property
    def summed(self) -> bool:
        """Whether the loss asks for a plain sum (see `Loss.summed`)."""
        return self.loss.summed

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """`loss(model(inputs), target)`.

        Raises:
            ValueError: the batch isn't (inputs, target), or the loss doesn't fit.
        """
        inputs, targets = split_batch(batch)
        outputs = call_model(model, inputs)
        device = next((tensor.device.type for tensor in tensors_in([outputs, batch])), "cpu")
        if not torch.is_autocast_enabled(device):
            return StepOutput(*self.loss.forward(outputs, targets), outputs, targets)
        with torch.autocast(device, enabled=False):
            return StepOutput(*self.loss.forward(outputs, targets), outputs, targets)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """`model(inputs)`; the batch may be (inputs, target) or the inputs alone."""
        return call_model(model, batch[0] if is_pair(batch) else batch)


def as_step_output(value: StepOutput | tuple[Any, ...]) -> StepOutput:
    """What a task's `step` returned, which may be a plain tuple.

    Raises:
        TypeError: it is neither a `StepOutput` nor a tuple of two to four, or its loss or weight isn't one number.
    """
    found: Any = type(value).__name__
    if isinstance(value, tuple) and 2 <= len(value) <= 4:
        value = StepOutput(*value)
    if isinstance(value, StepOutput):
        loss, weight = value.loss, value.weight
        if isinstance(loss, Tensor) and not loss.dim() and not (isinstance(weight, Tensor) and weight.dim()):
            return value
        found = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in (loss, weight)]
    raise TypeError(
        "a task's step must return (loss summed over the batch, weight), a 0-dim tensor and a number or 0-dim tensor, followed "
        f"by outputs and targets if metrics need them; found {found}. Of several losses return the sum"
    )


MAX_DEPTH = 3  # objects inside objects that `modules_in` searches
MAX_ITEMS = 1000  # of a collection: longer ones are data


def modules_in(value: Any, known: Collection[nn.Module] = ()) -> dict[str, nn.Module | nn.Parameter]:
    """Modules and parameters inside an object that may be none itself, except those `known`; named by where they are."""
    found: dict[str, nn.Module | nn.Parameter] = {}
    seen: set[int] = set()

    def search(value: Any, name: str, depth: int) -> None:
        if id(value) in seen or (isinstance(value, nn.Module) and value in known):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module | nn.Parameter):
            found[name] = value
        elif depth:
            for key, item in _inside(value):
                inner = str(key).replace(".", "_")
                search(item, f"{name}_{inner}" if name else inner, depth - 1)

    search(value, "", MAX_DEPTH)
    return found


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """What an object holds, by name."""
    if isinstance(value, functools.partial):
        return [("function", value.func), *enumerate(value.args), *value.keywords.items()]
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return list(items) if len(value) <= MAX_ITEMS else []
    if inspect.ismethod(value):
        return [("self", value.__self__)]
    return list(vars(value).items()) if hasattr(value, "__dict__") and not isinstance(value, type) else []
