"""Whether the loss of a batch is that of its samples, found out on the first one: if it isn't, cutting changes training.

Contrastive losses (SimCLR, CLIP, VICReg, triplets within the batch) compare samples with each other, so that micro-batches and
ranks make another loss of them. In eval mode, without gradients, where BatchNorm and dropout treat each sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from dist_train.task.batch import HALF, copied, map_tensors, tensors_in
from dist_train.task.task import Task, as_step_output

AGAIN = (
    1e-5  # two runs of the same that are further apart: it draws numbers or counts its calls, so nothing can be told
)


class Parted(NamedTuple):
    """The loss of so many samples, divided by its weight (a plain sum by their number): of all at once, and of two halves."""

    samples: int
    whole: float
    halves: float


class _CannotTellError(Exception):
    """What a batch holds can't be cut into samples."""


def parted(task: Task, model: nn.Module, batch: Any, *, length: int, samples: int) -> Parted | None:
    """How a batch's loss differs from that of its halves; None where it doesn't, or where there is no telling.

    To be called in eval mode and without gradients. It runs the model on the first `samples` of `length`, and on each half.
    """
    half, function = samples // 2, getattr(model, "_compiled_call_impl", None)
    if half == 0 or any(_of_the_batch(module) for module in model.modules()):
        return None
    if function is not None:
        model._compiled_call_impl = None  # to compile it for three more shapes would take minutes
    try:
        whole, *halves, again = [
            _loss(task, model, copied(cut(batch, length, rows)))
            for rows in (slice(0, 2 * half), slice(0, half), slice(half, 2 * half), slice(0, 2 * half))
        ]
    except Exception:  # not of this form; whatever is wrong with it, training will say
        return None
    finally:
        if function is not None:
            model._compiled_call_impl = function
    divisors = (2.0 * half, 2.0 * half) if getattr(task, "summed", False) else (whole[1], halves[0][1] + halves[1][1])
    if not all(math.isfinite(value) for pair in (whole, *halves, again) for value in pair) or not all(divisors):
        return None
    found = Parted(2 * half, whole[0] / divisors[0], (halves[0][0] + halves[1][0]) / divisors[1])
    size = (abs(whole[0]) + abs(halves[0][0]) + abs(halves[1][0])) / abs(divisors[0])
    steady = abs(whole[0] - again[0]) / abs(divisors[0]) <= AGAIN * size
    return found if steady and abs(found.whole - found.halves) > _tolerance(model) * size + AGAIN else None


def _of_the_batch(module: nn.Module) -> bool:
    """A norm that takes the batch's statistics in eval mode too."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def _tolerance(model: nn.Module) -> float:
    """What kernels for other batch sizes may differ by: TF32 and half precision more than float32."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return 2e-2 if dtypes & set(HALF) else 1e-3 if next(model.parameters()).is_cuda else 1e-4


def _loss(task: Task, model: nn.Module, batch: Any) -> tuple[float, float]:
    output = as_step_output(task.step(model, batch))
    return float(output.loss), float(output.weight)


def cut(value: Any, length: int, rows: slice) -> Any:
    """Some samples of a batch: rows of its tensors, items of its lists of samples. Raises where they can't be told apart."""

    def take(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != length:
            raise _CannotTellError
        return tensor[rows]

    walk: Callable[[Any], Any] = lambda item: cut(item, length, rows)  # noqa: E731
    if type(value) is dict:
        return {key: walk(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        inside = {len(tensor) if tensor.dim() else 0 for tensor in tensors_in(value)}
        if len(value) == length and inside != {length}:
            return value[rows]
        if not inside:
            raise _CannotTellError
        return type(value)(map(walk, value))
    return map_tensors(take, value)
