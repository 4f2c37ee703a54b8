"""Metrics computed in parts equal scikit-learn's over all samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from built import entries
from torch import Tensor, nn

import dist_train
from dist_train.checkpoint.store import CheckpointStore
from dist_train.config.fields import Duration
from dist_train.config.schema import StopWhenConfig
from dist_train.runtime.storage import open_storage
from dist_train.task.entries import is_lower_better, misnamed
from dist_train.task.metrics import Metric
from dist_train.tasks import LanguageModel
from dist_train.training.due import StopWhen

GENERATOR = torch.Generator().manual_seed(1)
LOGITS = torch.randn(60, 9, generator=GENERATOR)
LABELS = torch.randint(0, 9, (60,), generator=GENERATOR)
REAL, GUESS = torch.randn(60, generator=GENERATOR), torch.randn(60, generator=GENERATOR)
YES = (REAL > 0).float()
NONE = torch.zeros(0, dtype=torch.float64)  # the sums of a metric that isn't decomposable


def value_of(name: str, outputs: Tensor, targets: Tensor, loss: Any = None) -> float:
    (metric,) = entries(name, loss=loss)
    assert metric.name == name
    if metric.size is None:
        metric.settle(metric.classes_in(outputs, targets))
    parts = [slice(0, 1), slice(1, 30), slice(30, None)]
    sums = [metric.sums(outputs[part], targets[part]) for part in parts]
    assert all(part.dtype == torch.float64 and part.shape == (metric.size,) for part in sums)
    (number,) = metric.results(torch.stack(sums).sum(0)).values()
    return number


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
def test_parts_give_the_value_of_the_whole(name: str, outputs: Tensor, targets: Tensor, expected: float) -> None:
    assert value_of(name, outputs, targets) == pytest.approx(float(expected), rel=1e-6)


def test_binary_accuracy_looks_at_the_sign_of_logits() -> None:
    expected = reference.accuracy_score(YES, GUESS > 0)
    assert value_of("binary_accuracy", GUESS, YES, nn.BCEWithLogitsLoss()) == expected
    beyond_half = reference.accuracy_score(YES, GUESS > 0.5)
    assert value_of("binary_accuracy", GUESS, YES, nn.BCELoss()) == beyond_half != expected


def test_ignored_labels_are_not_counted_and_mixed_ones_count_by_the_largest_share() -> None:
    ignored = LABELS.where(torch.arange(60) < 20, -100)
    assert value_of("accuracy", LOGITS, ignored) == reference.accuracy_score(LABELS[:20], LOGITS[:20].argmax(1))
    mixed = 0.6 * nn.functional.one_hot(LABELS, 9) + 0.4 / 9
    assert value_of("accuracy", LOGITS, mixed) == reference.accuracy_score(LABELS, LOGITS.argmax(1))


@pytest.mark.parametrize("name", ["accuracy", "top5"])
def test_accuracy_leaves_out_what_the_loss_ignores_in_any_shape(name: str) -> None:
    loss, void = nn.CrossEntropyLoss(ignore_index=255), torch.arange(60) % 3 == 0
    targets, top = LABELS.where(~void, 255), 1 if name == "accuracy" else 5
    expected = reference.top_k_accuracy_score(LABELS[~void].numpy(), LOGITS[~void].numpy(), k=top, labels=np.arange(9))
    assert value_of(name, LOGITS, targets, loss) == pytest.approx(expected, rel=1e-12)
    assert value_of(name, LOGITS, targets) < expected
    pixels, masks = LOGITS.view(10, 2, 3, 9).permute(0, 3, 1, 2), targets.view(10, 2, 3)
    assert value_of(name, pixels, masks, loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "top5", "f1", "miou"])
def test_the_classes_of_a_language_models_outputs_are_in_its_last_dim(name: str) -> None:
    """Known by the shapes, or, with as many tokens as words, by the task."""
    alone = value_of(name, LOGITS[:54], LABELS[:54])
    assert value_of(name, LOGITS[:54].view(9, 6, 9), LABELS[:54].view(9, 6)) == alone
    assert value_of(name, LOGITS[:54].view(6, 9, 9), LABELS[:54].view(6, 9), LanguageModel()) == alone


@pytest.mark.parametrize("name", ["accuracy", "top5", "f1", "miou", "perplexity"])
def test_a_task_whose_predictions_have_another_form_than_what_metrics_get_is_read_by_the_shapes(name: str) -> None:
    task = LanguageModel()  # says that classes are in the last dim
    outputs, targets = LOGITS[:54].view(9, 6, 9), LABELS[:54].view(9, 6)
    assert value_of(name, outputs.movedim(-1, 1), targets, task) == pytest.approx(value_of(name, outputs, targets))


def test_a_column_of_labels_is_not_compared_with_each_row() -> None:
    expected = reference.accuracy_score(LABELS, LOGITS.argmax(1))
    assert value_of("accuracy", LOGITS, LABELS[:, None]) == expected
    with pytest.raises(ValueError, match=r"expects outputs \(N, classes, ...\) and the class numbers \(N, ...\)"):
        value_of("accuracy", LOGITS.view(10, 6, 9), LABELS.view(10, 2, 3))


@pytest.mark.parametrize(("name", "message"), [("accuracy", "binary_accuracy"), ("mae", "element by element")])
def test_shapes_that_do_not_fit_are_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        value_of(name, GUESS if name == "accuracy" else LOGITS, REAL)


def test_classes_of_torchmetrics_are_taken_alone_and_in_collections() -> None:
    target = "torchmetrics.regression.MeanAbsoluteError"
    both = [{"_target_": target}, {"_target_": "torchmetrics.regression.R2Score"}]
    alone, collection = entries({"_target_": target}, {"_target_": "torchmetrics.MetricCollection", "metrics": both})
    for metric in (alone, collection):
        for part in (slice(0, 30), slice(30, None)):
            metric.update(GUESS[part, None], REAL[part])
    expected = reference.mean_absolute_error(REAL, GUESS)
    assert alone.name == "mean_absolute_error"
    assert alone.results(NONE) == {"mean_absolute_error": pytest.approx(expected, rel=1e-5)}
    assert collection.name == "MeanAbsoluteError"
    found = collection.results(NONE)
    assert found["MeanAbsoluteError"] == pytest.approx(expected, rel=1e-5)
    assert found["R2Score"] == pytest.approx(reference.r2_score(REAL.numpy(), GUESS.numpy()), rel=1e-4)


class Given(Metric):
    """Returns fixed values."""

    def __init__(self, name: str = "given", sums: Any = None, value: float = 0.5):
        self.name, self.gives, self.value = name, sums, value

    def sums(self, outputs: Tensor, targets: Any) -> Tensor:
        return torch.ones(2, dtype=torch.float64) if self.gives is None else self.gives(outputs, targets)

    def result(self, sums: Tensor) -> float:
        return self.value


MAE = {"_target_": "torchmetrics.regression.MeanAbsoluteError"}


@pytest.mark.parametrize(
    ("specs", "name"),
    [
        (["accuracy", "top5", {"_target_": "dist_train.task.metrics.Accuracy", "ignore_index": 0}], "accuracy"),
        ([MAE, MAE], "mean_absolute_error"),
        ([{"_target_": "torchmetrics.MetricCollection", "metrics": [MAE]}, Given("MeanAbsoluteError")], "MeanAbsolute"),
        *(([Given(name)], name) for name in ("loss", "eval_samples", "raw_loss", "step")),
    ],
)
def test_two_metrics_of_one_name_are_refused(specs: list[Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        entries(*specs)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda o, t: torch.ones(3, dtype=torch.float64), r"metric given: .*shape \(2,\).*gave \(3,\)"),
        (lambda o, t: torch.ones(2), r"metric given: .*float64.*gave \(2,\) of torch.float32"),
        (lambda o, t: 0.5, "metric given: .*gave a float"),
        (lambda o, t: o["logits"], "metric given: "),
    ],
)
def test_a_metric_that_fails_or_gives_other_sums_is_named(gives: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        entries(Given(sums=gives))[0].sums(GUESS, REAL)
    counts = entries(Given(sums=lambda o, t: torch.tensor([3, 2**53 - 1])))[0].sums(GUESS, REAL)
    assert counts.tolist() == [3, 2**53 - 1], "integers lose nothing"


def test_which_way_is_better_is_what_the_metric_says_and_else_its_name() -> None:
    hamming = {"_target_": "torchmetrics.classification.BinaryHammingDistance"}
    collection = {"_target_": "torchmetrics.MetricCollection", "metrics": {"off": hamming, "err_free": MAE}}
    metrics = entries(collection, "accuracy", "mse")
    lower = {name: is_lower_better(f"val/{name}", metrics) for name in ("off", "err_free", "accuracy", "mse", "loss")}
    assert lower == {"off": True, "err_free": True, "accuracy": False, "mse": True, "loss": True}
    assert is_lower_better("val/raw_mse", metrics)
    assert misnamed(metrics) == {"off": "min", "err_free": "min"}
    assert not is_lower_better("val/neg_mean_squared_error", [])


def test_nan_is_never_the_best() -> None:
    nan = float("nan")

    def stopped_at(*values: float) -> int | None:
        rule = StopWhen(StopWhenConfig(metric="val/f1", patience=Duration(3, "ep")), steps_per_epoch=1, lower=False)
        return next((k for k, value in enumerate(values, 1) if rule.judge({"val/f1": value}, k)), None)

    assert stopped_at(nan, 0.1, 0.2, 0.3, 0.4, 0.5) is None
    assert stopped_at(nan, 0.4, nan, 0.3, 0.3) == 5
    assert stopped_at(nan, nan, nan, 0.4) == 3, "as other early stopping counts"


class Digit:
    """A target of a class of one's own, as graphs and detections have."""

    def __init__(self, rows: list[tuple[Tensor, Tensor]]):
        self.y = torch.stack([row[1] for row in rows])


def test_samples_are_counted_by_the_plan_ties_go_to_the_better_loss_and_json_stays_json(tmp_path: Path) -> None:
    """Losses of 6, 2, 2 and 5 at the same metric: the second evaluation is kept, and the third no better, so not saved."""
    losses = iter([0.0, 6.0, 2.0, 2.0, 5.0])  # the first is that of the check before the first step
    data = torch.utils.data.TensorDataset(torch.randn(10, 3, generator=GENERATOR), torch.zeros(10))

    class Loss(nn.Module):
        def forward(self, outputs: Tensor, targets: Digit) -> tuple[Tensor, int]:
            level = outputs.sum() * 0.0
            return (level if self.training else level + next(losses) * 10), 10

    result = dist_train.train(
        {
            "run": {"name": "ties", "dir": str(tmp_path)},
            "data": {
                "train": data,
                "val": data,
                "global_batch_size": 10,
                "collate": lambda rows: (torch.stack([row[0] for row in rows]), Digit(rows)),
            },
            "model": nn.Linear(3, 1),
            "loss": Loss(),
            "metrics": [Given(), Given("never", value=float("nan"))],
            "optimizer": {"_target_": torch.optim.SGD, "lr": 0.1},
            "trainer": {"duration": "4ep"},
            "checkpoint": {"every": "4ep"},
            "tracking": {"tensorboard": False, "report": False},
        }
    )

    def strictly(path: Path) -> Any:
        return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert (result["kept"], result["kept_step"]) == ("best", 2)
    written = strictly(tmp_path / "ties" / "result.json")
    assert written["metrics"]["val"] == {"loss": 2.0, "given": 0.5, "never": None, "eval_samples": 10}
    (kept,) = (tmp_path / "ties" / "checkpoints").glob("step-00000002/manifest.json")
    assert strictly(kept)["metrics"]["val/never"] is None
    found = CheckpointStore(open_storage(str(tmp_path / "ties" / "checkpoints")))
    assert found.ranked("val/given", "max") == [2, 4, 1]
    assert found.ranked("val/never", "max") == []
