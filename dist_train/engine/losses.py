"""A loss as (sum, weight): what is summed over samples, ranks and micro-batches, and the one number it is divided by.

The mean of means is wrong wherever the denominators differ: class weights, `ignore_index`, `reduction="sum"`, a short last
batch (transformers #34191 was such a bug). So every loss here yields a sum and its own denominator, the sums are added up,
and one division by the global weight follows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.SmoothL1Loss, nn.HuberLoss)
CLASSWISE = (nn.CrossEntropyLoss, nn.NLLLoss)

_MODULE_OF = {
    nn.functional.cross_entropy: nn.CrossEntropyLoss,
    nn.functional.nll_loss: nn.NLLLoss,
    nn.functional.mse_loss: nn.MSELoss,
    nn.functional.l1_loss: nn.L1Loss,
    nn.functional.smooth_l1_loss: nn.SmoothL1Loss,
    nn.functional.huber_loss: nn.HuberLoss,
    nn.functional.binary_cross_entropy: nn.BCELoss,
    nn.functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


class Loss(nn.Module):
    """Any loss function, called with (outputs, targets), as a sum and the weight to divide it by.

    Known exactly: torch's own losses, as modules or functions; a function that returns one value a sample; a function that
    returns (sum, weight). A function that returns one number is taken for a mean over the samples of the micro-batch.

    Attributes:
        summed: the loss asks for the plain sum (`reduction="sum"`): gradients aren't divided, logs show the mean over samples.
        exact: None until the first call, then whether the denominator is known, so that the gradient of several micro-batches
            is that of one big batch.
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        base, given = (function.func, function.keywords) if isinstance(function, functools.partial) else (function, {})
        if base in _MODULE_OF:
            function = _MODULE_OF[base](**given)
        self.name = getattr(function, "__name__", None) or getattr(base, "__name__", type(function).__name__)
        reduction = getattr(function, "reduction", None) if isinstance(function, nn.Module) else None
        self.summed = reduction == "sum"
        self.exact: bool | None = None
        self.function: Any = function
        self._checked = False
        torch_made = isinstance(function, nn.Module) and type(function).__module__.startswith("torch.nn")
        if torch_made and isinstance(function, ELEMENTWISE):
            self._measure: Callable[[Any, Any], tuple[Tensor, Tensor | float]] = self._elementwise
            self.function = _with_reduction(self.function, "sum")
        elif torch_made and isinstance(function, CLASSWISE):
            self._measure = self._classwise
            self.function = _with_reduction(self.function, "sum")
        elif torch_made and reduction == "mean" and not isinstance(function, nn.CTCLoss):
            self._measure = self._generic
            self.function = _with_reduction(self.function, "none")
        elif torch_made and isinstance(function, nn.KLDivLoss) and reduction == "batchmean":
            self._measure = self._batchmean
            self.function = _with_reduction(self.function, "sum")
        else:
            self._measure = self._generic

    def forward(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor | float]:
        """The loss summed over this micro-batch (0-dim, float32 or float64), and its weight (a number or a 0-dim tensor).

        Raises:
            ValueError: outputs and targets don't fit the loss; the message says what it expects and what it got.
        """
        outputs = _in_full_precision(outputs)
        if self._measure != self._generic:
            for what, value in (("model's outputs", outputs), ("targets", targets)):
                if not isinstance(value, Tensor):
                    inside = (
                        f" of {type(next(iter(value))).__name__}" if isinstance(value, list | tuple) and value else ""
                    )
                    raise ValueError(
                        f"{self.name} expects the {what} as one tensor, but found a {type(value).__name__}{inside}; for words as "
                        "labels return their numbers from the dataset, for anything else name a `task`"
                    )
        return self._measure(outputs, targets)

    def _elementwise(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float]:
        self.exact = True
        if outputs.shape != targets.shape:
            outputs, targets = self._squeezed(outputs, targets)
        if targets.dtype != outputs.dtype:
            targets = targets.to(outputs.dtype)
        if not self._checked:
            self._check_values(outputs, targets)
        total = self.function.forward(outputs, targets)
        return total, (len(outputs) if self.summed else outputs.numel())

    def _squeezed(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A trailing 1 is dropped, as in (N, 1) against (N,); torch would broadcast that to (N, N) with only a warning."""
        if outputs.shape[:-1] == targets.shape and outputs.shape[-1:] == (1,):
            return outputs.squeeze(-1), targets
        if targets.shape[:-1] == outputs.shape and targets.shape[-1:] == (1,):
            return outputs, targets.squeeze(-1)
        raise ValueError(
            f"{self.name} compares outputs and targets element by element, so it expects equal shapes (up to a last "
            f"dimension of 1), but the model gave {_shape(outputs)} and the targets are {_shape(targets)}; check the model's "
            "last layer, or what the dataset returns as target"
        )

    def _check_values(self, outputs: Tensor, targets: Tensor) -> None:
        """On the first batch only: it reads values."""
        self._checked = True
        if isinstance(self.function, nn.BCELoss | nn.BCEWithLogitsLoss) and targets.numel():
            low, high = float(targets.min()), float(targets.max())
            if low < 0 or high > 1:
                raise ValueError(f"{self.name} expects targets between 0 and 1, but they go from {low:g} to {high:g}")
        if isinstance(self.function, nn.BCELoss) and outputs.numel():
            low, high = float(outputs.detach().min()), float(outputs.detach().max())
            if low < 0 or high > 1:
                raise ValueError(
                    f"BCELoss expects probabilities between 0 and 1, but the model's outputs go from {low:g} to {high:g}: end "
                    "the model with a Sigmoid, or use torch.nn.BCEWithLogitsLoss"
                )

    def _classwise(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float]:
        self.exact = True
        if targets.is_floating_point():
            return self._probabilities(outputs, targets)
        if targets.dtype != torch.int64:
            targets = targets.long()
        if not self._checked:
            self._check_classes(outputs, targets)
        total = self.function.forward(outputs, targets)
        if self.summed:
            return total, len(targets)
        kept = targets != self.function.ignore_index
        if self.function.weight is None:
            return total, kept.sum()
        weights = self.function.weight[targets.where(kept, 0)]
        return total, weights.where(kept, 0).sum()

    def _probabilities(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float]:
        if isinstance(self.function, nn.NLLLoss) or outputs.shape != targets.shape:
            raise ValueError(
                f"{self.name} expects targets that are class numbers (int64, one for each of the outputs' {_shape(outputs)}) "
                f"or, for CrossEntropyLoss, class probabilities of the outputs' shape, but got {_shape(targets)} of "
                f"{targets.dtype}; "
                "for labels stored as floats return int(label) from the dataset"
            )
        total = self.function(outputs, targets.to(outputs.dtype))
        return total, (len(outputs) if self.summed else outputs.numel() // outputs.shape[1 if outputs.dim() > 1 else 0])

    def _check_classes(self, outputs: Tensor, targets: Tensor) -> None:
        """On the first batch only: it reads values. On CUDA a label out of range is a device assertion, which names nothing."""
        self._checked = True
        if outputs.dim() < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
            raise ValueError(
                f"{self.name} expects outputs of shape (N, classes, ...) and targets of shape (N, ...), but the model gave "
                f"{_shape(outputs)} and the targets are {_shape(targets)}"
            )
        kept = targets[targets != self.function.ignore_index]
        classes = outputs.shape[1]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= classes):
            raise ValueError(
                f"{self.name}: the model has {classes} outputs, so labels must be 0 to {classes - 1}, but this batch's labels go "
                f"from {int(kept.min())} to {int(kept.max())}; change the model's last layer or the dataset's labels"
            )

    def _batchmean(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float]:
        self.exact = True
        return self.function(outputs, targets), len(outputs)

    def _generic(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor | float]:
        value = self.function(outputs, targets)
        if isinstance(value, tuple) and len(value) == 2:
            self.exact = True
            return value[0], value[1]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the loss {self.name} must return a tensor, or a tuple (sum, weight), but returned {type(value).__name__}"
            )
        if value.dim() > 0:
            self.exact = True
            return value.sum(), (len(value) if self.summed else value.numel())
        samples = batch_length(targets)
        if self.summed:
            self.exact = True
            return value, samples
        self.exact = False
        return value * samples, samples


def batch_length(batch: Any) -> int:
    """The number of samples in a batch: the length of the first tensor found in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    for value in values:
        length = batch_length(value)
        if length:
            return length
    return 0


def _with_reduction(module: Any, reduction: str) -> Any:
    changed = copy.copy(module)
    changed.reduction = reduction
    return changed


def _in_full_precision(outputs: Any) -> Any:
    """bf16 and fp16 outputs of autocast as float32; the loss runs outside autocast."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    if isinstance(outputs, list | tuple):
        return type(outputs)(_in_full_precision(value) for value in outputs)
    if isinstance(outputs, dict):
        return {key: _in_full_precision(value) for key, value in outputs.items()}
    return outputs


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
