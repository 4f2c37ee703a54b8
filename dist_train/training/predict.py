"""What a model says about each sample of a dataset, in dataset order on any number of processes, and what it means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.runtime.seeding import seed_forward
from dist_train.task.batch import HALF
from dist_train.task.metrics import Accuracy, BinaryAccuracy, Metric, Whole, without_one_column
from dist_train.training.evaluate import in_rounds, on_rank_zero

if TYPE_CHECKING:
    from dist_train.data.loader import EvalLoader
    from dist_train.training.evaluate import Evaluator

SOME = 2e-3  # how far the probabilities of a sample may be from one in all


class Predicted(NamedTuple):
    """A stretch of a dataset: its first sample, outputs (n,) or (n, k) on the CPU, and targets where there are some."""

    start: int
    outputs: Tensor
    targets: Tensor | None


class Meaning(NamedTuple):
    """How outputs are read.

    Attributes:
        kind: `classes`, one of k for each sample; `binary`, yes or no; `labels`, class numbers already; `values`.
        scale: what makes probabilities of them: `softmax`, `exp`, `sigmoid`, or `none`.
        threshold: of binary outputs, on their own scale.
    """

    kind: str
    scale: str = "none"
    threshold: float = 0.5

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Outputs on the scale that people read."""
        scales = {"softmax": lambda: outputs.softmax(1), "exp": outputs.exp, "sigmoid": outputs.sigmoid}
        return scales[self.scale]() if self.scale in scales else outputs

    def predictions(self, outputs: Tensor) -> Tensor:
        """(n,) class numbers; values on the scale that people read."""
        if self.kind == "classes":
            return outputs.argmax(1)
        if self.kind == "binary":
            return (outputs > self.threshold).long()
        return outputs.long() if self.kind == "labels" else self.probabilities(outputs)

    def truths(self, targets: Tensor) -> Tensor:
        """Targets in the form of `predictions`."""
        if self.kind == "classes" and targets.dim() == 2:  # probabilities
            return targets.argmax(1)
        return targets if self.kind == "values" else targets.reshape(len(targets)).round().long()


def read_meaning(evaluator: Evaluator, outputs: Tensor) -> Meaning:
    """What a run's outputs mean: classes only where a loss or a metric of classification says so, else values."""
    function = getattr(getattr(evaluator.task, "loss", None), "function", None)
    several = outputs.dim() == 2
    questions = {question for metric in evaluator.metrics for question in _questions(metric)}
    if isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss):
        questions.add("multiclass")
    if not outputs.is_floating_point():
        return Meaning("labels" if questions and not several else "values")
    if isinstance(function, nn.BCEWithLogitsLoss):  # several outputs are several questions: no single answer
        return Meaning("values", "sigmoid") if several else Meaning("binary", "sigmoid", 0.0)
    if isinstance(function, nn.BCELoss):
        return Meaning("values") if several else Meaning("binary")
    if several and isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss):
        return Meaning("classes", "softmax" if isinstance(function, nn.CrossEntropyLoss) else "exp")
    if isinstance(function, nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss | nn.HuberLoss):
        return Meaning("values")
    for metric in evaluator.metrics:
        if isinstance(metric, BinaryAccuracy) and not several:
            return Meaning("binary", "sigmoid" if metric.threshold == 0.0 else "none", metric.threshold)
    shares = bool(((outputs >= 0) & (outputs <= 1)).all())
    if "binary" in questions and not several:  # as torchmetrics reads them
        return Meaning("binary") if shares else Meaning("binary", "sigmoid", 0.0)
    if "multilabel" in questions and several:
        return Meaning("values", "none" if shares else "sigmoid")
    if "multiclass" in questions and several:
        if bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < SOME).all()):
            return Meaning("classes")
        if bool((outputs <= 0).all()) and bool(((outputs.exp().sum(1) - 1).abs() < SOME).all()):
            return Meaning("classes", "exp")
        return Meaning("classes", "softmax")
    return Meaning("values")


def _questions(metric: Metric) -> Iterator[str]:
    """What a metric takes the outputs for: `multiclass`, `binary` or `multilabel`; nothing where it doesn't say."""
    if isinstance(metric, Accuracy | BinaryAccuracy):
        yield "multiclass" if isinstance(metric, Accuracy) else "binary"
    if isinstance(metric, Whole):
        whole = metric.metric
        for part in whole.values() if isinstance(whole, nn.ModuleDict) else (whole,):
            if type(part).__module__.startswith("torchmetrics.classification"):
                name = type(part).__name__.lower()
                yield from (kind for kind in ("multiclass", "binary", "multilabel") if name.startswith(kind))


def predict(evaluator: Evaluator, loader: EvalLoader) -> Iterator[Predicted | None]:
    """This rank's cuts of a dataset, in order; None for a round in which it has none, so that all have as many.

    Raises:
        ConfigError: the task's `predict` doesn't give one tensor with a row a sample.
    """
    with evaluator.serving():
        for mine in in_rounds(loader):
            if mine is None:
                yield None
                continue
            cut, batch = mine
            seed_forward(evaluator.seed, 0, cut.start, evaluator.world.device)
            with evaluator.precision.autocast():
                outputs = evaluator.task.predict(evaluator.model, evaluator.prepare(batch))
            yield Predicted(cut.start, _rows(outputs, len(cut)), _targets(batch, len(cut)))


def gathered(evaluator: Evaluator, loader: EvalLoader) -> Iterator[Predicted]:
    """Every sample once, in dataset order, on rank 0; the other ranks take part and get nothing. See `predict`."""
    for mine in predict(evaluator, loader):
        yield from (part for part in on_rank_zero(evaluator.world, mine) if part is not None)


def _rows(outputs: Any, samples: int) -> Tensor:
    """Outputs as (n,) or (n, k) on the CPU, in float32 if they are no integers; one column is none."""
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2) or len(outputs) != samples:
        found = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigError.single(
            "task",
            f"predictions are tables: expected predict(model, batch) to give one tensor with a row for each of the "
            f"{samples} samples, (n,) or (n, k), found {found}; name a task whose predict does, or use dist_train.load",
        )
    outputs = outputs.detach().cpu()
    return without_one_column(outputs.float() if outputs.dtype in HALF else outputs)


def _targets(batch: Any, samples: int) -> Tensor | None:
    """The targets of a batch of (inputs, targets), as (n,) or (n, k); None where it has none of that form."""
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return None
    targets = batch[1]
    return without_one_column(targets) if targets.dim() in (1, 2) and len(targets) == samples else None
