"""The data and the models of the runs in bench/gpu_runs.py."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Blobs(Dataset[tuple[Tensor, int]]):
    """64 random numbers with a class's pattern on them, and the class."""

    def __init__(self, samples: int):
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % 10
        return torch.randn(64) + 3 * (torch.arange(64) % 10 == label), label


class Net(nn.Module):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 10)."""
        return self.net(x)  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """What a gradient depends on beside its own sample: normalization over the micro-batch, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(256)
        self.net = nn.Sequential(nn.Linear(64, 256), norm, nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 10)."""
        return self.net(x)  # type: ignore[no-any-return]


class Hungry(Net):
    """Half of a card for 32 samples: 64 don't fit."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Net`."""
        if self.training and len(x) > 16:
            if not x.is_cuda:
                raise MemoryError
            total = torch.cuda.get_device_properties(x.device).total_memory
            room = torch.empty(int(len(x) / 48 * total), dtype=torch.uint8, device=x.device)  # noqa: F841
        return super().forward(x)


class Hangs(Net):
    """The device hangs in the sixth step."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        """As `Net`."""
        Hangs.steps += self.training
        if Hangs.steps == 6:
            if x.is_cuda:
                torch.cuda._sleep(10**13)
            else:
                time.sleep(1000)
        return super().forward(x)
