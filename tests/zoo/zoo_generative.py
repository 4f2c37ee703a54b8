"""VAE, GAN and SimCLR on scikit-learn's digits."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional


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


class ELBO:
    """Reconstruction and KL divergence, both summed over the batch."""

    def step(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        inputs, _ = batch
        outputs, mean, log_variance = model(inputs)
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
        return functional.mse_loss(outputs, inputs, reduction="sum") + kl, len(inputs), outputs, inputs

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[0]


class GAN(nn.Module):
    def __init__(self, z: int = 8):
        super().__init__()
        self.z = z
        self.G = nn.Sequential(nn.Linear(z, 32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh())
        self.D = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.G(noise)


class OneStepGAN:
    """One loss for both networks, one optimizer with two groups: the way round two optimizers.

    The discriminator's loss sees the pictures detached; the generator's sees the discriminator's weights detached.
    """

    def step(self, model: Any, batch: Any) -> tuple[Any, ...]:
        real, _ = batch
        fake = model.G(torch.randn(len(real), model.z))
        bce, one = functional.binary_cross_entropy_with_logits, torch.ones(len(real), 1)
        d = bce(model.D(real), one, reduction="sum") + bce(model.D(fake.detach()), 0 * one, reduction="sum")
        frozen = {name: p.detach() for name, p in model.D.named_parameters()}
        return d + bce(torch.func.functional_call(model.D, frozen, (fake,)), one, reduction="sum"), len(real)

    def predict(self, model: Any, batch: Any) -> Tensor:
        return model(torch.randn(len(batch[0]), model.z))


class TwoLosses(OneStepGAN):
    """As a LightningModule with two optimizers would: a loss for each network."""

    def step(self, model: Any, batch: Any) -> tuple[Any, ...]:
        loss, count = super().step(model, batch)
        return {"d": loss, "g": loss}, count


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.normalize(self.net(inputs), dim=1)


class SimCLR:
    """NT-Xent over what one forward sees: each view against all others."""

    def step(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        (one, other), _ = batch
        n, codes = len(one), torch.cat([model(one), model(other)])
        likeness = (codes @ codes.T / 0.2).fill_diagonal_(float("-inf"))
        return functional.cross_entropy(likeness, (torch.arange(2 * n) + n) % (2 * n), reduction="sum"), 2 * n

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0][0])
