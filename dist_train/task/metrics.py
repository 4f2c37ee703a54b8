"""Metrics as small sums: each batch adds a few float64 numbers, and one division at the end gives the figure.

Sums of all metrics travel in one all-reduce, so the figure is that of one process on any number of them. Metrics that aren't
sums (torchmetrics) see every batch on rank 0, which comes to the same at the price of carrying the outputs there.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.components import build
from dist_train.config.fields import better_is_lower
from dist_train.task.losses import Loss
from dist_train.tracking.records import FIELDS

TAKEN = ("loss", "eval_samples", *FIELDS)  # names in the records that no metric can have


class Metric:
    """Base of all metrics; write your own by these three members.

    Attributes:
        name: what it is called in the records (`val/<name>`).
        size: how many numbers `sums` gives.
        higher_is_better: which way is better; None: judged by the name (see `stop_when.mode`).
    """

    name: str
    size: int = 2
    higher_is_better: bool | None = None

    def sums(self, outputs: Any, targets: Any) -> Tensor:
        """What one batch adds: (size,), float64 or integers (float32 would lose counts above 16,777,216)."""
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
        part: Any
        for part in _modules_in(metric):
            part.distributed_available_fn = lambda: False  # rank 0 has seen everything, and computes alone
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()
        self.names = list(metric) if isinstance(metric, nn.ModuleDict) else [snake]
        self.name = self.names[0]
        self.higher_is_better = getattr(metric, "higher_is_better", None)

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
                raise TypeError(f"{name} gives {shape} numbers, expected one: average=macro, or a class of your own")
        return {name: float(number) for name, number in values.items()}


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Every module in an object, those that it keeps as attributes, in lists and in dicts as well."""
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif depth:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for item in (*inner, *getattr(value, "__dict__", {}).values()):
            yield from _modules_in(item, depth - 1)


@contextlib.contextmanager
def naming(metric: Metric) -> Iterator[None]:
    """Errors of a metric's own code say which metric it is.

    Raises:
        RuntimeError: in place of whatever it raised; memory that has run out stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        head = f"metric {metric.name}"
        if str(error).startswith(head):  # it says so itself
            raise
        raise RuntimeError(f"{head}: {type(error).__name__}: {error}") from error


def sums_of(metric: Metric, outputs: Any, targets: Any) -> Tensor:
    """`metric.sums`, as float64 (metric.size,).

    Raises:
        RuntimeError: the metric fails, or gives something else; names it.
    """
    with naming(metric):
        sums = metric.sums(outputs, targets)
        expected = f"sums must give a tensor of shape ({metric.size},), float64 or integers"
        if not isinstance(sums, Tensor):
            raise TypeError(f"{expected}, but gave a {type(sums).__name__}")
        if sums.shape != (metric.size,) or (sums.is_floating_point() and sums.dtype != torch.float64):
            raise ValueError(
                f"{expected}, but gave {tuple(sums.shape)} of {sums.dtype}; `size` says how many there are"
            )
    return sums.double()


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
    """Metrics by name or by `_target_`; `binary_accuracy` looks at the sign where the loss takes logits.

    Raises:
        ValueError: two of them would have one name in the records, or one has a name that is taken.
        TypeError: one of them is no metric.
    """
    metrics: list[Metric] = []
    for spec in specs:
        if spec == "binary_accuracy" and loss is not None and isinstance(loss.function, nn.BCEWithLogitsLoss):
            metrics.append(BinaryAccuracy(threshold=0.0))
        else:
            metric = NAMED[spec]() if isinstance(spec, str) else build(spec)
            metrics.append(metric if hasattr(metric, "sums") else Whole(metric))
    for metric in metrics:
        name, size = getattr(metric, "name", None), getattr(metric, "size", None)
        if not isinstance(name, str) or not name or not isinstance(size, int) or not hasattr(metric, "result"):
            lacks = "a name (a string), a size (how many numbers sums gives), sums and result"
            raise TypeError(f"{type(metric).__name__} needs {lacks}: subclass dist_train.metrics.Metric")
    check_names([name for metric in metrics for name in names_of(metric)])
    return metrics


def names_of(metric: Metric) -> list[str]:
    """What a metric is called in the records; one of torchmetrics may give others as well, which only its result shows."""
    return metric.names if isinstance(metric, Whole) else [metric.name]


def check_names(names: Sequence[str]) -> None:
    """Each name stands for one metric.

    Raises:
        ValueError: it doesn't.
    """
    for name, count in Counter(names).items():
        if name in TAKEN or name.startswith("raw_"):
            raise ValueError(f"no metric can be called {name}: the records have a figure of that name already")
        if count > 1:
            raise ValueError(
                f"{count} metrics are called {name}, and only one could be recorded: give your own class another `name`, and "
                "those of torchmetrics names by {_target_: torchmetrics.MetricCollection, metrics: {NAME: {_target_: ...}}}"
            )


def figure(figures: Mapping[str, float], name: str) -> float:
    """One figure of an evaluation, which a key of the config has named.

    Raises:
        ValueError: it isn't there; says what is.
    """
    if name not in figures:
        there = ", ".join(figures)
        keys = "checkpoint.keep_best, trainer.stop_when.metric and scheduler.metric"
        raise ValueError(f"{name} is watched, but this evaluation gave {there}: name one of these in {keys}")
    return figures[name]


def is_lower_better(name: str, metrics: Sequence[Metric]) -> bool:
    """Whether less of a figure (`val/<name>`) is better: as its metric says (`higher_is_better`), else by its name."""
    for metric in metrics:
        members: dict[str, Any] = {metric.name: metric}
        if isinstance(metric, Whole) and isinstance(metric.metric, nn.ModuleDict):
            members = dict(metric.metric.items())
        higher = getattr(members.get(name.removeprefix("val/").removeprefix("raw_")), "higher_is_better", None)
        if higher is not None:
            return not higher
    return better_is_lower(name)


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
