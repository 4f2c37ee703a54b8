"""Small data, losses and hooks that the oracle's configs name; everything fits in a few kilobytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from dist_train.training.callbacks import Callback


class Points(Dataset[Any]):
    """(features, class) with noise from all three generators, new in each epoch; `bad` gives one sample a wild value."""

    def __init__(
        self, samples: int = 22, *, shape: Any = (5,), classes: int = 3, seed: int = 0, noise: float = 0.0,
        ignored: int = 0, bad: Any = 0.0, target: str = "class", double: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float64 if double else torch.float32
        self.inputs = torch.randn(samples, *shape, generator=generator, dtype=dtype)
        plane = torch.randn(self.inputs[0].numel(), classes, generator=torch.Generator().manual_seed(99), dtype=dtype)
        scores = self.inputs.flatten(1) @ plane
        kinds = {"class": scores.argmax(1), "number": scores[:, :1], "binary": (scores[:, 0] > 0).float()}
        self.targets, self.noise = kinds[target], noise
        self.targets[:ignored] = -100
        if bad:
            self.inputs[samples // 2] = float(bad)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = float(torch.rand(())) + float(np.random.rand()) + random.random() if self.noise else 0.0
        return self.inputs[index] + self.noise * drawn, self.targets[index]


class Broken(Points):
    """The same, with samples that can't be read: three in a row and every seventh."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = super().__getitem__(index)
        if index in (8, 9, 10) or index % 7 == 3:
            raise OSError(f"sample {index} is broken")
        return sample


class Named(Points):
    """The same as dicts in dicts, with more than the model takes."""

    def __getitem__(self, index: int) -> Any:
        points, label = super().__getitem__(index)
        return {
            "scale": points.abs().mean(),
            "inner": {"points": points, "label": label, "scale": label},
            "label": 2 - label,
        }


class Scaled(nn.Sequential):
    """A Sequential with an input more."""

    def forward(self, points: Tensor, scale: Tensor) -> Tensor:
        return super().forward(points * scale[:, None])


class Stream(IterableDataset[Any]):
    """The same, as a stream of ten samples."""

    def __init__(self, **options: Any) -> None:
        self.points = Points(10, **options)

    def __iter__(self) -> Iterator[Any]:
        return (self.points[index] for index in range(10))


class Double(nn.Sequential):
    """A Sequential in double precision."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.double()


def doubled(samples: list[Any]) -> Any:
    """A collate function: inputs twice as large."""
    inputs, targets = default_collate(samples)
    return inputs * 2, targets


def weighted_squares(outputs: Tensor, targets: Tensor, power: float = 2.0) -> tuple[Tensor, Tensor]:
    """A loss with a denominator of its own: (sum, weight)."""
    errors = (outputs - targets).abs().pow(power)
    weights = 1 + (targets > 0).float()
    return (errors * weights).sum(), weights.sum()


class Pairs:
    """A task: the class and, from the same outputs, how large they are."""

    def __init__(self, penalty: float = 0.0) -> None:
        self.penalty = penalty

    def step(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        inputs, targets = batch
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, targets, reduction="sum") + self.penalty * outputs.pow(2).sum()
        return loss, len(targets), outputs, targets

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])


class Cooling(Callback):
    """Changes the lr by hand after an epoch, and logs a figure."""

    def on_step_end(self, trainer: Any) -> None:
        trainer.log("own", float(trainer.step))

    def on_epoch_end(self, trainer: Any) -> None:
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 0.5
