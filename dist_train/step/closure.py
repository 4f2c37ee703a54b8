"""Optimizers that compute the gradient several times in a step (LBFGS, SAM): the whole global batch, with the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_train.objective.modules import BufferSnapshot
from dist_train.objective.objective import StepSums
from dist_train.task.batch import clone_batch

if TYPE_CHECKING:
    from dist_train.data.plan import StepWork


class Closure:
    """Gives an optimizer the loss of the global batch, and its gradient in every `.grad`, at the weights of the moment.

    Buffers and numbers of the model change once in a step, as its first forward changed them.
    """

    def __init__(self, compute: Callable[[], StepSums], parameters: Sequence[nn.Parameter], before: BufferSnapshot):
        self._compute, self._parameters, self._before = compute, parameters, before
        self._weights: list[Tensor] = []
        self._gradients: list[object] = []
        self._loss: Tensor | None = None

    def computed(self, sums: StepSums) -> None:
        """`sums`, and the gradients, are those of the weights as they are now."""
        self._loss = torch.where(torch.as_tensor(sums.weight == 0), 0.0, sums.loss / sums.weight)
        self._weights = [parameter.detach().clone() for parameter in self._parameters]
        self._gradients = self._now()

    def __call__(self) -> Tensor:
        """The mean loss (0-dim). Raises NonFiniteError as a step does."""
        if (
            self._loss is None
            or self._gradients != self._now()
            or not all(map(torch.equal, self._weights, self._parameters))
        ):
            self._before.restore()
            for parameter in self._parameters:
                parameter.grad = None
            with torch.enable_grad():
                self.computed(self._compute())
        assert self._loss is not None
        return self._loss.clone()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step."""
        after = BufferSnapshot(self._before.modules)
        optimizer.step(self)  # type: ignore[arg-type]
        after.restore()

    def _now(self) -> list[object]:
        """What changes with another gradient, and with any change of one; weights may change behind autograd's back (`.data`)."""
        return [(id(p.grad), None if p.grad is None else p.grad._version) for p in self._parameters]


def replayed(
    work: StepWork, gradient: Callable[[StepWork], StepSums], parameters: Sequence[nn.Parameter], before: BufferSnapshot
) -> tuple[StepWork, Closure]:
    """A step whose micro-batches are kept, and the closure that computes its gradient again; `before`: buffers before it."""
    micros = list(work.micro_batches)

    def again() -> StepWork:
        copies = (micro._replace(batch=clone_batch(micro.batch)) for micro in micros)
        return replace(work, micro_batches=copies)

    return again(), Closure(lambda: gradient(again()), parameters, before)
