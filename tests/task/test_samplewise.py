"""A loss that compares samples with each other is detected on the first batch; one that is a sum over samples never is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dist_train
from dist_train.task.losses import Loss
from dist_train.task.samplewise import batch_dependence
from dist_train.task.task import Supervised

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(13, 6, generator=GENERATOR)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, -100, 2, 0, 1, 1, 0])
REAL = torch.randn(13, 3, generator=GENERATOR)
WEIGHTS = torch.tensor([0.1, 2.0, 0.7])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()


def contrast(a: Tensor, b: Tensor) -> Tensor:
    scores = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T / 0.2
    return functional.cross_entropy(scores, torch.arange(len(a)), reduction="none")


def vicreg(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets) + functional.relu(1 - outputs.std(0)).mean()


def triplet(outputs: Tensor, labels: Tensor) -> Tensor:
    apart = torch.cdist(outputs, outputs)
    same = labels[:, None] == labels
    return functional.relu(apart.where(same, 0).amax(1) - apart.where(~same, 99).amin(1) + 1)


class Noisy(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets + torch.rand_like(outputs)).square().mean(1)


class Annealed:
    calls = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return (outputs - targets).square().mean(1) * self.calls


class Pairs:
    """Both views in one forward; per sample, as FixMatch, or contrastive, as SimCLR."""

    def __init__(self, crossing: bool):
        self.crossing = crossing

    def step(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        u, v = batch["views"]
        a, b = model(torch.cat([u, v])).chunk(2)
        return (contrast(a, b) if self.crossing else (a - b).square().sum(1)).sum(), len(a)


class Clip(nn.Module):
    """Gives the similarities of all with all, so that the loss itself is plain cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * functional.normalize(x, dim=1) @ functional.normalize(x.roll(1, 1), dim=1).T


def found(task: Any, batch: Any, model: nn.Module | None = None) -> bool:
    with torch.no_grad():
        return batch_dependence(task, model or net(), batch, length=13, samples=12) is not None


@pytest.mark.parametrize(
    ("loss", "targets"),
    [(contrast, REAL), (vicreg, REAL), (triplet, Y), (lambda o, y: functional.cross_entropy(o, y, weight=WEIGHTS), Y)],
)
def test_losses_across_samples_and_means_by_another_weight_are_detected(loss: Any, targets: Tensor) -> None:
    assert found(Supervised(Loss(loss)), [X, targets])


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(weight=WEIGHTS), Y),
        (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), Y),
        (nn.CrossEntropyLoss(label_smoothing=0.1), Y),
        (functools.partial(functional.cross_entropy, ignore_index=2), Y.clamp(min=0)),
        (nn.MSELoss(), REAL),
        (nn.MSELoss(reduction="sum"), REAL),
        (lambda o, t: functional.mse_loss(o, t), REAL),
        (lambda o, t: (o - t).square().mean(1), REAL),
        (
            lambda o, t: (
                functional.cross_entropy(o, t, weight=WEIGHTS, reduction="sum"),
                WEIGHTS[t.clamp(0)][t >= 0].sum(),
            ),
            Y,
        ),
        (Noisy(), REAL),
        (Annealed(), REAL),
        (
            lambda o, texts: torch.stack([row.sum() * len(text) for row, text in zip(o, texts, strict=True)]),
            ["ab"] * 13,
        ),
    ],
)
def test_sums_over_samples_raise_no_alarm(loss: Any, targets: Any) -> None:
    assert not found(Supervised(Loss(loss)), [X, targets])


def test_tasks_and_models_across_samples_are_detected_too() -> None:
    views = {"views": (X, X + 0.1)}
    assert found(Pairs(crossing=True), views)
    assert not found(Pairs(crossing=False), views)
    assert found(Supervised(Loss(nn.CrossEntropyLoss())), [X, torch.zeros(13, dtype=torch.long)], Clip())
    assert not found(Pairs(crossing=True), {"views": (X, X, X)}), "what fails here fails in training, with a message"


def test_the_batch_is_left_as_it_is() -> None:
    def shifted(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs, targets.sub_(1))

    batch = [X.clone(), REAL.clone()]
    found(Supervised(Loss(shifted)), batch, nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)))
    assert torch.equal(batch[0], X)
    assert torch.equal(batch[1], REAL)


@pytest.mark.parametrize(("micro", "warned"), [(4, True), (16, False)])
def test_a_warning_is_logged_where_a_step_is_split(
    micro: int, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.randn(16, 3))
    dist_train.train(
        {
            "run": {"name": "contrast", "dir": str(tmp_path)},
            "data": {"train": data, "global_batch_size": 16},
            "model": net().train(),
            "loss": contrast,
            "optimizer": {"_target_": torch.optim.SGD, "lr": 0.1},
            "trainer": {"duration": "1ep", "micro_batch_size": micro},
            "tracking": {"tensorboard": False, "report": False},
        }
    )
    out = " ".join("".join(capsys.readouterr()).split())
    assert ("the loss contrast isn't a sum over samples: 4 of them at once give" in out) == warned
