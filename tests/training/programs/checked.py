"""A model, data and metrics with state of their own, and some that fail in evaluation."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.metrics import Metric


class Points(torch.utils.data.Dataset[Any]):
    """Samples sorted by class, with noise from a generator that the splits share: to read one changes what follows."""

    classes = ["low", "high point", "top"]
    generator = np.random.RandomState(3)

    def __init__(self, n: int = 60, broken: int | None = None, own_noise: bool = True):
        self.n, self.broken, self.noise = n, broken, Points.generator if own_noise else None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.broken:
            raise OSError("a file is missing")
        label = 3 * index // self.n
        noise = torch.randn(4) if self.noise is None else torch.from_numpy(self.noise.randn(4)).float()
        return torch.tensor([label, 1.0, 0.0, 0.0]) + noise, label


class Lengths(Points):
    """Two sizes, in dataset order: default_collate takes neighbours only."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, label = super().__getitem__(index)
        return (x if index < self.n // 2 else torch.cat([x, x])), label


class Mean(nn.Module):
    """Takes any length."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(x.mean(1, keepdim=True))}


class Handle(Points):
    """A file that is opened at the first read, as HDF5's: what a forked process inherits of it, it can't read from."""

    opened_by: int | None = None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.opened_by = self.opened_by or os.getpid()
        if self.opened_by != os.getpid():
            raise OSError("a file of another process")
        return super().__getitem__(index)


class Net(nn.Module):
    """Dropout, BatchNorm, a counter, and a list that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.calls, self.sizes = 0, list[int]()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        self.sizes.append(len(x))
        return {"out": self.body(x) * (1 + 0.001 * (len(self.sizes) % 3)), "aux": x}


def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["out"], targets, reduction="none")


class Calls(Metric):
    """How often it was asked: state of its own."""

    name, size = "calls", 1

    def __init__(self) -> None:
        self.asked = 0

    def sums(self, outputs: Any, targets: Tensor) -> Tensor:
        self.asked += 1
        return torch.tensor([0.0]).double()

    def result(self, sums: Tensor) -> float:
        return float(self.asked)


class Fails(Metric):
    """Fails where it is told to."""

    name = "fails"

    def __init__(self, where: str, least: int = 10**9):
        self.where, self.least = where, least

    def sums(self, outputs: Any, targets: Tensor) -> Tensor:
        if self.where == "sums":
            return outputs["logits"]  # type: ignore[no-any-return]
        return torch.tensor([len(targets), 1])

    def result(self, sums: Tensor) -> Any:
        if self.where == "result" and sums[0] < self.least:
            raise ValueError(f"{int(sums[0])} samples are too few")
        return torch.zeros(2, 2) if self.where == "shape" else 1.0


class Best(Metric):
    """Of the samples of a batch those with the k highest scores: needs as many."""

    name = "best"

    def __init__(self, k: int):
        self.k = k

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([outputs[:, 0].topk(self.k).values.double().sum(), torch.tensor(self.k).double()])


def first_column(outputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    return outputs["out"][:, 0], targets.float()


class Whole:
    """The same with update, compute and reset."""

    def __init__(self, where: str):
        self.where = where

    def reset(self) -> None:
        pass

    def update(self, outputs: Any, targets: Tensor) -> None:
        if self.where == "update":
            raise KeyError("boxes")

    def compute(self) -> Any:
        return {"compute": lambda: "none", "loss": lambda: {"loss": 1.0}}.get(self.where, lambda: 1.0)()


class TrainsOnly:
    """A task that forgets about evaluation."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        if not torch.is_grad_enabled():
            raise NotImplementedError("no labels here")
        return loss(outputs, batch[1]).sum(), len(batch[1]), outputs["out"], batch[1]

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])["out"]
