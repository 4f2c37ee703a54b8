"""What a task gives for a batch: a loss, or several by name, each a sum and the weight that it is divided by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(slots=True)
class StepOutput:
    """The result of a task for one batch.

    Attributes:
        loss: the loss summed over the batch (0-dim tensor); the engine divides it by the weight of the global batch. Or several
            by name, whose sum is minimized: each a sum over the batch, with the `weight` below, or (sum, weight) or
            (sum, weight, factor); the factor, a number, is its share in the sum.
        weight: a number, or a 0-dim tensor where it depends on the targets; None if each named loss has its own.
        outputs, targets: for the metrics.
    """

    loss: Any
    weight: Tensor | float | None = None
    outputs: Any = None
    targets: Any = None


class Term(NamedTuple):
    """One of several losses of a batch: its sum (0-dim), the weight to divide it by, and its factor in what is minimized."""

    total: Tensor
    weight: Tensor | float
    factor: float = 1.0


@dataclass(slots=True)
class Computed:
    """A `StepOutput` with one loss to minimize.

    Attributes:
        loss: summed over the batch (0-dim tensor). weight: what it is divided by.
        terms: what it is the sum of, by name; empty where a task gives one loss.
        value: the loss for the records, where it isn't what the backward begins with.
        shared: the terms have one denominator, so that `loss` and `weight` may be summed over batches. Else the loss of several
            batches is the sum of factor * total / weight, with totals and weights over all of them.
        counts: float64 sums of metrics of the training batch, an even number of them (see `counting`).
    """

    loss: Tensor
    weight: Tensor | float
    outputs: Any = None
    targets: Any = None
    terms: dict[str, Term] = field(default_factory=dict)
    value: Tensor | None = None
    shared: bool = True
    counts: Tensor | None = None


def computed(value: Any) -> Computed:
    """What a task's `step` returned, which may be a plain tuple.

    Raises:
        TypeError: it is neither a `StepOutput` nor a tuple of two to four, or a loss or its weight isn't one number.
    """
    found: Any = type(value).__name__
    if isinstance(value, tuple) and 2 <= len(value) <= 4:
        value = StepOutput(*value)
    if isinstance(value, StepOutput):
        loss, weight = value.loss, value.weight
        if not isinstance(loss, Tensor) and isinstance(loss, Mapping):  # the check for Tensor is the quicker one
            terms = {str(name): _term(str(name), part, weight) for name, part in loss.items()}
            return _sum_of(terms, weight, value.outputs, value.targets)
        if _is_sum(loss) and _is_weight(weight):
            return Computed(loss, weight, value.outputs, value.targets)  # type: ignore[arg-type]
        found = [_kind(loss), _kind(weight)]
    elif isinstance(value, Computed):
        return value
    raise TypeError(
        "a task's step must return (loss summed over the batch, weight), a 0-dim tensor and a number or 0-dim tensor, followed "
        f"by outputs and targets if metrics need them; found {found}. Of several losses return a dict instead of the first, "
        "{name: sum, ...} or {name: (sum, weight), ...}"
    )


def _term(name: str, part: Any, weight: Any) -> Term:
    if name == "loss":
        raise TypeError(
            "several losses are the parts of one, whose sum is recorded as `loss`: leave the total out of the dict"
        )
    given = part if isinstance(part, tuple) else (part, weight)
    if len(given) in (2, 3) and _is_sum(given[0]) and _is_weight(given[1]):
        factor = given[2] if len(given) == 3 else 1.0
        if isinstance(factor, int | float) and math.isfinite(factor):
            return Term(given[0], given[1], float(factor))
    raise TypeError(
        f"the loss {name} of a task's step must be a sum over the batch (a 0-dim tensor, with a weight as the second value that "
        "step returns), or (sum, weight) or (sum, weight, factor), the weight a number or 0-dim tensor and the factor a number; "
        f"found {', '.join(map(_kind, given))}"
    )


def _sum_of(terms: dict[str, Term], weight: Any, outputs: Any, targets: Any) -> Computed:
    """Several losses as one: exact for any split of the batch where their weights are the same, or a fixed ratio apart."""
    if not terms:
        raise TypeError("a task's step returned an empty dict of losses: return at least one, {name: sum}")
    base = next(iter(terms.values())).weight if weight is None else weight
    loss, shared = None, True
    for term in terms.values():
        factor: Any = term.factor
        if term.weight is not base:
            if isinstance(term.weight, Tensor) or isinstance(base, Tensor):
                shared = False
                break
            factor *= base / term.weight if term.weight else 0.0
        part = term.total if factor == 1.0 else term.total * factor
        loss = part if loss is None else loss + part
    if not shared:
        return combine(terms, {name: 1.0 / weight_of(term) for name, term in terms.items()}, 1.0, outputs, targets)
    assert loss is not None
    return Computed(loss, base, outputs, targets, terms)


def combine(
    terms: Mapping[str, Term],
    scales: Mapping[str, Tensor | float],
    weight: float,
    outputs: Any = None,
    targets: Any = None,
) -> Computed:
    """Losses with denominators of their own as the sum of factor * total * scale, over `weight`."""
    loss = torch.stack([(term.factor * term.total * scales[name]).double() for name, term in terms.items()]).sum()
    return Computed(loss, weight, outputs, targets, dict(terms), shared=False)


def mean_of(factors: Iterable[float], sums: Iterable[Sequence[float]]) -> float:
    """Losses with denominators of their own as one: the sum of factor * total / weight, from (total, weight) of each.

    One without weight is zero; nan where none has any.
    """
    parts = [factor * total / weight for factor, (total, weight) in zip(factors, sums, strict=True) if weight]
    return sum(parts) if parts else math.nan


def weight_of(term: Term) -> Tensor | float:
    """A term's weight, or inf where that is zero: its total is then zero, and so is its mean."""
    if isinstance(term.weight, Tensor):
        return torch.where(term.weight == 0, math.inf, term.weight.double())
    return term.weight or math.inf


def ratios(output: Computed) -> list[float]:
    """The weights that are numbers, relative to the first of them: for an exact gradient the same in each micro-batch."""
    weights = [output.weight, *(term.weight for term in output.terms.values())] if output.terms else []
    numbers = [weight for weight in weights if not isinstance(weight, Tensor)]
    return [number / numbers[0] if numbers[0] else 0.0 for number in numbers]


def _is_sum(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.dim()


def _is_weight(value: Any) -> bool:
    return _is_sum(value) or (isinstance(value, int | float) and not isinstance(value, bool))


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
