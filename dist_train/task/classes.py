"""Metrics that are exact from counts per class, and perplexity, which is exact from a sum over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.task.batch import shapes_of
from dist_train.task.metrics import Metric, class_dim


class ClassCounts(Metric):
    """Base of those that count, for each class, hits, predictions and targets.

    Outputs are (N, classes, ...) with targets (N, ...): the predicted class is the highest; one column, (N,) or (N, 1, ...), is
    cut at `threshold` into two classes; integers of the targets' shape are class numbers already. The classes of language models'
    outputs, (N, tokens, classes), are known by their task or their shape.

    Args:
        num_classes: None: as many as the first outputs have columns.
        ignore_index: elements with this target don't count, nor do their predictions.
        threshold: above it one column means class 1; 0 for logits (the default where the loss takes logits).
        dim: that of the classes where two fit; None: 1.
    """

    higher_is_better = True

    def __init__(
        self,
        num_classes: int | None = None,
        ignore_index: int = -100,
        threshold: float = 0.5,
        dim: int | None = None,
    ):
        self.num_classes, self.ignore_index, self.threshold, self.dim = num_classes, ignore_index, threshold, dim

    @property
    def size(self) -> int | None:  # type: ignore[override]
        """Three counts for each class, and that of targets that are none."""
        return None if self.num_classes is None else 3 * self.num_classes + 1

    def classes_in(self, outputs: Tensor, targets: Tensor) -> int:
        """The number of classes that outputs have columns for.

        Raises:
            ValueError: they are class numbers.
        """
        outputs = self._classes_second(outputs, targets)
        if self._is_binary(outputs):
            return 2
        if not outputs.is_floating_point() or outputs.dim() < 2:
            raise ValueError(f"{shapes_of(outputs)} doesn't show how many classes there are: give num_classes")
        return outputs.shape[1]

    def settle(self, classes: int) -> None:
        """Set the number of classes, where it wasn't given."""
        self.num_classes = classes

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(hits of each class, predictions of each, targets of each, elements whose target or prediction is no class)."""
        classes = self.num_classes
        assert classes is not None
        predicted, targets = self._classes(self._classes_second(outputs, targets), targets)
        kept = targets != self.ignore_index
        predicted, targets = predicted[kept], targets[kept]
        valid = (targets >= 0) & (targets < classes) & (predicted >= 0) & (predicted < classes)
        predicted, targets, wrong = predicted[valid], targets[valid], (~valid).sum()
        counts = [
            torch.bincount(part, minlength=classes) for part in (targets[predicted == targets], predicted, targets)
        ]
        return torch.cat([*counts, wrong[None]]).double()

    def counts(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hits, predictions, targets), each (classes,), of a whole dataset.

        Raises:
            ValueError: there were targets that are no class.
        """
        if sums[-1]:
            raise ValueError(
                f"{int(sums[-1])} targets or predictions aren't class numbers from 0 to {(len(sums) - 1) // 3 - 1}: give "
                f"`ignore_index` (now {self.ignore_index}) or `num_classes`"
            )
        hits, predicted, targets = sums[:-1].view(3, -1)
        return hits, predicted, targets

    def _classes_second(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scores = outputs.is_floating_point() and outputs.dim() > 1
        return outputs.movedim(class_dim(outputs, targets, self.dim), 1) if scores else outputs

    def _is_binary(self, outputs: Tensor) -> bool:
        return outputs.is_floating_point() and (outputs.dim() == 1 or outputs.shape[1] == 1)

    def _classes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true class numbers, flat."""
        if targets.dim() == outputs.dim() and targets.shape[1:2] == (1,):
            targets = targets.squeeze(1)
        if self._is_binary(outputs):
            predicted = ((outputs.squeeze(1) if outputs.dim() > 1 else outputs) > self.threshold).long()
        elif outputs.is_floating_point():
            if outputs.shape[1] != self.num_classes:
                raise ValueError(f"expected outputs with {self.num_classes} columns")
            predicted = outputs.argmax(1)
        else:
            predicted = outputs.long()
        if predicted.shape != targets.shape:
            raise ValueError(
                "expected outputs (N, classes, ...) and targets (N, ...), outputs of one column and targets alike, or class "
                "numbers of one shape; of targets with a column for each class use `of` with a function, or torchmetrics"
            )
        return predicted.reshape(-1), targets.round().long().reshape(-1) if targets.is_floating_point() else (
            targets.long().reshape(-1)
        )


class F1(ClassCounts):
    """F1 score: 2 * hits / (predictions + targets) of a class, as scikit-learn's f1_score.

    Args:
        average: `macro`: the mean over the classes that occur in targets or predictions; `weighted` by their targets; `micro`:
            over all elements; `binary`: of class 1 of two; `none`: of each class, nan for one that doesn't occur.
            None: macro; with one output per sample it must be given.
    """

    name = "f1"

    def __init__(
        self,
        average: str | None = None,
        num_classes: int | None = None,
        ignore_index: int = -100,
        threshold: float = 0.5,
        dim: int | None = None,
    ):
        super().__init__(num_classes, ignore_index, threshold, dim)
        if average not in (None, "macro", "weighted", "micro", "binary", "none"):
            raise ValueError(f"expected average: macro, weighted, micro, binary or none, found {average!r}")
        self.average = average

    def _classes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.average is None and self._is_binary(outputs):
            raise ValueError("with one output per sample say which F1 is meant: average: binary (of class 1), or macro")
        if self.average == "binary" and self.num_classes != 2:
            raise ValueError(f"average: binary is of two classes, found {self.num_classes}")
        return super()._classes(outputs, targets)

    def result(self, sums: Tensor) -> Any:
        """A number; with `average: none` (classes,)."""
        hits, predicted, targets = self.counts(sums)
        scores = 2 * hits / (predicted + targets)  # nan where a class doesn't occur
        if self.average == "none":
            return scores
        if self.average == "binary":
            return scores[1].nan_to_num(0.0)
        if self.average == "micro":
            return 2 * hits.sum() / (predicted.sum() + targets.sum())
        if self.average == "weighted":
            return (scores.nan_to_num(0.0) * targets).sum() / targets.sum()
        return scores.nanmean()


class MeanIoU(ClassCounts):
    """Mean intersection over union (Jaccard index), of the classes that occur in targets or predictions.

    Args:
        per_class: record that of each class too, as `iou_<class>`; nan for one that doesn't occur.
    """

    name = "miou"

    def __init__(
        self,
        per_class: bool = False,
        num_classes: int | None = None,
        ignore_index: int = -100,
        threshold: float = 0.5,
        dim: int | None = None,
    ):
        super().__init__(num_classes, ignore_index, threshold, dim)
        self.per_class = per_class

    def result(self, sums: Tensor) -> dict[str, Any]:
        """miou, and with `per_class` iou (classes,)."""
        hits, predicted, targets = self.counts(sums)
        iou = hits / (predicted + targets - hits)
        return {"miou": iou.nanmean(), **({"iou": iou} if self.per_class else {})}


class Perplexity(Metric):
    """exp of the mean cross-entropy of a token.

    Outputs are logits (or log-probabilities) of a vocabulary, (N, tokens, vocabulary), as language models give them, with targets
    (N, tokens); torch's (N, vocabulary, tokens) is known by the targets' shape.

    Args:
        ignore_index: targets that don't count (padding).
        dim: that of the vocabulary; None: the last one where that fits the targets, else 1.
    """

    name = "perplexity"
    higher_is_better = False

    def __init__(self, ignore_index: int = -100, dim: int | None = None):
        self.ignore_index, self.dim = ignore_index, dim

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(cross-entropy summed over tokens, tokens)."""
        shape, dims = outputs.shape, outputs.dim()
        fitting = [dim for dim in (dims - 1, 1) if dims > 1 and shape[:dim] + shape[dim + 1 :] == targets.shape]
        dim = self.dim % dims if self.dim is not None else next(iter(fitting), None)
        if dim not in fitting:
            raise ValueError("expected logits (N, tokens, vocabulary) and the numbers of the tokens, (N, tokens)")
        logits = outputs.movedim(dim, -1).reshape(-1, shape[dim])
        losses = functional.cross_entropy(
            logits, targets.reshape(-1).long(), ignore_index=self.ignore_index, reduction="none"
        )
        return torch.stack([losses.double().sum(), (targets != self.ignore_index).sum().double()])

    def result(self, sums: Tensor) -> float:
        """inf where the mean is above 709."""
        return float((sums[0] / sums[1]).exp())
