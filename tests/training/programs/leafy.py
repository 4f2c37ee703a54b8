"""Models that `distributed.reproducibility: bitwise` refuses, and some that it takes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset


class Images(Dataset[tuple[Tensor, int]]):
    """Random pictures of 3 x 8 x 8 in 4 classes."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index)), index % 4


class Net(nn.Module):
    """A convolution and a head; what is between them is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 4)
        self.make()

    def make(self) -> None:
        pass

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.features(x)).flatten(1))


class OldSpectralNorm(Net):
    def make(self) -> None:
        self.features = nn.utils.spectral_norm(self.features)


class SpectralNorm(Net):
    def make(self) -> None:
        self.features = nn.utils.parametrizations.spectral_norm(self.features)


class Center(Net):
    """DINO's: an average of the outputs in a buffer."""

    def make(self) -> None:
        self.register_buffer("center", torch.zeros(4))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.center.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.center[:, None, None]


class Replaced(Center):
    """The same, by another tensor each time."""

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.center = self.center * 0.9 + x.detach().mean((0, 2, 3)) * 0.1
        return x - self.center[:, None, None]


class ThroughData(Center):
    """The same, by a write that autograd doesn't count."""

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.center.data.add_(x.detach().mean((0, 2, 3)))
        return x - self.center[:, None, None]


class Scale(Net):
    """A number that follows the data."""

    def make(self) -> None:
        self.scale = 1.0

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * float(x.detach().abs().mean())
        return x / self.scale


class Teacher(Net):
    """A momentum encoder, whose frozen weights the forward moves."""

    def make(self) -> None:
        self.teacher = copy.deepcopy(self.features).requires_grad_(False)

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            for mine, theirs in zip(self.teacher.parameters(), self.features.parameters(), strict=True):
                mine.data = mine.data * 0.9 + theirs.data * 0.1
        return x


class Unpool(nn.Module):
    """Has no deterministic form on any device."""

    def forward(self, x: Tensor) -> Tensor:
        small, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        return nn.functional.max_unpool2d(small, places, 2)


class Forward(Net):
    def make(self) -> None:
        self.unpool = Unpool()

    def between(self, x: Tensor) -> Tensor:
        return self.unpool(x)


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return Unpool()(gradient)


class Squeeze(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _InBackward.apply(x)


class Backward(Net):
    def make(self) -> None:
        self.squeeze = Squeeze()

    def between(self, x: Tensor) -> Tensor:
        return self.squeeze(x)


class Sparse(Net):
    def make(self) -> None:
        self.table = nn.Embedding(4, 4, sparse=True)

    def between(self, x: Tensor) -> Tensor:
        places = x[:, 0, 0, 0].abs().long().clamp(max=3)
        return x + self.table(places)[:, :, None, None]


class Unused(Net):
    def make(self) -> None:
        self.spare = nn.Linear(2, 2)


class Counting(Net):
    """Counters may advance: once a step."""

    def make(self) -> None:
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.calls = 0

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.calls += 1
        return self.relu(self.norm(x)) * (1 + self.calls / 100)


class Frozen(Net):
    """Statistics that stay, beside ones that move."""

    def make(self) -> None:
        self.still, self.norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.still.running_mean.fill_(0.1)
        self.still.requires_grad_(False)

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.still.eval()
        return self

    def between(self, x: Tensor) -> Tensor:
        return self.norm(self.still(x))


class Late(Net):
    """A buffer that changes only after some steps."""

    def make(self) -> None:
        self.calls = 0
        self.register_buffer("late", torch.zeros(1))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls > 2:
                self.late += 1
        return x


class MadeLate(Net):
    """A buffer that the first forward makes."""

    def between(self, x: Tensor) -> Tensor:
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(4))
        if self.training:
            self.seen.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x - self.seen[:, None, None]


class Previous(Net):
    """What it has seen last, None at first."""

    def make(self) -> None:
        self.previous = None

    def between(self, x: Tensor) -> Tensor:
        y = x if self.previous is None else x - self.previous
        self.previous = x.detach().mean()
        return y


class InADict(Net):
    """What it has seen, where nobody looks."""

    def make(self) -> None:
        self.state = {"mean": torch.zeros(())}

    def between(self, x: Tensor) -> Tensor:
        self.state["mean"] = (self.state["mean"] + x.detach().mean()) / 2
        return x - self.state["mean"]


class MaxNorm(Net):
    """The embedding of one token, which a forward shortens where it is too long: none is yet."""

    def make(self) -> None:
        self.table = nn.Embedding(4, 4, max_norm=100.0)

    def between(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, 0, 0, 0] > 0).long())[:, :, None, None]


class Shrinking(Net):
    """A weight that each forward makes smaller."""

    def between(self, x: Tensor) -> Tensor:
        self.head.weight.data.mul_(0.99)
        return x


class Keeping(Net):
    """What it keeps is harmless: a table made once, the last picture, a weight that is kept short, counts without a stamp."""

    def make(self) -> None:
        self.table, self.last = None, None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def between(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1], device=x.device)
        self.last = x.detach()
        self.head.weight.data.clamp_(-0.05, 0.05)
        if self.training and torch.is_grad_enabled():
            self.steps.data += 1
        return x * self.table / (1 + self.steps / 100)


class Reentrant(nn.Module):
    """Reentrant checkpoints that share a layer: a backward comes back to its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(192, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        for _ in range(3):
            hidden = checkpoint(lambda h: self.shared(h).tanh(), hidden, use_reentrant=True)
        return self.last(hidden)


class CheckpointedNorm(Net):
    """BatchNorm in a checkpoint, whose backward computes it once more."""

    def make(self) -> None:
        self.norm = nn.BatchNorm2d(4)

    def between(self, x: Tensor) -> Tensor:
        return checkpoint(self.norm, x, use_reentrant=False)


class ReentrantCenter(Center):
    """A buffer that may not change, beside a reentrant checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(torch.tanh, self.between(self.features(x)), use_reentrant=True).flatten(1))


class Usage(Net):
    """An integer that depends on the data."""

    def make(self) -> None:
        self.register_buffer("usage", torch.zeros((), dtype=torch.int64))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.usage += int((x > 0).sum())
        return x


def resnet() -> nn.Module:
    """Its ReLUs work in place."""
    return torchvision.models.resnet18(num_classes=4)


class Wide:
    """A hundred sums of numbers that aren't counts; its value is the first that has all of them in its last bits."""

    name, size, higher_is_better = "wide", 100, None

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.double().exp().sum() * torch.linspace(0.1, 3.0, 100, dtype=torch.float64)).sin()

    def result(self, sums: Tensor) -> dict[str, float]:
        return {str(k): float(value) for k, value in enumerate(sums)}
