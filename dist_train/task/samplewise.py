"""Whether a loss is a sum over samples, tried on the first batch: if it isn't, splitting into micro-batches changes training.

Contrastive losses (SimCLR, CLIP, VICReg, triplets within the batch) compare samples with each other, so micro-batches and ranks
change them. Tried in eval mode, where BatchNorm and dropout treat each sample by itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from dist_train.task.batch import HALF, clone_batch, map_parts, tensors_in
from dist_train.task.task import Task
from dist_train.task.terms import computed

REPEAT = 1e-5  # if two identical runs differ more, the loss draws random numbers or counts calls: no conclusion


class BatchDependence(NamedTuple):
    """The loss of `samples` samples over its weight (a plain sum: over their number), computed at once and in two halves."""

    samples: int
    whole: float
    halves: float


def batch_dependence(task: Task, model: nn.Module, batch: Any, *, length: int, samples: int) -> BatchDependence | None:
    """How a batch's loss differs from that of its halves; None if it doesn't, or if that can't be determined.

    Call it in eval mode and without gradients. It runs the model on the first `samples` of `length`, and on each half.
    """
    half, compiled = samples // 2, getattr(model, "_compiled_call_impl", None)
    if half == 0 or any(_uses_batch_statistics(module) for module in model.modules()):
        return None
    if compiled is not None:
        model._compiled_call_impl = None  # compiling for three more shapes would take minutes
    try:
        whole, *halves, again = [
            _losses(task, model, clone_batch(rows_of(batch, length, rows)))
            for rows in (slice(0, 2 * half), slice(0, half), slice(half, 2 * half), slice(0, 2 * half))
        ]
    except Exception:  # of another form; if something is wrong with it, training reports it
        return None
    finally:
        if compiled is not None:
            model._compiled_call_impl = compiled
    tolerance, summed = _tolerance(model), getattr(task, "summed", False)
    for of_whole, one, other, repeated in zip(whole, *halves, again, strict=True):
        divisors = (2.0 * half, 2.0 * half) if summed else (of_whole[1], one[1] + other[1])
        if not all(math.isfinite(value) for pair in (of_whole, one, other, repeated) for value in pair) or not all(
            divisors
        ):
            continue
        found = BatchDependence(2 * half, of_whole[0] / divisors[0], (one[0] + other[0]) / divisors[1])
        size = (abs(of_whole[0]) + abs(one[0]) + abs(other[0])) / abs(divisors[0])
        steady = abs(of_whole[0] - repeated[0]) / abs(divisors[0]) <= REPEAT * size
        if steady and abs(found.whole - found.halves) > tolerance * size + REPEAT:
            return found
    return None


def _uses_batch_statistics(module: nn.Module) -> bool:
    """A BatchNorm without running statistics: in eval mode too it uses the batch's."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def _tolerance(model: nn.Module) -> float:
    """How far kernels for other batch sizes may differ: TF32 and half precision more than float32."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return 2e-2 if dtypes & set(HALF) else 1e-3 if next(model.parameters()).is_cuda else 1e-4


def _losses(task: Task, model: nn.Module, batch: Any) -> list[tuple[float, float]]:
    """Sum and weight of the loss, or of each named loss."""
    output = computed(task.step(model, batch))
    parts = [term[:2] for term in output.terms.values()] or [(output.loss, output.weight)]
    return [(float(total), float(weight)) for total, weight in parts]


def rows_of(value: Any, length: int, rows: slice) -> Any:
    """Some samples of a batch: rows of its tensors, items of its lists of samples.

    Raises:
        ValueError: it holds something that can't be split into `length` samples.
    """
    if isinstance(value, Tensor):
        if not value.dim() or len(value) != length:
            raise ValueError("not a collection of samples")
        return value[rows]
    if type(value) in (list, tuple):
        inside = {len(tensor) if tensor.dim() else 0 for tensor in tensors_in(value)}
        if len(value) == length and inside != {length}:
            return value[rows]
        if not inside:
            raise ValueError("not a collection of samples")
    return map_parts(lambda part: rows_of(part, length, rows), value)
