"""How a batch becomes a loss: the default for (inputs, target), and the interface for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_train.task.batch import tensors_in
from dist_train.task.losses import Loss


@dataclass(slots=True)
class StepOutput:
    """What a task makes of one batch.

    Attributes:
        loss: the loss summed over the batch (0-dim tensor); the engine divides by the weight of the global batch.
        weight: what it is to be divided by: a number, or a 0-dim tensor where it depends on the targets.
        outputs: the model's outputs, for the metrics.
        targets: the targets, for the metrics.
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

    A tuple of inputs is spread over the model's arguments, a dict goes by name. The loss runs outside autocast, in float32.
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
        return call_model(model, batch[0] if _is_pair(batch) else batch)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """A batch as (inputs, target).

    Raises:
        ValueError: it isn't a pair.
    """
    if _is_pair(batch):
        return batch[0], batch[1]
    kind = f"a {type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else f"a {type(batch).__name__}"
    raise ValueError(
        f"the default task expects a batch of (inputs, target), but the dataset's samples collate to {kind}; return "
        "(inputs, target) from __getitem__, or name a `task` with step(model, batch) and predict(model, batch)"
    )


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) == 2


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model on its inputs: a tuple or list is spread, a dict goes by name, anything else is the one argument."""
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def as_step_output(value: StepOutput | tuple[Any, ...]) -> StepOutput:
    """A task's answer, which may be a plain tuple.

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
