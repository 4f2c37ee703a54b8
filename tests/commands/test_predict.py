"""Predictions as a table: complete, in order, the same on any number of processes."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import result
from torch import nn

import dist_train
from dist_train.data import CSV, Digits
from dist_train.evaluation.meaning import Meaning, read_meaning
from dist_train.main import main
from dist_train.task.entries import MetricEntry, build_metric
from dist_train.task.losses import Loss
from dist_train.task.metrics import Accuracy, BinaryAccuracy, MeanError, Metric
from dist_train.task.task import Supervised


def predicted(folder: Path, *arguments: str) -> list[dict[str, str]]:
    path = folder / "out.csv"
    assert main(["predict", *arguments, "--output", str(path)]) == 0
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_any_number_of_processes_writes_the_same_bytes(digits: Path, together: Path, tmp_path: Path) -> None:
    rows = predicted(tmp_path, "--run", str(digits))
    one = (tmp_path / "out.csv").read_bytes()
    for processes in ("2", "3"):
        assert (together / processes / "out.csv").read_bytes() == one
        assert not list((together / processes).glob(".*"))
    assert [row["index"] for row in rows] == [str(k) for k in range(360)]


def test_the_table_holds_what_the_model_says(digits: Path, tmp_path: Path) -> None:
    rows = predicted(tmp_path, str(digits))
    test = Digits("test", flat=True)
    assert test.targets is not None
    with torch.no_grad():
        probabilities = dist_train.load(digits)(test.inputs).softmax(1)
    table = np.array([[float(row[f"probability_{k}"]) for k in range(10)] for row in rows])
    torch.testing.assert_close(torch.from_numpy(table).float(), probabilities)
    assert [int(row["prediction"]) for row in rows] == table.argmax(1).tolist()
    assert [int(row["target"]) for row in rows] == test.targets.tolist()
    assert [row["prediction_name"] for row in rows] == [row["prediction"] for row in rows]
    right = sum(row["prediction"] == row["target"] for row in rows)
    assert right / 360 == result(digits)["metrics"]["test"]["accuracy"]


def test_data_without_labels_are_predicted_too(digits: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "new.npy", Digits("test", flat=True).inputs[:7].numpy())
    rows = predicted(
        tmp_path, str(digits), f"data.test={{_target_: dist_train.data.Arrays, inputs: {tmp_path}/new.npy}}"
    )
    labelled = predicted(tmp_path, str(digits), "data.eval_batch_size=7")[:7]
    assert list(rows[0]) == ["index", "prediction", *(f"probability_{k}" for k in range(10))]
    assert [row["probability_3"] for row in rows] == [row["probability_3"] for row in labelled]


def test_a_regression_predicts_in_the_units_of_the_table(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(table.parent.parent)
    rows = predicted(tmp_path, str(table))
    given = CSV("all.csv", "price", split="test", train_path="all.csv")
    assert list(rows[0]) == ["index", "prediction", "target"]
    assert given.targets is not None
    np.testing.assert_allclose([float(row["target"]) for row in rows], given.targets, rtol=1e-5)
    np.testing.assert_allclose([float(row["prediction"]) for row in rows], given.targets, atol=5)  # deviation: 115

    new = tmp_path / "new.csv"
    new.write_text("a,b,c\n1,0,0\n0,0,0\n")
    rows = predicted(tmp_path, str(table), f"data.test.path={new}", "data.test.split=null")
    assert list(rows[0]) == ["index", "prediction"]
    np.testing.assert_allclose([float(row["prediction"]) for row in rows], [1050, 1000], atol=5)


def test_without_an_output_the_table_is_printed(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(digits), "--split", "val"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("index,prediction,")
    assert len(lines) == 181


def test_a_place_that_cannot_be_written_is_named(
    digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert main(["predict", str(digits), "--output", str(tmp_path / "file" / "out.csv")]) == 2
    assert "--output" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("elsewhere")
    for place in (str(tmp_path / "pipe"), "/dev/null", str(tmp_path / "link"), str(tmp_path)):
        assert main(["predict", str(digits), "--output", place]) == 2
        assert f"--output: {place} can't be written: it is a" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    for own in ("model.pt", "config.yaml", "checkpoints/x.csv"):
        assert main(["predict", str(digits), "--output", str(digits / own)]) == 2
        assert "is a run's own file" in capsys.readouterr().err


class Stub:
    """What `read_meaning` looks at."""

    def __init__(self, loss: object, metrics: tuple[Metric, ...] = ()):
        self.task = Supervised(Loss(loss)) if callable(loss) else object()  # type: ignore[arg-type]
        self.metrics = [MetricEntry("metrics.0", metric, metric.name) for metric in metrics]


def of_torchmetrics(name: str, **options: int) -> Callable[[], Metric]:
    """Made by the test, not by all who collect it: importing torchmetrics takes seconds."""
    return lambda: build_metric({"_target_": f"torchmetrics.classification.{name}", **options}, None).metric


def OWN(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # noqa: N802
    return (outputs - targets).square()


ONE, SEVERAL = torch.tensor([0.2, 0.7]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("loss", "outputs", "metrics", "meaning"),
    [
        (nn.CrossEntropyLoss(), SEVERAL, (), Meaning("classes", "softmax")),
        (nn.functional.cross_entropy, SEVERAL, (), Meaning("classes", "softmax")),
        (nn.NLLLoss(), SEVERAL.log(), (), Meaning("classes", "exp")),
        (nn.BCELoss(), ONE, (), Meaning("binary")),
        (nn.BCEWithLogitsLoss(), ONE, (), Meaning("binary", "sigmoid", 0.0)),
        (nn.BCEWithLogitsLoss(), SEVERAL, (), Meaning("values", "sigmoid")),
        (nn.MSELoss(), SEVERAL, (), Meaning("values")),
        (OWN, SEVERAL, (Accuracy(),), Meaning("classes")),
        (OWN, SEVERAL.log(), (Accuracy(),), Meaning("classes", "exp")),
        (OWN, SEVERAL * 9, (Accuracy(),), Meaning("classes", "softmax")),
        (OWN, SEVERAL, (MeanError(),), Meaning("values")),
        (OWN, SEVERAL * 9, (), Meaning("values")),
        (None, SEVERAL * 9, (Accuracy(),), Meaning("classes", "softmax")),
        (None, ONE, (BinaryAccuracy(threshold=0.0),), Meaning("binary", "sigmoid", 0.0)),
        (OWN, SEVERAL * 9, (of_torchmetrics("MulticlassF1Score", num_classes=2),), Meaning("classes", "softmax")),
        (OWN, SEVERAL * 9, (of_torchmetrics("MultilabelF1Score", num_labels=2),), Meaning("values", "sigmoid")),
        (OWN, ONE * 9, (of_torchmetrics("BinaryF1Score"),), Meaning("binary", "sigmoid", 0.0)),
        (None, torch.tensor([3, 1]), (Accuracy(),), Meaning("labels")),
        (None, torch.tensor([3, 1]), (), Meaning("values")),
    ],
)
def test_outputs_are_classes_only_where_a_loss_or_a_metric_says_so(
    loss: object, outputs: torch.Tensor, metrics: tuple[object, ...], meaning: Meaning
) -> None:
    metrics = tuple(metric() if isfunction(metric) else metric for metric in metrics)
    assert read_meaning(Stub(loss, metrics), outputs) == meaning  # type: ignore[arg-type]
