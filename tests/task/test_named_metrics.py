"""f1, miou, auroc, perplexity and map equal scikit-learn's and torchmetrics', whatever the batches are."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sklearn_metrics
import torch
from built import entries, values
from torch import Tensor, nn

from dist_train.config.errors import ConfigError


class Reference:
    """scikit-learn's metrics, on numpy arrays: older ones don't take tensors."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(sklearn_metrics, name)
        return lambda *args, **options: function(*map(np.asarray, args), **options)


reference = Reference()
GENERATOR = torch.Generator().manual_seed(1)
LOGITS = torch.randn(90, 5, generator=GENERATOR)
LABELS = torch.randint(0, 5, (90,), generator=GENERATOR)
IGNORED = LABELS.where(torch.arange(90) % 4 > 0, -1)
GUESS, YES = torch.randn(90, generator=GENERATOR), torch.randint(0, 2, (90,), generator=GENERATOR)
FEW = LABELS.where(LABELS != 3, 0)  # a class that no target has
NEVER = LOGITS.where(torch.arange(5) != 3, -9.0)  # nor any prediction
NAN = float("nan")


def value(entry: Any, outputs: Tensor, targets: Tensor, loss: nn.Module | None = None) -> float:
    (metric,) = entries(entry, loss=loss)
    found = values(metric, outputs, targets)
    assert [*found] == [metric.primary]
    return found[metric.primary]


@pytest.mark.parametrize("average", ["macro", "weighted", "micro"])
@pytest.mark.parametrize(("outputs", "targets"), [(LOGITS, LABELS), (LOGITS, FEW), (NEVER, FEW)])
def test_f1_is_scikit_learns(average: str, outputs: Tensor, targets: Tensor) -> None:
    expected = reference.f1_score(targets, outputs.argmax(1), average=average)
    assert value({"metric": "f1", "average": average}, outputs, targets) == pytest.approx(expected, rel=1e-12)
    assert average != "macro" or value("f1", outputs, targets) == pytest.approx(expected, rel=1e-12)


def test_f1_leaves_out_what_is_ignored_by_its_own_key_or_the_losss() -> None:
    kept = IGNORED >= 0
    expected = pytest.approx(reference.f1_score(LABELS[kept], LOGITS[kept].argmax(1), average="macro"), rel=1e-12)
    assert value({"metric": "f1", "ignore_index": -1}, LOGITS, IGNORED) == expected
    assert value("f1", LOGITS, IGNORED, nn.CrossEntropyLoss(ignore_index=-1)) == expected
    with pytest.raises(RuntimeError, match=r"metric f1: .* 23 targets or predictions aren't class numbers from 0 to 4"):
        value("f1", LOGITS, IGNORED)


def test_f1_of_one_output_per_sample_says_which_one_it_is() -> None:
    with pytest.raises(
        RuntimeError, match=r"metric f1: .*say which F1 is meant: average: binary.*it got outputs float32"
    ):
        value("f1", GUESS, YES)
    for average in ("binary", "macro"):
        entry, expected = {"metric": "f1", "average": average}, reference.f1_score(YES, GUESS > 0, average=average)
        for outputs in (GUESS, GUESS[:, None]):
            assert value({**entry, "threshold": 0.0}, outputs, YES) == pytest.approx(expected, rel=1e-12)
            assert value(entry, outputs, YES.float(), nn.BCEWithLogitsLoss()) == pytest.approx(expected, rel=1e-12)
        probabilities = {**entry, "of": "sigmoid"}
        assert value(probabilities, GUESS, YES, nn.BCEWithLogitsLoss()) == pytest.approx(expected, rel=1e-12)


def test_f1_of_each_class_has_its_name_and_is_nan_for_one_that_does_not_occur() -> None:
    (metric,) = entries({"metric": "f1", "average": "none", "name": "score"})
    found = values(metric, NEVER, FEW, ["cat", "sea lion", "dog", "dog", "x/y"])
    assert [*found] == ["score_cat", "score_sea_lion", "score_2", "score_3", "score_x_y"]
    expected = reference.f1_score(FEW, NEVER.argmax(1), average=None, labels=[0, 1, 2, 4])
    assert [*found.values()] == pytest.approx([*expected[:3], NAN, expected[3]], nan_ok=True)
    assert [*values(metric, NEVER, FEW, ["a", "b"])][:2] == ["score_0", "score_1"], "these are names of something else"


@pytest.mark.parametrize("shape", [(90, 5), (6, 15, 5), (6, 3, 5, 5)])
def test_miou_is_scikit_learns_and_torchmetrics(shape: tuple[int, ...]) -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    outputs, targets = LOGITS.reshape(*shape[:-1], 5), FEW.where(IGNORED >= 0, 255).reshape(shape[:-1])
    outputs = outputs.movedim(-1, 1)
    found = values(
        *entries({"metric": "miou", "per_class": True}, loss=nn.CrossEntropyLoss(ignore_index=255)), outputs, targets
    )
    kept, guess = targets != 255, outputs.argmax(1)
    jaccard = reference.jaccard_score(targets[kept], guess[kept], average="macro")
    assert found.pop("miou") == pytest.approx(jaccard, rel=1e-12)
    each = MulticlassJaccardIndex(5, average="none", ignore_index=255)(guess, targets)
    assert found == pytest.approx({f"iou_{k}": float(each[k]) for k in range(5)}, rel=1e-6)


def test_miou_of_one_channel_is_that_of_two_classes_and_of_class_numbers_needs_their_number() -> None:
    mask, logits = YES.reshape(6, 1, 3, 5), GUESS.reshape(6, 1, 3, 5)
    expected = pytest.approx(reference.jaccard_score(YES, GUESS > 0, average="macro"), rel=1e-12)
    for targets in (mask, mask[:, 0], mask.float()):
        assert value("miou", logits, targets, nn.BCEWithLogitsLoss()) == expected
    numbers = {"metric": "miou", "of": "argmax", "num_classes": 5}
    assert value(numbers, LOGITS, LABELS) == value("miou", LOGITS, LABELS)
    with pytest.raises(RuntimeError, match=r"metric miou: .*int64 \(1,\) doesn't show .*give num_classes"):
        value({"metric": "miou", "of": "argmax"}, LOGITS, LABELS)
    with pytest.raises(RuntimeError, match=r"expected outputs \(N, classes, \.\.\.\) and targets \(N, \.\.\.\)"):
        value("miou", LOGITS, nn.functional.one_hot(LABELS))
    with pytest.raises(RuntimeError, match="expected outputs with 7 columns"):
        value({"metric": "miou", "num_classes": 7}, LOGITS, LABELS)


@pytest.mark.parametrize("transform", [lambda x: x, lambda x: x.softmax(1), lambda x: x.log_softmax(1)])
def test_auroc_of_several_classes_is_scikit_learns(transform: Any) -> None:
    expected = reference.roc_auc_score(LABELS, LOGITS.double().softmax(1), multi_class="ovr")
    assert value("auroc", transform(LOGITS.double()), LABELS) == pytest.approx(expected, rel=1e-9)
    (each,) = entries({"metric": "auroc", "average": "none"})
    areas = [reference.roc_auc_score(k == FEW, LOGITS.double().softmax(1)[:, k]) for k in (0, 1, 2, 4)]
    assert [*values(each, LOGITS.double(), FEW).values()] == pytest.approx([*areas[:3], NAN, areas[3]], nan_ok=True)
    assert value("auroc", LOGITS.double(), FEW) == pytest.approx(float(np.mean(areas)), rel=1e-12)


def test_auroc_of_two_classes_is_scikit_learns() -> None:
    expected = pytest.approx(reference.roc_auc_score(YES, GUESS), rel=1e-12)
    two = torch.stack([-GUESS, GUESS], dim=1).double()
    for outputs in (GUESS, GUESS[:, None], GUESS.double().sigmoid(), two, two.softmax(1)):
        assert value("auroc", outputs, YES) == expected
    assert value({"metric": "auroc", "of": "softmax.1"}, two, YES) == expected
    assert (
        value({"metric": "auroc", "ignore_index": 2}, torch.cat([GUESS, GUESS]), torch.cat([YES, 0 * YES + 2]))
        == expected
    )
    ties = (GUESS * 2).round()
    assert value("auroc", ties, YES) == pytest.approx(reference.roc_auc_score(YES, ties), rel=1e-12)
    assert math.isnan(value("auroc", GUESS, 0 * YES)), "one class alone has no curve"
    assert math.isnan(value("auroc", GUESS.where(GUESS < 1, NAN), YES))
    with pytest.raises(
        RuntimeError,
        match=r"metric auroc: .*MultilabelAUROC; it got outputs float32 \(1, 5\) and targets int64 \(1, 5\)",
    ):
        value("auroc", LOGITS, nn.functional.one_hot(LABELS))
    with pytest.raises(RuntimeError, match=r"class numbers from 0 to 4, or ignore_index, found -1 \.\.\. 4"):
        value("auroc", LOGITS, IGNORED)


def test_perplexity_is_torchmetrics_in_either_layout() -> None:
    from torchmetrics.text import Perplexity

    logits, tokens = torch.randn(90, 6, 11, generator=GENERATOR), torch.randint(0, 11, (90, 6), generator=GENERATOR)
    padded = tokens.masked_fill(torch.arange(6) > torch.arange(90)[:, None] % 6, -1)
    expected = pytest.approx(float(Perplexity(ignore_index=-1)(logits, padded)), rel=1e-6)
    for outputs in (logits, logits.movedim(2, 1), logits.log_softmax(2)):
        assert value({"metric": "perplexity", "ignore_index": -1}, outputs, padded) == expected
        assert value("perplexity", outputs, padded, nn.CrossEntropyLoss(ignore_index=-1)) == expected
    square = torch.randn(90, 6, 6, generator=GENERATOR)
    last = float(Perplexity()(square, tokens % 6))
    assert value("perplexity", square, tokens % 6) == pytest.approx(last, rel=1e-6)
    other = float(Perplexity()(square.movedim(1, 2), tokens % 6))
    assert value({"metric": "perplexity", "dim": 1}, square, tokens % 6) == pytest.approx(other, rel=1e-6) != last
    with pytest.raises(
        RuntimeError, match=r"metric perplexity: .*it got outputs float32 \(1, 6, 11\) and targets int64 \(1, 5\)"
    ):
        value("perplexity", logits, tokens[:, :5])


@pytest.mark.parametrize(
    ("present", "wanted"),
    [
        ((), "map needs torchmetrics and pycocotools: pip install torchmetrics pycocotools"),
        (
            ("torchmetrics",),
            "map needs pycocotools: pip install pycocotools (faster-coco-eval does instead of pycocotools)",
        ),
        (("faster_coco_eval",), "map needs torchmetrics: pip install torchmetrics"),
    ],
)
def test_map_names_the_packages_that_it_needs(
    present: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    packages = ("torchmetrics", "pycocotools", "faster_coco_eval")

    def find_spec(name: str, package: str | None = None) -> Any:
        return (object() if name in present else None) if name in packages else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ConfigError) as raised:
        entries("mae", "map")
    assert [(p.key, p.message.partition(" (faster")[0]) for p in raised.value.problems] == [
        ("metrics.1", wanted.partition(" (faster")[0])
    ]


def test_unknown_averages_are_refused() -> None:
    for name in ("f1", "auroc"):
        with pytest.raises(ValueError, match="expected average: macro"):
            entries({"metric": name, "average": "mean"})
