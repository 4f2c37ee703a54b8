"""What training computes for one micro-batch: model, task, precision and loss scale, forward and backward on one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.objective.modules import Modules
from dist_train.objective.precision import Precision
from dist_train.task.counting import Counting, pairs_of
from dist_train.task.task import Task
from dist_train.task.terms import Computed, computed, mean_of, ratios
from dist_train.watch.status import BACKWARD, status

if TYPE_CHECKING:
    from dist_train.data.plan import MicroBatch, StepWork


Item = Any  # what one forward takes: a micro-batch on the device, and what an `Objective` adds to it


class StepSums(NamedTuple):
    """Of a step, over all ranks and micro-batches: loss sum (0-dim, on the device), its weight, and the pairs of `term_sums`."""

    loss: Tensor
    weight: Tensor | float
    """0-dim and on the device, or a number that the host knows."""
    terms: Tensor | None = None
    """(k, 2) in float64."""


def step_sums(reported: Tensor) -> StepSums:
    """The sums of a step from what was reduced: weight, loss sum, then (sum, weight) of each named loss."""
    terms = reported[2:].double().view(-1, 2) if len(reported) > 2 else None
    return StepSums(reported[1], reported[0], terms)


def reported(output: Computed, like: Tensor) -> Tensor:
    """What is reduced of an output, with the dtype of `like`: its weight, its loss sum, then the pairs of `term_sums`."""
    numbers = [output.weight, output.loss if output.value is None else output.value]
    numbers += [number for term in output.terms.values() for number in term[:2]]
    scalars = torch.stack([
        number.detach().to(like, non_blocking=True)
        if isinstance(number, Tensor)
        else torch.full((), number, dtype=like.dtype, device=like.device)  # as_tensor would wait for the device
        for number in numbers
    ])  # fmt: skip
    return scalars if output.counts is None else torch.cat([scalars, output.counts.to(like)])


class Objective:
    """The training forward.

    Attributes:
        modules: the model, with the parameters and buffers of loss and task.
        scaler: the loss scale of fp16; None in other precisions.
        ranks: how many processes the gradients are summed over.
        draws_from_torch: its random numbers are torch's alone (see `draws_from_torch_alone`).
        summed: the loss asks for a plain sum over samples (see `Loss.summed`).
        terms: the names of the losses that it is the sum of, once a forward has shown them; None before.
    """

    def __init__(
        self,
        modules: Modules,
        task: Task,
        precision: Precision,
        scaler: torch.amp.GradScaler | None = None,
        ranks: int = 1,
        draws_from_torch: bool = False,
    ):
        self.modules, self.task, self.precision, self.scaler = modules, task, precision, scaler
        self.model, self.ranks, self.draws_from_torch = modules.model, ranks, draws_from_torch
        self.summed: bool = getattr(task, "summed", False)
        own = getattr(getattr(task, "loss", None), "exact", None)
        self.terms: list[str] | None = [] if own else None  # torch's own losses give one
        self.ratios: list[float] = []  # of the losses' weights, once a forward has shown them
        self.factors: list[float] = []  # of losses with denominators of their own, in the last step

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that it trains, by name."""
        return self.modules.trained()

    def items(
        self, work: StepWork, prepare: Callable[[MicroBatch, StepWork], Any]
    ) -> Iterator[tuple[MicroBatch, Item]]:
        """What this rank computes in a step: each micro-batch, and what `forward` takes for it."""
        for micro in work.micro_batches:
            yield micro, prepare(micro, work)

    def forward(self, item: Item) -> Computed:
        """What the task gives for a micro-batch on the device, under autocast. Raises as `trainable`."""
        if self.precision.name == "fp32":
            output = trainable(computed(self.task.step(self.model, item)))
        else:
            with self.precision.autocast():
                output = trainable(computed(self.task.step(self.model, item)))
        return self.checked(output) if output.terms or self.terms != [] else output

    def checked(self, output: Computed) -> Computed:
        """The output, if the sums of its losses may be divided after the backward. Raises as `same_terms`, and:

        Raises:
            ValueError: the losses have weights of their own, which the task doesn't give beforehand.
        """
        self.same_terms(output)
        if not output.terms:
            return output
        found = ratios(output)
        self.ratios = self.ratios or found
        if not output.shared or (found != self.ratios and math.dist(found, self.ratios) > 1e-9):
            raise ValueError(
                f"the losses {', '.join(output.terms)} have weights of their own that depend on the batch, by which one backward "
                "can't divide afterwards: give the task a method weights(batch) that returns {name: weight}, or one weight to all"
            )
        return output

    @property
    def pairs(self) -> int:
        """How many pairs of sums are reduced beside the loss: of its parts, then of the training batches' metrics."""
        return len(self.terms or ()) + pairs_of(self.task)

    def means(self, sums: list[list[float]]) -> dict[str, float]:
        """loss, those of its parts and the metrics over several steps, from (sum, weight) of the loss and all `pairs`."""
        (total, weight), *rest = sums
        names = self.terms or []
        terms, counts = rest[: len(names)], rest[len(names) :]
        row = {"loss": mean_of(self.factors, terms) if self.factors else mean_of([1.0], [(total, weight)])}
        row |= {
            f"loss/{name}": part / own if own else math.nan for name, (part, own) in zip(names, terms, strict=False)
        }
        task: Any = self.task
        counted = isinstance(task, Counting) and len(counts) == task.pairs  # not before the first step
        return row | task.results(counts) if counted else row

    def same_terms(self, output: Computed) -> None:
        """Raises ValueError: the task has given other losses before."""
        if self.terms is None:
            self.terms = list(output.terms)
        if list(output.terms) != self.terms:
            before, now = (", ".join(names) or "one without a name" for names in (self.terms, output.terms))
            raise ValueError(
                f"the task has given the losses {before} before, and now {now}: give the same ones for each batch, those that "
                "don't apply as (zero, 0)"
            )


def trainable(output: Computed) -> Computed:
    """What a task gave, in training.

    Raises:
        ValueError: the loss isn't real or has no gradient, or its weight has one.
    """
    if not output.loss.requires_grad or output.loss.is_complex():
        found = "a complex number" if output.loss.is_complex() else "one without a gradient"
        raise ValueError(
            f"expected a real loss that depends on a trainable parameter, found {found}: it was computed from detached values, "
            "under no_grad or by an operation without a gradient (argmax, a comparison), or the model returns only frozen outputs"
        )
    weights = [output.weight] if not output.terms else [output.weight, *(term.weight for term in output.terms.values())]
    for weight in weights:
        if isinstance(weight, Tensor) and weight.requires_grad:
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
        self._terms: Tensor | None = None
        self._factor = (0.0, torch.empty(0))

    def warm_up(self, item: Item, rewind: Callable[[], object]) -> None:
        pass

    def forward_backward(self, item: Item, micro: MicroBatch, *, scale: float) -> None:
        output = self.objective.forward(item)
        loss, scaler = output.loss, self.objective.scaler
        status.phase = BACKWARD
        if scaler is not None:
            scaler.scale(loss * scale).backward()
        else:  # a factor given to backward costs nothing; a product in the forward would be two more kernels
            if self._factor[0] != scale:
                self._factor = (scale, torch.full_like(loss, scale))
            backward(loss, self._factor[1])
        loss = loss.detach() if output.value is None else output.value
        if self._loss is None:
            self._loss, self._weight = loss, output.weight
        else:
            self._loss, self._weight = self._loss.double() + loss, self._weight + output.weight
        if output.terms or output.counts is not None:
            terms = term_sums(output, loss.device)
            self._terms = terms if self._terms is None else self._terms + terms

    def finish(self) -> StepSums:
        assert self._loss is not None
        loss, weight, terms, self._loss, self._terms = self._loss, self._weight, self._terms, None, None
        return StepSums(loss, weight, terms)

    def close(self) -> None:
        pass


def backward(loss: Tensor, factor: Tensor) -> None:
    """`loss.backward(factor)`, whose check of the factor's shape imports sympy (half a second) and costs 10 us in each step."""
    if type(loss) is Tensor and loss.shape == factor.shape:
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (factor,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        loss.backward(factor)


def term_sums(output: Computed, device: torch.device) -> Tensor:
    """(k, 2) in float64: sum and weight of each named loss, then metrics' sums, without waiting for the device."""
    values = [number for term in output.terms.values() for number in term[:2]]
    made = [
        value.detach().double()
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=torch.float64, device=device)
        for value in values
    ]
    counts = [] if output.counts is None else [output.counts.to(device)]
    return torch.cat([*(number.view(1) for number in made), *counts]).view(-1, 2)


def check_all_used(trained: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError: after a backward, some parameters have no gradient; names them."""
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise ValueError(
            f"{len(unused)} parameter(s) took no part in the loss: {shown}. With several processes every gradient is waited for: "
            "freeze or remove them, or set distributed.find_unused_parameters=true (slower)"
        )
