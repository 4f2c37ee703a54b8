"""Metrics as small sums: each batch adds a few float64 numbers, and one division at the end gives the value.

The sums of all metrics share one all-reduce, so the value is that of a single process on any number of them. Non-decomposable
metrics (torchmetrics) see every batch on rank 0, which gives the same value at the price of sending the outputs there.
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
from dist_train.config.fields import RECORD_FIELDS, better_is_lower
from dist_train.task.batch import squeeze_column
from dist_train.task.losses import Loss
from dist_train.task.task import modules_in

RESERVED = ("loss", "eval_samples", *RECORD_FIELDS)  # names in the records that no metric can have


class Metric:
    """Base of all metrics; your own define a name and `sums`, and where needed size and `result`.

    Attributes:
        name: what it is called in the records (`val/<name>`).
        size: how many numbers `sums` returns.
        higher_is_better: None: decided by the name (see `stop_when.mode`).
    """

    name: str
    size: int = 2
    higher_is_better: bool | None = None

    def sums(self, outputs: Any, targets: Any) -> Tensor:
        """What one batch adds: (size,), float64 or integers (float32 would lose counts above 16,777,216)."""
        raise TypeError(f"{type(self).__name__} must define sums(outputs, targets)")

    def result(self, sums: Tensor) -> float:
        """The value, from the sums over the whole dataset ((size,) float64, on the CPU); by default their quotient."""
        return float(sums[0] / sums[1]) if sums[1] else float("nan")


class Accuracy(Metric):
    """Fraction of samples whose highest output (N, classes, ...) is the target class (N, ...), without `ignore_index`.

    Targets of the outputs' own shape (class probabilities, as from mixup) are reduced to their argmax.
    """

    def __init__(self, top: int = 1, ignore_index: int = -100):
        self.top, self.ignore_index = top, ignore_index
        self.name = "accuracy" if top == 1 else f"top{top}"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(correct, counted)."""
        if outputs.dim() < 2 or outputs.shape[1] == 1:
            raise ValueError(
                f"metric {self.name} expects outputs of shape (N, classes), got {tuple(outputs.shape)}; for one output per "
                "sample use binary_accuracy (two classes) or mae and r2 (regression)"
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
    """Fraction of samples on the right side of `threshold`, for one output per sample: (N,) or (N, 1)."""

    name = "binary_accuracy"

    def __init__(self, threshold: float = 0.5):
        self.threshold = threshold

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(correct, counted)."""
        outputs, targets = _flat(self.name, outputs, targets)
        return _with_count(((outputs > self.threshold) == (targets > 0.5)).double())


class MeanError(Metric):
    """Mean over all elements of |output - target|**power, then its root: `mae` (1), `mse` (2), `rmse` (2, with root)."""

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


class NonDecomposable(Metric):
    """A class with `update(outputs, targets)`, `compute` and `reset`, such as all of torchmetrics.

    It is recorded under its class's name in snake case (`multiclass_f1_score`), those of a MetricCollection under their keys.

    Attributes:
        members: the metrics inside, by name; one of torchmetrics may give more names, which only its result shows.
    """

    size = 0

    def __init__(self, metric: Any):
        self.metric = metric
        for found in modules_in(metric).values():
            for part in found.modules() if isinstance(found, nn.Module) else ():
                part.distributed_available_fn = lambda: False  # type: ignore[assignment]  # rank 0 computes alone
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()
        self.members: dict[str, Any] = dict(metric.items()) if isinstance(metric, nn.ModuleDict) else {snake: metric}
        self.name = next(iter(self.members))

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch; (N, 1) is passed as (N,)."""
        self.metric.update(*(squeeze_column(v) if isinstance(v, Tensor) else v for v in (outputs, targets)))

    def values(self) -> dict[str, float]:
        """The results, by name.

        Raises:
            TypeError: one of them isn't a single number.
        """
        value = self.metric.compute()
        values = value if isinstance(value, dict) else {self.name: value}
        for name, number in values.items():
            if isinstance(number, Tensor) and number.numel() != 1:
                shape = tuple(number.shape)
                raise TypeError(f"{name} gives {shape} numbers, expected one: average=macro, or a class of your own")
        return {name: float(number) for name, number in values.items()}


@contextlib.contextmanager
def errors_named(metric: Metric) -> Iterator[None]:
    """Errors of a metric's own code say which metric it is.

    Raises:
        RuntimeError: instead of whatever it raised, except torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        head = f"metric {metric.name}"
        if str(error).startswith(head):
            raise
        raise RuntimeError(f"{head}: {type(error).__name__}: {error}") from error


def sums_of(metric: Metric, outputs: Any, targets: Any) -> Tensor:
    """`metric.sums`, as float64 (metric.size,).

    Raises:
        RuntimeError: the metric fails, or returns something else; names it.
    """
    with errors_named(metric):
        sums = metric.sums(outputs, targets)
        expected = f"sums must give a tensor of shape ({metric.size},), float64 or integers"
        if not isinstance(sums, Tensor):
            raise TypeError(f"{expected}, but gave a {type(sums).__name__}")
        if sums.shape != (metric.size,) or (sums.is_floating_point() and sums.dtype != torch.float64):
            raise ValueError(
                f"{expected}, but gave {tuple(sums.shape)} of {sums.dtype}; `size` says how many there are"
            )
    return sums.double()


# The same names in the same order as config.fields.METRICS (config imports no torch); a key is what `Metric.name` will be. After
# a change run `make docs`.
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
    """Metrics by name or by `_target_`; `binary_accuracy` thresholds at 0 if the loss takes logits.

    Raises:
        ValueError: two of them would have the same name in the records, or one has a reserved name.
        TypeError: one of them isn't a metric.
    """
    metrics: list[Metric] = []
    for spec in specs:
        if spec == "binary_accuracy" and loss is not None and isinstance(loss.function, nn.BCEWithLogitsLoss):
            metrics.append(BinaryAccuracy(threshold=0.0))
        else:
            metric = NAMED[spec]() if isinstance(spec, str) else build(spec)
            metrics.append(metric if hasattr(metric, "sums") else NonDecomposable(metric))
    for metric in metrics:
        name, size = getattr(metric, "name", None), getattr(metric, "size", None)
        if not isinstance(name, str) or not name or not isinstance(size, int) or not hasattr(metric, "result"):
            missing = "a name (a string), a size (how many numbers sums gives), sums and result"
            raise TypeError(f"{type(metric).__name__} needs {missing}: subclass dist_train.metrics.Metric")
    check_names([name for metric in metrics for name in _members(metric)])
    return metrics


def _members(metric: Metric) -> dict[str, Any]:
    return metric.members if isinstance(metric, NonDecomposable) else {metric.name: metric}


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError: a name is reserved in the records, or two metrics have the same."""
    for name, count in Counter(names).items():
        if name in RESERVED or name.startswith("raw_"):
            raise ValueError(f"a metric can't be called {name}: that name is reserved in the records")
        if count > 1:
            raise ValueError(
                f"{count} metrics are called {name}, and only one could be recorded: give your own class another `name`, and "
                "those of torchmetrics names by {_target_: torchmetrics.MetricCollection, metrics: {NAME: {_target_: ...}}}"
            )


def monitored(metrics: Mapping[str, float], name: str) -> float:
    """The value of the metric that a key of the config monitors.

    Raises:
        ValueError: the evaluation didn't give it; says what it gave.
    """
    if name not in metrics:
        keys = "checkpoint.keep_best, trainer.stop_when.metric and scheduler.metric"
        raise ValueError(
            f"{name} is monitored, but this evaluation gave {', '.join(metrics)}: name one of these in {keys}"
        )
    return metrics[name]


def is_lower_better(name: str, metrics: Sequence[Metric]) -> bool:
    """Whether a lower value of `val/<name>` is better: as its metric says (`higher_is_better`), else by its name."""
    members = {key: member for metric in metrics for key, member in _members(metric).items()}
    member = members.get(name.removeprefix("val/").removeprefix("raw_"))
    higher = getattr(member, "higher_is_better", None)
    return better_is_lower(name) if higher is None else not higher
