"""Metrics by parts come to what scikit-learn says of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from torch import Tensor, nn

from dist_train.engine.losses import Loss
from dist_train.engine.metrics import Whole, build_metrics

GENERATOR = torch.Generator().manual_seed(1)
LOGITS = torch.randn(60, 9, generator=GENERATOR)
LABELS = torch.randint(0, 9, (60,), generator=GENERATOR)
REAL, GUESS = torch.randn(60, generator=GENERATOR), torch.randn(60, generator=GENERATOR)
YES = (REAL > 0).float()


def figure(name: str, outputs: Tensor, targets: Tensor, loss: nn.Module | None = None) -> float:
    (metric,) = build_metrics([name], Loss(loss) if loss is not None else None)
    assert metric.name == name
    parts = [slice(0, 1), slice(1, 30), slice(30, None)]
    sums = [metric.sums(outputs[part], targets[part]) for part in parts]
    assert all(part.dtype == torch.float64 and part.shape == (metric.size,) for part in sums)
    return metric.result(torch.stack(sums).sum(0))


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "expected"),
    [
        ("accuracy", LOGITS, LABELS, reference.accuracy_score(LABELS, LOGITS.argmax(1))),
        ("top5", LOGITS, LABELS, reference.top_k_accuracy_score(LABELS, LOGITS, k=5, labels=range(9))),
        ("binary_accuracy", torch.sigmoid(GUESS), YES, reference.accuracy_score(YES, GUESS > 0)),
        ("binary_accuracy", torch.sigmoid(GUESS)[:, None], YES, reference.accuracy_score(YES, GUESS > 0)),
        ("mae", GUESS, REAL, reference.mean_absolute_error(REAL, GUESS)),
        ("mae", GUESS[:, None], REAL, reference.mean_absolute_error(REAL, GUESS)),
        ("mse", GUESS, REAL, reference.mean_squared_error(REAL, GUESS)),
        ("rmse", GUESS, REAL, np.sqrt(reference.mean_squared_error(REAL, GUESS))),
        ("r2", GUESS, REAL, reference.r2_score(REAL.numpy(), GUESS.numpy())),
    ],
)
def test_parts_come_to_the_figure_of_the_whole(name: str, outputs: Tensor, targets: Tensor, expected: float) -> None:
    assert figure(name, outputs, targets) == pytest.approx(float(expected), rel=1e-6)


def test_binary_accuracy_looks_at_the_sign_of_logits() -> None:
    expected = reference.accuracy_score(YES, GUESS > 0)
    assert figure("binary_accuracy", GUESS, YES, nn.BCEWithLogitsLoss()) == expected
    beyond_half = reference.accuracy_score(YES, GUESS > 0.5)
    assert figure("binary_accuracy", GUESS, YES, nn.BCELoss()) == beyond_half != expected


def test_ignored_labels_are_not_counted_and_mixed_ones_count_by_the_largest_share() -> None:
    ignored = LABELS.where(torch.arange(60) < 20, -100)
    assert figure("accuracy", LOGITS, ignored) == reference.accuracy_score(LABELS[:20], LOGITS[:20].argmax(1))
    mixed = 0.6 * nn.functional.one_hot(LABELS, 9) + 0.4 / 9
    assert figure("accuracy", LOGITS, mixed) == reference.accuracy_score(LABELS, LOGITS.argmax(1))


@pytest.mark.parametrize(("name", "said"), [("accuracy", "binary_accuracy"), ("mae", "element by element")])
def test_shapes_that_do_not_fit_are_told(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        figure(name, GUESS if name == "accuracy" else LOGITS, REAL)


def test_classes_of_torchmetrics_are_taken_alone_and_in_collections() -> None:
    target = "torchmetrics.regression.MeanAbsoluteError"
    both = [{"_target_": target}, {"_target_": "torchmetrics.regression.R2Score"}]
    alone, collection = build_metrics(
        [{"_target_": target}, {"_target_": "torchmetrics.MetricCollection", "metrics": both}], None
    )
    for metric in (alone, collection):
        assert isinstance(metric, Whole)
        for part in (slice(0, 30), slice(30, None)):
            metric.update(GUESS[part, None], REAL[part])
    expected = reference.mean_absolute_error(REAL, GUESS)
    assert alone.name == "mean_absolute_error"
    assert alone.figures() == {"mean_absolute_error": pytest.approx(expected, rel=1e-5)}  # type: ignore[attr-defined]
    assert collection.name == "MeanAbsoluteError"
    found = collection.figures()  # type: ignore[attr-defined]
    assert found["MeanAbsoluteError"] == pytest.approx(expected, rel=1e-5)
    assert found["R2Score"] == pytest.approx(reference.r2_score(REAL.numpy(), GUESS.numpy()), rel=1e-4)
