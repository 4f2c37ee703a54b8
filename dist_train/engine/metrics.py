"""Metrics as small sums: each batch adds a few float64 numbers, and one division at the end gives the figure.

Sums of all metrics travel in one all-reduce, so the figure is that of one process on any number of them. Metrics that aren't
sums (torchmetrics) see every batch on rank 0, which comes to the same at the price of carrying the outputs there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.components import build
from dist_train.engine.losses import Loss


class Metric:
    """Base of all metrics; write your own by these three members.

    Attributes:
        name: what it is called in the records (`val/<name>`).
        size: how many numbers `sums` gives.
    """

    name: str
    size: int = 2

    def sums(self, outputs: Any, targets: Any) -> Tensor:
        """What one batch adds: a float64 tensor (size,) on the batch's device."""
        raise TypeError(f"{type(self).__name__} must define sums(outputs, targets)")

    def result(self, sums: Tensor) -> float:
        """The figure, from the sums over the whole dataset ((size,) float64, on the CPU); by default their quotient."""
        return float(sums[0] / sums[1]) if sums[1] else float("nan")


class Accuracy(Metric):
    """Share of samples whose largest of the outputs (N, classes, ...) is the target class (N, ...); `ignore_index` isn't counted.

    Targets of the outputs' own shape (class probabilities, as mixup gives) count by their largest entry.
    """

    def __init__(self, top: int = 1, ignore_index: int = -100):
        self.top, self.ignore_index = top, ignore_index
        self.name = "accuracy" if top == 1 else f"top{top}"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(correct, counted)."""
        if outputs.dim() < 2 or outputs.shape[1] == 1:
            raise ValueError(
                f"metric {self.name} expects outputs of shape (N, classes), got {tuple(outputs.shape)}; for one output a sample "
                "use binary_accuracy (two classes) or mae and r2 (regression)"
            )
        if targets.shape == outputs.shape:
            targets = targets.argmax(1)
        if self.top == 1:
            hit = outputs.argmax(1) == targets
        else:
            best = outputs.topk(min(self.top, outputs.shape[1]), dim=1).indices
            hit = (best == targets.unsqueeze(1)).any(1)
        kept = targets != self.ignore_index
        return torch.stack([(hit & kept).sum(), kept.sum()]).double()


class BinaryAccuracy(Metric):
    """Share of samples on the right side of `threshold`, for one output a sample: (N,) or (N, 1)."""

    name = "binary_accuracy"

    def __init__(self, threshold: float = 0.5):
        self.threshold = threshold

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(correct, counted)."""
        outputs, targets = _flat(self.name, outputs, targets)
        hit = ((outputs > self.threshold) == (targets > 0.5)).double()
        return torch.stack([hit.sum(), torch.full_like(hit.sum(), hit.numel())])


class MeanError(Metric):
    """Mean over all elements of |output - target|**power, then its root: `mae` (1), `mse` (2), `rmse` (2, with root)."""

    def __init__(self, power: int = 1, root: bool = False):
        self.power, self.root = power, root
        self.name = "mae" if power == 1 else "rmse" if root else "mse"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(sum of errors, elements)."""
        outputs, targets = _flat(self.name, outputs, targets)
        total = (outputs.double() - targets.double()).abs().pow(self.power).sum()
        return torch.stack([total, torch.full_like(total, outputs.numel())])

    def result(self, sums: Tensor) -> float:
        """The mean, or its root."""
        return super().result(sums.sqrt() if self.root else sums)


class R2(Metric):
    """Coefficient of determination over all elements: 1 - sum((y - p)^2) / sum((y - mean y)^2), as scikit-learn's r2_score."""

    name = "r2"
    size = 4

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(residual squares, sum of y, sum of y^2, elements)."""
        outputs, targets = _flat(self.name, outputs, targets)
        p, y = outputs.double(), targets.double()
        return torch.stack([(y - p).pow(2).sum(), y.sum(), y.pow(2).sum(), torch.full_like(y.sum(), y.numel())])

    def result(self, sums: Tensor) -> float:
        """The coefficient; nan where all targets are equal."""
        residual, total, squares, count = sums.tolist()
        spread = squares - total * total / count if count else 0.0
        return 1.0 - residual / spread if spread > 0 else float("nan")


class Whole(Metric):
    """A class with `update(outputs, targets)`, `compute` and `reset`, as all of torchmetrics have; in the records under its
    class's name (`multiclass_f1_score`), a MetricCollection's under theirs.
    """

    size = 0

    def __init__(self, metric: Any):
        self.metric = metric
        parts: Any = metric.modules() if isinstance(metric, nn.Module) else ()
        for part in parts:
            part.distributed_available_fn = lambda: False  # rank 0 has seen everything, and computes alone
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()
        self.name = next(iter(metric)) if isinstance(metric, nn.ModuleDict) else snake

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a batch; (N, 1) goes as (N,)."""
        self.metric.update(*(without_one_column(v) if isinstance(v, Tensor) else v for v in (outputs, targets)))

    def figures(self) -> dict[str, float]:
        """What it comes to.

        Raises:
            TypeError: to more than one number.
        """
        value = self.metric.compute()
        values = value if isinstance(value, dict) else {self.name: value}
        for name, number in values.items():
            if isinstance(number, Tensor) and number.numel() != 1:
                shape = tuple(number.shape)
                raise TypeError(
                    f"metric {name} gives {shape} numbers, expected one: average=macro, or a class of your own"
                )
        return {name: float(number) for name, number in values.items()}


NAMED: dict[str, Any] = {
    "accuracy": Accuracy,
    "top5": lambda: Accuracy(top=5),
    "binary_accuracy": BinaryAccuracy,
    "mae": MeanError,
    "mse": lambda: MeanError(power=2),
    "rmse": lambda: MeanError(power=2, root=True),
    "r2": R2,
}


def build_metrics(specs: Sequence[Any], loss: Loss | None) -> list[Metric]:
    """Metrics by name or by `_target_`; `binary_accuracy` looks at the sign where the loss takes logits."""
    metrics: list[Metric] = []
    for spec in specs:
        if spec == "binary_accuracy" and loss is not None and isinstance(loss.function, nn.BCEWithLogitsLoss):
            metrics.append(BinaryAccuracy(threshold=0.0))
        else:
            metric = NAMED[spec]() if isinstance(spec, str) else build(spec)
            metrics.append(metric if hasattr(metric, "sums") else Whole(metric))
    return metrics


def without_one_column(values: Tensor) -> Tensor:
    """(n, 1) as (n,); others as they are."""
    return values.squeeze(1) if values.dim() == 2 and values.shape[1] == 1 else values


def _flat(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.numel() != targets.numel() or len(outputs) != len(targets):
        raise ValueError(
            f"metric {name} compares outputs and targets element by element, but the model gave {tuple(outputs.shape)} and the "
            f"targets are {tuple(targets.shape)}"
        )
    return outputs.reshape(-1), targets.reshape(-1)
