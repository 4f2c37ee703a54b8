"""What training computes for one micro-batch: model, task, precision and loss scale, forward and backward on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.step.modules import Modules
from dist_train.step.precision import Precision
from dist_train.task.task import StepOutput, Task, as_step_output
from dist_train.watch.status import BACKWARD, status


class Objective:
    """The training forward.

    Attributes:
        modules: the model, with the parameters and buffers of loss and task.
        scaler: the loss scale of fp16; None in other precisions.
        summed: the loss asks for a plain sum over samples (see `Loss.summed`).
    """

    def __init__(self, modules: Modules, task: Task, precision: Precision, scaler: torch.amp.GradScaler | None = None):
        self.modules, self.task, self.precision, self.scaler = modules, task, precision, scaler
        self.model = modules.model
        self.summed: bool = getattr(task, "summed", False)

    def forward(self, batch: Any) -> StepOutput:
        """The task's output for a micro-batch on the device, under autocast. Raises as `trainable_output`."""
        with self.precision.autocast():
            return trainable_output(self.task.step(self.model, batch))


def trainable_output(value: Any) -> StepOutput:
    """What a task's `step` returned, in training.

    Raises:
        ValueError: the loss isn't real or has no gradient, or its weight has one.
    """
    output = as_step_output(value)
    if not output.loss.requires_grad or output.loss.is_complex():
        found = "a complex number" if output.loss.is_complex() else "one without a gradient"
        raise ValueError(
            f"expected a real loss that depends on a trainable parameter, found {found}: it was computed from detached values, "
            "under no_grad or by an operation without a gradient (argmax, a comparison), or the model returns only frozen outputs"
        )
    if isinstance(output.weight, Tensor) and output.weight.requires_grad:
        raise ValueError(
            "the weight of a loss is what it is divided by, so it must not depend on parameters: detach() it"
        )
    return output


class SingleProcess:
    """The `Reducer` of one process: gradients accumulate where they are computed."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self._loss: Tensor | None = None
        self._weight: Tensor | float = 0.0
        self._factor = (0.0, torch.empty(0))

    def warm_up(self, batch: Any, rewind: Callable[[], object]) -> None:
        pass

    def forward_backward(self, batch: Any, *, scale: float, zero_weight: bool, last: bool) -> None:
        output = self.objective.forward(batch)
        loss, scaler = output.loss, self.objective.scaler
        status.phase = BACKWARD
        if scaler is not None:
            scaler.scale(loss * scale).backward()
        else:  # a factor given to backward costs nothing; a product in the forward would be two more kernels
            if self._factor[0] != scale:
                self._factor = (scale, torch.full_like(loss, scale))
            loss.backward(self._factor[1])
        loss = loss.detach()
        if self._loss is None:
            self._loss, self._weight = loss, output.weight
        else:
            self._loss, self._weight = self._loss.double() + loss, self._weight + output.weight

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self._loss is not None
        loss, weight, self._loss = self._loss, self._weight, None
        return loss, weight if isinstance(weight, Tensor) else torch.full_like(loss, weight, dtype=torch.float64)

    def close(self) -> None:
        pass


def check_all_used(trained: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError: after a backward, some parameters have no gradient; names them."""
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise ValueError(
            f"{len(unused)} parameter(s) took no part in the loss: {shown}. With several processes every gradient is waited for: "
            "freeze or remove them, or set distributed.find_unused_parameters=true (slower)"
        )
