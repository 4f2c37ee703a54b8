"""How a model's outputs are interpreted: as scores of classes, as one probability, as class numbers, or as values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from dist_train.task.classes import ClassCounts, Perplexity
from dist_train.task.metrics import Accuracy, BinaryAccuracy
from dist_train.task.whole import SUM_TOLERANCE

if TYPE_CHECKING:
    from dist_train.evaluation.evaluate import Evaluator
    from dist_train.task.entries import MetricEntry


class Meaning(NamedTuple):
    """How outputs are interpreted.

    Attributes:
        kind: `classes`, scores of k classes for each sample (or each pixel, each token); `binary`; `labels`, class numbers
            already; `values`.
        scale: what turns them into probabilities: `softmax`, `exp`, `sigmoid`, or `none`.
        threshold: of binary outputs, before `scale`.
        dim: that of the classes: 1, as torch's losses have it, or -1, as language models have it.
    """

    kind: str
    scale: str = "none"
    threshold: float = 0.5
    dim: int = 1

    def probabilities(self, outputs: Tensor) -> Tensor:
        """The shape of outputs: outputs as probabilities; values as the loss sees them unless `scale` says otherwise."""
        scales = {"softmax": lambda: outputs.softmax(self.dim), "exp": outputs.exp, "sigmoid": outputs.sigmoid}
        return scales[self.scale]() if self.scale in scales else outputs

    def predictions(self, outputs: Tensor) -> Tensor:
        """Class numbers, (n,) or (n, ...) without `dim`; of `values`, what `probabilities` returns."""
        if self.kind == "classes":
            return outputs.argmax(self.dim)
        if self.kind == "binary":
            return (outputs > self.threshold).long()
        return outputs.long() if self.kind == "labels" else self.probabilities(outputs)

    def truths(self, targets: Tensor) -> Tensor:
        """Targets in the format of `predictions` (for outputs (n,) or (n, k))."""
        if self.kind == "classes" and targets.dim() == 2:  # probabilities
            return targets.argmax(1)
        return targets if self.kind == "values" else targets.reshape(len(targets)).round().long()


def declared(task: Any, name: str) -> Any:
    """An attribute of a task, which may be inside one of the engine's; None without one."""
    while task is not None:
        value = getattr(task, name, None)
        if value is not None:
            return value
        task = getattr(task, "task", None)
    return None


def read_meaning(evaluator: Evaluator, outputs: Tensor) -> Meaning:
    """How to interpret a run's outputs: as classes only where a loss or metric of classification says so, else as values.

    A task says so by an attribute `classes_dim`: the dim of its outputs that has a score for each class.

    Args:
        outputs: (n,), (n, k) or with more dims.
    """
    dim = declared(evaluator.task, "classes_dim")
    if isinstance(dim, int) and outputs.is_floating_point() and outputs.dim() > 1:
        return Meaning("classes", "softmax", dim=dim)
    function = getattr(getattr(evaluator.task, "loss", None), "function", None)
    several = outputs.dim() > 1
    kinds = {kind for entry in evaluator.metrics for kind in _kinds(entry)}
    if isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss):
        kinds.add("multiclass")
    if not outputs.is_floating_point():
        return Meaning("labels" if kinds and not several else "values")
    if isinstance(function, nn.BCEWithLogitsLoss):  # several outputs: multilabel, without a single answer
        return Meaning("values", "sigmoid") if several else Meaning("binary", "sigmoid", 0.0)
    if isinstance(function, nn.BCELoss):
        return Meaning("values") if several else Meaning("binary")
    if several and isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss):
        return Meaning("classes", "softmax" if isinstance(function, nn.CrossEntropyLoss) else "exp")
    if isinstance(function, nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss | nn.HuberLoss):
        return Meaning("values")
    for entry in evaluator.metrics:
        metric = entry.metric
        if isinstance(metric, Perplexity) and entry.of is None and outputs.dim() == 3:
            return Meaning("classes", "softmax", dim=-1 if metric.dim is None else metric.dim)
        if isinstance(metric, BinaryAccuracy) and entry.of is None and not several:
            return Meaning("binary", "sigmoid" if metric.threshold == 0.0 else "none", metric.threshold)
    in_range = bool(((outputs >= 0) & (outputs <= 1)).all())
    if "binary" in kinds and not several:  # as torchmetrics interprets them
        return Meaning("binary") if in_range else Meaning("binary", "sigmoid", 0.0)
    if "multilabel" in kinds and several:
        return Meaning("values", "none" if in_range else "sigmoid")
    if "multiclass" in kinds and several:
        if bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < SUM_TOLERANCE).all()):
            return Meaning("classes")
        if bool((outputs <= 0).all()) and bool(((outputs.exp().sum(1) - 1).abs() < SUM_TOLERANCE).all()):
            return Meaning("classes", "exp")
        return Meaning("classes", "softmax")
    return Meaning("values")


def _kinds(entry: MetricEntry) -> Iterator[str]:
    """What a metric takes the outputs for, if that is known: `multiclass`, `binary`, `multilabel`."""
    if isinstance(entry.metric, BinaryAccuracy):
        yield "binary"
    if isinstance(entry.metric, Accuracy | ClassCounts):
        yield "multiclass"
    for part in entry.whole.members.values() if entry.whole is not None else ():
        if type(part).__module__.startswith("torchmetrics.classification"):
            name = type(part).__name__.lower()
            yield from (kind for kind in ("multiclass", "binary", "multilabel") if name.startswith(kind))
