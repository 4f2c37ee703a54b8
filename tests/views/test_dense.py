"""What reports show of masks, boxes, tokens and generated images: the numbers are scikit-learn's and torch's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn
from torch.nn import functional

from dist_train import train
from dist_train.data import Digits
from dist_train.models import DigitsVAE
from dist_train.pages.report import write_report
from dist_train.runtime.seeding import seed_forward
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised
from dist_train.tasks import VAE
from dist_train.views.collect import (
    BoxCollector,
    GridCollector,
    MaskCollector,
    Shown,
    TokenCollector,
    collector_for,
)
from dist_train.views.dense import Boxes, BoxSample, Grids, Masks, MaskSample, Tokens, TokenSample
from dist_train.views.grids import read_grids
from dist_train.views.network import pictures


def evaluator(loss: nn.Module | None = None) -> Any:
    """What the choice of a collector looks at."""
    return SimpleNamespace(task=Supervised(Loss(loss or nn.CrossEntropyLoss(ignore_index=255))), metrics=[])


def two_ranks(make: Any, outputs: Any, targets: Any) -> Any:
    """Collected in batches of 4 by two ranks in turn, then merged."""
    ranks = [make(), make()]
    for number, start in enumerate(range(0, len(targets), 4)):
        samples = range(start, min(start + 4, len(targets)))
        ranks[number % 2].add(samples, outputs[start : samples.stop], targets[start : samples.stop])
    ranks[0].merge(ranks[1])
    return ranks[0]


def test_iou_of_masks_is_that_of_scikit_learn() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(10, 4, 5, 6), torch.randint(0, 3, (10, 5, 6))
    outputs[:, 3] = -9  # class 3 occurs nowhere
    targets[:, 0] = 255
    kind = collector_for(evaluator(), outputs, targets, 10)
    assert isinstance(kind, MaskCollector)
    assert kind.kept == [0, 2, 4, 5, 7, 9]
    found = two_ranks(lambda: collector_for(evaluator(), outputs, targets, 10), outputs, targets)
    (masks,) = found.pictures(Shown([(torch.rand(3, 5, 6), 0)] * 10, range(10), 0))
    truth, predicted = targets[:, 1:].flatten(), outputs.argmax(1)[:, 1:].flatten()
    assert np.array_equal(masks.counts, confusion_matrix(truth, predicted, labels=range(4)))
    np.testing.assert_allclose(masks.iou[:3], jaccard_score(truth, predicted, average=None))
    assert np.isnan(masks.iou[3])
    assert [one.index for one in masks.samples] == [0, 2, 4, 5, 7, 9]
    assert (masks.samples[1].truth[0] == -1).all()
    assert np.array_equal(masks.samples[1].prediction, outputs[2].argmax(0))
    assert masks.samples[0].picture is not None
    assert masks.samples[0].picture.shape == (5, 6, 3)


def test_one_column_of_a_binary_loss_is_a_mask_of_two_classes() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(3, 1, 4, 4), torch.randint(0, 2, (3, 4, 4)).float()
    collector = collector_for(evaluator(nn.BCEWithLogitsLoss()), outputs, targets, 3)
    assert isinstance(collector, MaskCollector)
    collector.add(range(3), outputs, targets)
    assert np.array_equal(collector.counts, confusion_matrix(targets.flatten(), (outputs > 0).flatten()))


def test_loss_per_token_is_torchs_own_at_each_position() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(6, 5, 7), torch.randint(0, 7, (6, 5))
    targets[3:, 3:] = -100
    found = two_ranks(lambda: collector_for(evaluator(nn.CrossEntropyLoss()), outputs, targets, 6), outputs, targets)
    assert isinstance(found, TokenCollector)
    (tokens,) = found.pictures(Shown(SimpleNamespace(decode=lambda ids: "abcdefg"[ids[0]]), range(6), 0))
    for place in range(5):
        loss = functional.cross_entropy(outputs[:, place], targets[:, place])
        assert tokens.by_position[place] == pytest.approx(float(loss), rel=1e-6)
    assert tokens.samples[4].truth == ["abcdefg"[k] for k in targets[4, :3].tolist()]
    assert tokens.samples[4].prediction == ["abcdefg"[k] for k in outputs[4, :3].argmax(1).tolist()]
    assert np.isnan(tokens.samples[4].losses).tolist() == [False, False, False, True, True]


def test_boxes_below_the_threshold_are_not_shown() -> None:
    truth = [{"boxes": torch.tensor([[0.0, 0, 2, 2]]), "labels": torch.tensor([1])}] * 2
    scores = torch.tensor([0.3, 0.6, 0.9])
    found = {"boxes": torch.arange(12.0).view(3, 4), "labels": torch.tensor([0, 1, 2]), "scores": scores}
    collector = collector_for(evaluator(), [found, found], truth, 2)
    assert isinstance(collector, BoxCollector)
    collector.add(range(2), [found, found], truth)
    (boxes,) = collector.pictures(Shown([(torch.rand(1, 8, 8), None)] * 2, range(2), 0))
    corners, labels, shown = boxes.samples[1].prediction
    assert (labels, shown.tolist()) == (["2", "1"], scores[[2, 1]].tolist())
    assert corners.tolist() == [[8, 9, 10, 11], [4, 5, 6, 7]]


def test_what_has_no_picture_has_no_collector() -> None:
    vectors, images = torch.zeros(3, 4), torch.zeros(3, 1, 4, 4)
    assert isinstance(collector_for(evaluator(), images, images, 3), GridCollector)
    for outputs, targets in (
        (None, None), (vectors, None), ({"a": vectors}, vectors), ([vectors], [vectors]), (images, vectors),
        (torch.zeros(3, 5, 4, 4), torch.zeros(3, 5, 4, 4)), (torch.zeros(3, 4, 5), torch.zeros(3, 4)),
    ):  # fmt: skip
        assert collector_for(evaluator(), outputs, targets, 3) is None


EVIL = '<script>alert("1")</script>$x^{'


def test_every_picture_is_drawn_and_escaped(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [-1, 24]])
    samples = [MaskSample(0, mask, mask.clip(0), np.zeros((2, 2, 3))), MaskSample(1, mask, mask.clip(0), None)]
    some = np.array([[0.0, 0, 2, 2]])
    none = np.zeros((0, 4))
    drawn = [
        Masks(np.eye(25, dtype=int), [EVIL] * 25, samples),
        Masks(np.zeros((2, 2), dtype=int), ["a", "b"], []),
        Masks(np.eye(300, dtype=int), [str(k) for k in range(300)], samples),
        Boxes([BoxSample(0, np.zeros((4, 4)), (some, [EVIL]), (none, [], np.zeros(0)))], 0.5),
        Boxes([BoxSample(0, None, (some, ["a"]), (some, ["b"], np.ones(1)))], 0.5),
        Tokens(np.array([1.0, np.nan]), [TokenSample(0, np.array([np.nan, 2.0]), [EVIL, "b"] * 40, ["c"] * 80)]),
        Grids(np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8), [(3, np.zeros((4, 4), np.uint8))] * 9),
    ]
    text = write_report(tmp_path, pictures=drawn).read_text()
    for title in ("IoU per class", "Masks", "Boxes", "Loss per token", "Tokens", "Outputs during training"):
        assert f"<h2>{title}</h2>" in text
    assert text.count("<script>") == 1, "ours"
    assert "&lt;script&gt;" in text
    assert text.count("step 3</figcaption>") == 6


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 64)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.net(noise).sigmoid().view(-1, 1, 8, 8)


class Generator:
    """Fits the mean of the digits, from noise."""

    gives_images = True

    def step(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        images = batch[0]
        outputs = model(torch.randn(len(images), 4))
        return functional.mse_loss(outputs, images, reduction="sum"), len(images), outputs, images

    def predict(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(torch.randn(len(batch[0]), 4))


class Silent(Generator):
    gives_images = False


class Flat(Generator):
    """Says that it gives images, and gives vectors: no reason for a run to end."""

    def step(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        loss, count, *pair = super().step(model, batch)
        return loss, count, *(part.flatten(1) for part in pair)


def generated(folder: Path, task: type) -> Path:
    torch.manual_seed(0)  # the model's first weights
    config = {
        "run": {"name": task.__name__, "dir": str(folder)},
        "data": {"train": Digits("train"), "val": Digits("val"), "global_batch_size": 200, "num_workers": 0},
        "model": Noise(),
        "task": task(),
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "6step", "evaluate_every": "2step"},
        "tracking": {"tensorboard": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(config)
    return folder / task.__name__


def test_a_generators_images_are_kept_over_time_from_one_noise(tmp_path: Path) -> None:
    run = generated(tmp_path, Generator)
    frames = read_grids(run / "grids")
    assert [step for step, _ in frames] == [2, 4, 6]
    text = (run / "report.html").read_text()
    assert "<h2>Outputs of the model</h2>" in text
    assert text.count("</figcaption></figure>") == 2 + 3
    silent = generated(tmp_path, Silent)
    assert not (silent / "grids").exists()
    hashes = [json.loads((one / "result.json").read_text())["weights_sha256"] for one in (run, silent)]
    assert hashes[0] == hashes[1], "recording changed the training"


class OtherNames(nn.Module):
    """A VAE in which nothing is called decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DigitsVAE(latent=3)

    def forward(self, images: torch.Tensor) -> Any:
        return self.inner(images)


@pytest.mark.parametrize("model", [DigitsVAE(latent=3), OtherNames()])
def test_a_vae_shows_samples_of_the_prior_over_time_where_its_model_has_a_decoder(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train({
        "run": {"name": "vae", "dir": str(tmp_path)},
        "data": {"train": Digits("train"), "val": Digits("val"), "global_batch_size": 200, "num_workers": 0},
        "model": model, "task": VAE("bernoulli"), "optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-4},
        "trainer": {"duration": "2step", "evaluate_every": "2step"},
        "tracking": {"tensorboard": False, "report": False},
    })  # fmt: skip
    ((step, grid),) = read_grids(tmp_path / "vae" / "grids")
    assert step == 2
    images = torch.stack([Digits("val")[k][0] for k in range(16)])
    with torch.no_grad():
        reconstructed = model.eval()(images)[0].sigmoid()
        seed_forward(0, 0, 0, torch.device("cpu"))
        drawn = (model.decoder if isinstance(model, DigitsVAE) else model.inner.decoder)(torch.randn(16, 3)).sigmoid()
    from_prior, from_images = (np.array_equal(grid, pictures(part, color=True)[0]) for part in (drawn, reconstructed))
    assert (from_prior, from_images) == (isinstance(model, DigitsVAE), not isinstance(model, DigitsVAE))


def test_images_that_cannot_be_made_end_no_run(tmp_path: Path) -> None:
    run = generated(tmp_path, Flat)
    assert json.loads((run / "result.json").read_text())["state"] == "completed"
    assert not (run / "grids").exists()
    assert "no images over time: ValueError: the outputs aren't images" in (run / "logs/rank-0.log").read_text()
