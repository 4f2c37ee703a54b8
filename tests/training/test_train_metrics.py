"""`trainer.train_metrics`: exact over the samples of the training batches, over stops, and refused where it can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train import train
from dist_train.config.errors import ConfigError
from dist_train.data import Digits
from dist_train.tracking.console import Console
from dist_train.tracking.live import Beside


class Recorded(nn.Module):
    """A classifier that remembers what it was asked in training, and what it answered."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layers(images)
        if self.training:
            self.seen.append((images.clone(), scores.detach().argmax(1)))
        return scores


def config_of(folder: Path, **trainer: Any) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder)},
        "data": {"train": {"_target_": "dist_train.data.Digits"}, "global_batch_size": 50},
        "model": Recorded(),
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "metrics": ["accuracy", {"metric": "accuracy", "top": 3, "name": "top3"}, "f1"],
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {
            "duration": "23step", "log_every": "10step", "micro_batch_size": 20, "train_metrics": ["accuracy", "top3"],
        } | trainer,
        "tracking": {"tensorboard": False, "report": False},
    }  # fmt: skip


def train_rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "accuracy", "top3")} for line in lines]


def test_train_metrics_are_those_of_the_samples_that_were_trained(tmp_path: Path) -> None:
    config = config_of(tmp_path / "whole")
    train(config)
    digits = Digits()
    label_of = {image.numpy().tobytes(): label for image, label in (digits[k] for k in range(len(digits)))}
    right = [
        int(answer) == label_of[image.numpy().tobytes()]
        for images, answers in config["model"].seen
        for image, answer in zip(images, answers, strict=True)
    ]
    assert len(right) == 23 * 50
    rows = train_rows(tmp_path / "whole")
    expected = [sum(right[a * 50 : b * 50]) / (50 * (b - a)) for a, b in ((0, 10), (10, 20), (20, 23))]
    assert [row["accuracy"] for row in rows] == expected
    assert all(row["top3"] > row["accuracy"] for row in rows)

    stopped = config_of(tmp_path / "stopped", stop_at="13step")
    train(stopped)
    del stopped["trainer"]["stop_at"]
    train(stopped)
    assert train_rows(tmp_path / "stopped") == rows


def test_what_a_row_says_of_training_since_the_evaluation_before_is_the_same_after_a_stop_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a train row between the evaluation before and the stop, which is when the sums were lost."""
    shown: list[tuple[int, dict[str, float]]] = []

    def evaluation(console: Console, split: str, step: int, metrics: object, beside: Beside) -> None:
        shown.append((step, dict(beside.train)))

    monkeypatch.setattr(Console, "evaluation", evaluation)
    rows = []
    for name, stops in (("whole", [{}]), ("stopped", [{"stop_at": "12step"}, {}])):
        config = config_of(tmp_path / name, evaluate_every="8step")
        config["data"]["val"] = {"_target_": "dist_train.data.Digits", "split": "val"}
        for stop in stops:
            train(config | {"trainer": config["trainer"] | stop})
        rows.append(shown[:])
        shown.clear()
    assert [step for step, _ in rows[0]] == [8, 16, 23]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("acuracy", "did you mean accuracy"), ("f1", "learns its classes in an evaluation"), ("r2", "there are accuracy")],
)
def test_what_cannot_be_added_up_is_refused_before_anything_is_written(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config_of(tmp_path, train_metrics=[name]))
    assert not (tmp_path / "run").exists()
