"""Metrics as small sums: each batch adds a few float64 numbers, and one division at the end gives the value.

The sums of all metrics share one all-reduce, so the value is that of a single process on any number of them. Those that can't be
summed are in `whole.py`; those that count per class in `classes.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_train.task.batch import squeeze_column


class Metric:
    """Base of all metrics; your own define a name and `sums`, and where needed size and `result`.

    Attributes:
        name: what it is called in the records (`val/<name>`), unless the config has a `name` for it.
        size: how many numbers `sums` returns.
        higher_is_better: None: decided by the name (see `stop_when.mode`).
    """

    name: str
    size: int | None = 2
    higher_is_better: bool | None = None

    def sums(self, outputs: Any, targets: Any) -> Tensor:
        """What one batch adds: (size,), float64 or integers (float32 would lose counts above 16,777,216)."""
        raise TypeError(f"{type(self).__name__} must define sums(outputs, targets)")

    def result(self, sums: Tensor) -> Any:
        """The value, from the sums over the whole dataset ((size,) float64, on the CPU); by default their quotient.

        A number; or several, as a vector (recorded as `<name>_<k>`, by class where there is one for each) or a dict by name.
        """
        return float(sums[0] / sums[1]) if sums[1] else float("nan")


def class_dim(outputs: Tensor, targets: Tensor, dim: int | None) -> int:
    """The dim of `outputs` that has a score for each class: `dim` (else 1) where it fits, else 1 or the last where that does."""
    shape, wanted = outputs.shape, 1 if dim is None else dim % outputs.dim()
    fitting = [d for d in (1, outputs.dim() - 1) if shape[:d] + shape[d + 1 :] == targets.shape]
    return wanted if wanted in fitting or not fitting else fitting[0]


class Accuracy(Metric):
    """Fraction of samples whose highest output (N, classes, ...) is the target class (N, ...), without `ignore_index`.

    Targets of the outputs' own shape (class probabilities, as from mixup) are reduced to their argmax. Language models' outputs,
    (N, tokens, classes) with targets (N, tokens), are known by their task or their shape.

    Args:
        top: the target is among as many of the highest ones.
        ignore_index: elements with this target don't count.
        dim: that of the classes where two fit; None: 1.
    """

    higher_is_better = True

    def __init__(self, top: int = 1, ignore_index: int = -100, dim: int | None = None):
        self.top, self.ignore_index, self.dim = top, ignore_index, dim
        self.name = "accuracy" if top == 1 else f"top{top}"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(correct, counted)."""
        dim = class_dim(outputs, targets, self.dim) if outputs.dim() > 1 else 1
        if outputs.dim() < 2 or outputs.shape[dim] == 1:
            raise ValueError(
                f"metric {self.name} expects outputs of shape (N, classes), got {tuple(outputs.shape)}; for one output per "
                "sample use binary_accuracy (two classes) or mae and r2 (regression)"
            )
        if targets.shape == outputs.shape:
            targets = targets.argmax(dim)
            kept = torch.ones_like(targets, dtype=torch.bool)
        else:
            targets = squeeze_column(targets) if outputs.dim() == 2 else targets
            kept = targets != self.ignore_index
        if targets.shape != outputs.shape[:dim] + outputs.shape[dim + 1 :]:
            raise ValueError(
                f"metric {self.name} expects outputs (N, classes, ...) and the class numbers (N, ...), got "
                f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
            )
        if self.top == 1:
            hit = outputs.argmax(dim) == targets
        else:
            best = outputs.topk(min(self.top, outputs.shape[dim]), dim=dim).indices
            hit = (best == targets.unsqueeze(dim)).any(dim)
        return torch.stack([(hit & kept).sum(), kept.sum()]).double()


class BinaryAccuracy(Metric):
    """Fraction of samples on the right side of `threshold`, for one output per sample: (N,) or (N, 1)."""

    name = "binary_accuracy"
    higher_is_better = True

    def __init__(self, threshold: float = 0.5):
        self.threshold = threshold

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(correct, counted)."""
        outputs, targets = _flat(self.name, outputs, targets)
        return _with_count(((outputs > self.threshold) == (targets > 0.5)).double())


class MeanError(Metric):
    """Mean over all elements of |output - target|**power, then its root: `mae` (1), `mse` (2), `rmse` (2, with root)."""

    higher_is_better = False

    def __init__(self, power: int = 1, root: bool = False):
        self.power, self.root = power, root
        self.name = "mae" if power == 1 else "rmse" if root else "mse"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(sum of errors, elements)."""
        outputs, targets = _flat(self.name, outputs, targets)
        return _with_count((outputs.double() - targets.double()).abs().pow(self.power))

    def result(self, sums: Tensor) -> float:
        """The mean, or its root."""
        return super().result(sums.sqrt() if self.root else sums)


class R2(Metric):
    """Coefficient of determination over all elements: 1 - sum((y - p)^2) / sum((y - mean y)^2), as scikit-learn's r2_score."""

    name = "r2"
    higher_is_better = True
    size = 4

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(residual squares, sum of y^2, sum of y, elements)."""
        outputs, targets = _flat(self.name, outputs, targets)
        p, y = outputs.double(), targets.double()
        return torch.cat([(y - p).pow(2).sum()[None], y.pow(2).sum()[None], _with_count(y)])

    def result(self, sums: Tensor) -> float:
        """The coefficient; nan where all targets are equal."""
        residual, squares, total, count = sums.tolist()
        spread = squares - total * total / count if count else 0.0
        return 1.0 - residual / spread if spread > 0 else float("nan")


def _flat(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.numel() != targets.numel() or len(outputs) != len(targets):
        raise ValueError(
            f"metric {name} compares outputs and targets element by element, but the model gave {tuple(outputs.shape)} and the "
            f"targets are {tuple(targets.shape)}"
        )
    return outputs.reshape(-1), targets.reshape(-1)


def _with_count(values: Tensor) -> Tensor:
    total = values.sum()
    return torch.stack([total, torch.full_like(total, values.numel())])
