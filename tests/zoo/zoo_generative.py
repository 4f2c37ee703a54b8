"""VAE, GAN and SimCLR on scikit-learn's digits."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Digits(torch.utils.data.Dataset[Any]):
    """(64 numbers from -1 to 1, label)."""

    def __init__(self, n: int, first: int = 0):
        inputs, labels = load_digits(return_X_y=True)
        part = slice(first, first + n)
        self.inputs, self.labels = torch.tensor(inputs[part]).float() / 8 - 1, torch.tensor(labels[part])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.inputs[index], self.labels[index]


class TwoViews(Digits):
    """Two noisy views of each."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return tuple(self.inputs[index] + 0.2 * torch.randn(64) for _ in range(2)), self.labels[index]


class VAE(nn.Module):
    """Draws in its forward, in train mode."""

    def __init__(self, z: int = 4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2 * z))
        self.decoder = nn.Sequential(nn.Linear(z, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(inputs).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(drawn), mean, log_variance


class GAN(nn.Module):
    def __init__(self, z: int = 8):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(z, 32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)
