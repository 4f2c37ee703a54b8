"""A loss as (sum, weight): what is summed over samples, micro-batches and ranks, and the number that the sum is divided by.

The mean of means is wrong wherever the denominators differ: class weights, `ignore_index`, `reduction="sum"`, a short last
batch (transformers #34191 was such a bug). So every loss here yields a sum and its own denominator; both are summed, and one
division by the global weight follows.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.task.batch import batch_length, in_full_precision

_ELEMENTWISE: dict[type[nn.Module], Any] = {
    nn.MSELoss: nn.functional.mse_loss,
    nn.L1Loss: nn.functional.l1_loss,
    nn.BCELoss: nn.functional.binary_cross_entropy,
    nn.BCEWithLogitsLoss: nn.functional.binary_cross_entropy_with_logits,
    nn.SmoothL1Loss: nn.functional.smooth_l1_loss,
    nn.HuberLoss: nn.functional.huber_loss,
    nn.PoissonNLLLoss: nn.functional.poisson_nll_loss,
    nn.KLDivLoss: nn.functional.kl_div,
    nn.HingeEmbeddingLoss: nn.functional.hinge_embedding_loss,
    nn.SoftMarginLoss: nn.functional.soft_margin_loss,
}
_CLASSWISE: dict[type[nn.Module], Any] = {
    nn.CrossEntropyLoss: nn.functional.cross_entropy,
    nn.NLLLoss: nn.functional.nll_loss,
}
_FEW = 512  # numbers that Python counts faster than two kernels do
_MODULE_OF = {function: kind for kind, function in (_ELEMENTWISE | _CLASSWISE).items()}
Weighted = tuple[Tensor, Tensor, Tensor | float]  # outputs and targets as torch's loss takes them, and their weight


class Loss(nn.Module):
    """Any loss function, called with (outputs, targets), as a sum and the weight to divide it by.

    Exact for torch's own losses, as modules or functions, and for a function that returns one value per sample or (sum, weight).
    A function that returns one number is assumed to be a mean over the samples of the micro-batch; if that is nan and all
    labels are negative (ignored), its weight is zero.

    Attributes:
        takes_tensor: it is torch's own, which takes outputs and targets as one tensor each.
        summed: the loss is a plain sum (`reduction="sum"`): gradients aren't divided, logs show the mean over samples.
        exact: the denominator is known, so the gradient of several micro-batches is that of one big batch; None before the
            first call of a loss that isn't torch's own.
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        base, given = (function.func, function.keywords) if isinstance(function, functools.partial) else (function, {})
        if base in _MODULE_OF:
            function = _MODULE_OF[base](**given)
        self.name = getattr(function, "__name__", None) or getattr(base, "__name__", type(function).__name__)
        reduction = getattr(function, "reduction", None) if isinstance(function, nn.Module) else None
        self.summed = reduction == "sum"
        self.takes_tensor = type(function).__module__.startswith("torch.nn")
        self._checked = False
        self._weigh: Callable[[Tensor, Tensor], Weighted] | None = None  # for torch's own losses
        if type(function).__module__.startswith("torch.nn"):
            if isinstance(function, tuple(_ELEMENTWISE)):
                self._weigh, reduction = (self._rows if reduction == "batchmean" else self._elements), "sum"
            elif isinstance(function, tuple(_CLASSWISE)):
                self._weigh, reduction = self._classes, "sum"
            elif reduction == "mean" and not isinstance(function, nn.CTCLoss):
                reduction = "none"
            function = copy.copy(function)
            function.reduction = reduction  # type: ignore[attr-defined]
        _check_form(function, self.name)
        self.function: Any = function
        self.exact: bool | None = None if self._weigh is None else True

    def forward(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """The loss summed over this micro-batch (0-dim, float32 or float64), and its weight (a number or a 0-dim tensor).

        Of a function that returns a dict: {name: (sum, weight)} and None.

        Raises:
            ValueError: outputs and targets don't fit the loss; says what was expected and found.
        """
        if type(outputs) is not Tensor or outputs.dtype is not torch.float32:
            outputs = in_full_precision(outputs)
        if self._weigh is None:
            return self._own(outputs, targets)
        if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
            what, found = ("targets", targets) if isinstance(outputs, Tensor) else ("model's outputs", outputs)
            raise ValueError(
                f"{self.name} expects the {what} as one tensor, but found a {type(found).__name__}; for words as labels "
                "return their numbers from the dataset; for anything else name a `task`"
            )
        outputs, targets, weight = self._weigh(outputs, targets)
        self._checked = True
        total = self.function.forward(outputs, targets)
        return total, (len(outputs) if self.summed else weight)

    def _elements(self, outputs: Tensor, targets: Tensor) -> Weighted:
        """Drops a trailing 1, as in (N, 1) against (N,): torch would broadcast that to (N, N) with only a warning."""
        if outputs.shape != targets.shape:
            if outputs.shape == (*targets.shape, 1):
                outputs = outputs.squeeze(-1)
            elif targets.shape == (*outputs.shape, 1):
                targets = targets.squeeze(-1)
            else:
                raise ValueError(
                    f"{self.name} compares outputs and targets element by element, so it expects equal shapes (up to a last "
                    f"dimension of 1), but the model gave {_shape(outputs)} and the targets are {_shape(targets)}; check the "
                    "model's last layer, or what the dataset returns as target"
                )
        targets = targets.to(outputs.dtype)
        if not self._checked and isinstance(self.function, nn.BCELoss | nn.BCEWithLogitsLoss):
            self._check_range("targets", targets, "check what the dataset returns as target")
            if isinstance(self.function, nn.BCELoss):
                self._check_range(
                    "outputs", outputs.detach(), "end the model with a Sigmoid, or use torch.nn.BCEWithLogitsLoss"
                )
        return outputs, targets, outputs.numel()

    def _check_range(self, what: str, values: Tensor, fix: str) -> None:
        """On the first batch only, as it reads values."""
        low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 1.0)
        if low < 0 or high > 1:
            raise ValueError(
                f"{self.name} expects {what} between 0 and 1, but they range from {low:g} to {high:g}: {fix}"
            )

    def _classes(self, outputs: Tensor, targets: Tensor) -> Weighted:
        weight = self.function.weight
        if weight is not None and weight.dtype != outputs.dtype:  # torch takes no float32 weights for a float64 model
            self.function.weight = weight = weight.to(outputs.dtype)
        if targets.is_floating_point():
            if isinstance(self.function, nn.NLLLoss) or outputs.shape != targets.shape or outputs.dim() < 2:
                raise ValueError(
                    f"{self.name} expects targets that are class numbers (int64, one for each of the outputs' "
                    f"{_shape(outputs)}) or, for CrossEntropyLoss, class probabilities of the outputs' shape, but got "
                    f"{_shape(targets)} of {targets.dtype}; for labels stored as floats return int(label) from the dataset"
                )
            return outputs, targets.to(outputs.dtype), outputs.numel() // outputs.shape[1]
        targets = targets.long()
        if not self._checked:
            self._check_labels(outputs, targets)
        if self.summed:
            return outputs, targets, 0.0
        if weight is None and targets.device.type == "cpu" and targets.dim() == 1 and len(targets) <= _FEW:
            return outputs, targets, len(targets) - targets.tolist().count(self.function.ignore_index)
        kept = targets != self.function.ignore_index
        if weight is None:
            return outputs, targets, kept.sum()
        return outputs, targets, weight[targets.where(kept, 0)].where(kept, 0).sum()

    def _check_labels(self, outputs: Tensor, targets: Tensor) -> None:
        """On the first batch only, as it reads values. On CUDA a label out of range is a device assertion that names nothing."""
        if outputs.dim() < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
            raise ValueError(
                f"{self.name} expects outputs of shape (N, classes, ...) and targets of shape (N, ...), but the model gave "
                f"{_shape(outputs)} and the targets are {_shape(targets)}"
            )
        kept = targets[targets != self.function.ignore_index]
        classes = outputs.shape[1]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= classes):
            raise ValueError(
                f"{self.name}: the model has {classes} outputs, so labels must be 0 to {classes - 1}, but this batch's labels "
                f"range from {int(kept.min())} to {int(kept.max())}; change the model's last layer or the dataset's labels"
            )

    def _rows(self, outputs: Tensor, targets: Tensor) -> Weighted:
        """KLDivLoss's `batchmean`."""
        outputs, targets, _ = self._elements(outputs, targets)
        return outputs, targets, len(outputs)

    def _own(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        value = self.function(outputs, targets)
        self.exact = True
        if isinstance(value, Mapping):
            parts = {
                str(name): self._one(part, outputs, targets, name=f"{self.name}'s {name}")
                for name, part in value.items()
            }
            return parts, None
        return self._one(value, outputs, targets, str(self.name), alone=True)

    def _one(
        self, value: Any, outputs: Any, targets: Any, name: str, alone: bool = False
    ) -> tuple[Tensor, Tensor | float]:
        if isinstance(value, tuple) and len(value) == 2:
            return _pair(name, *value)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the loss {name} must return one tensor (a mean, or one value per sample), a tuple (sum, weight), or a dict of "
                f"these by name, but returned a {type(value).__name__}"
            )
        if value.numel() != 1 or (value.dim() and batch_length(targets) == 1):
            return value.sum(), (len(value) if self.summed else value.numel())
        value, samples = value.reshape(()), _samples(outputs, targets)
        if self.summed:
            return value, samples
        self.exact = False
        if alone and isinstance(targets, Tensor) and targets.dtype == torch.int64:
            # The mean over nothing is nan: if all labels are negative, as an ignore_index is, the weight is zero.
            empty = value.isnan() & (targets < 0).all()
            return torch.where(empty, 0.0, value * samples), torch.where(empty, 0, samples)
        return value * samples, samples


def _pair(name: str, total: Any, weight: Any) -> tuple[Tensor, Tensor | float]:
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError(
            f"the loss {name} returned two values, which are taken as (sum, weight), but the second depends on "
            "the model too, so it is another loss: return one loss, the sum of its parts"
        )
    single = isinstance(total, Tensor) and total.numel() == 1
    if not single or (weight.numel() != 1 if isinstance(weight, Tensor) else not isinstance(weight, int | float)):
        found = [_shape(part) if isinstance(part, Tensor) else type(part).__name__ for part in (total, weight)]
        raise ValueError(
            f"the loss {name} returned two values, which are taken as (sum, weight), a tensor of one number and a "
            f"number to divide it by, but they are {found[0]} and {found[1]}; return only the loss"
        )
    return total.reshape(()), (weight.reshape(()) if isinstance(weight, Tensor) else weight)


def _check_form(function: Any, name: str | None) -> None:
    """Losses with three or more arguments (triplets, CTC, GaussianNLL) don't fit (outputs, targets)."""
    try:
        form = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return  # a built-in
    try:
        form.bind(None, None)
    except TypeError as error:
        raise ConfigError.single(
            "loss",
            f"{name} takes {form}, but a loss is called with (outputs, targets): {error}. Name a function of these two that "
            "calls it, or a `task`",
        ) from None


def _samples(outputs: Any, targets: Any) -> int:
    """How many samples a loss of one number covers: outputs decide whether a list holds samples or their parts.

    Raises:
        ValueError: outputs and targets hold no tensor.
    """
    first = batch_length(targets)
    listed = isinstance(targets, list) and bool(targets) and not isinstance(targets[0], Tensor)
    rows = batch_length(outputs)
    known = [len(targets), first] if listed else [first]
    samples = rows if rows in known else known[0] or rows
    if not samples:
        raise ValueError(
            "outputs and targets hold no tensor to count the samples by: return (sum, weight) from the loss"
        )
    return samples


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
