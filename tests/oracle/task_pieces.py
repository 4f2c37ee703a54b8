"""Tasks, losses and an optimizer that test_task_interface.py names; in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset


class Triples(Dataset[Any]):
    """(features, class, a second class that only some have, else -1), in double precision."""

    def __init__(self, samples: int = 22, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
        self.first = torch.randint(0, 3, (samples,), generator=generator)
        self.second = torch.randint(-1, 3, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.inputs[index], (self.first[index], self.second[index])


class Net(nn.Module):
    """Features to outputs, with a layer that only some tasks use."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


class Noisy(Net):
    """With BatchNorm and dropout."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__(outputs)
        self.net = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, outputs)
        ).double()


class Shared:
    """Two losses with the number of samples as their denominator, one of them at a tenth."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        inputs, (first, _) = batch
        outputs = model(inputs)
        entropy = functional.cross_entropy(outputs, first, reduction="sum")
        return {"entropy": entropy, "size": (outputs.square().sum(), len(inputs), 0.1)}, len(inputs), outputs, first

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])


class Elements(Shared):
    """The second loss is a mean over elements: its weight is a multiple of the samples."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        inputs, (first, _) = batch
        outputs = model(inputs)
        entropy = functional.cross_entropy(outputs, first, reduction="sum")
        return {"entropy": (entropy, len(inputs)), "size": (outputs.square().sum(), outputs.numel(), 0.1)}, None


class OwnCounts(Shared):
    """Two classes of each sample, of which some don't have the second: two denominators that depend on the data."""

    def weights(self, batch: Any) -> dict[str, Any]:
        found = {"first": len(batch[0]), "second": (batch[1][1] >= 0).sum()}
        return found if batch[1][0][0] else dict(reversed(found.items()))  # in any order

    def step(self, model: nn.Module, batch: Any) -> Any:
        inputs, (first, second) = batch
        outputs, weights = model(inputs), self.weights(batch)
        one = functional.cross_entropy(outputs[:, :3], first, reduction="sum")
        other = functional.cross_entropy(outputs[:, 3:], second, reduction="sum", ignore_index=-1)
        return {"first": (one, weights["first"]), "second": (other, weights["second"], 0.5)}, None


class Annealed(OwnCounts):
    """The factor of the second loss is 1 in two steps of four micro-batches, 2 in the next two, and so on."""

    def __init__(self) -> None:
        self.forwards = 0

    def step(self, model: nn.Module, batch: Any) -> Any:
        losses, weight = super().step(model, batch)
        self.forwards += torch.is_grad_enabled()
        factor = (self.forwards - 1) // 8 + 1
        return {**losses, "second": (*losses["second"][:2], float(max(1, factor)))}, weight


def two_values(outputs: Tensor, targets: Any) -> dict[str, Tensor]:
    """A plain dict of values per sample."""
    return {
        "entropy": functional.cross_entropy(outputs, targets[0], reduction="none"),
        "size": outputs.square().sum(1),
    }


def decorrelated(outputs: Tensor, targets: Any) -> Tensor:
    """The covariance of the outputs over the batch, off its diagonal, and its distance from 1 on it (as VICReg's)."""
    centered = outputs - outputs.mean(0)
    covariance = centered.T @ centered / (len(outputs) - 1)
    return (covariance - torch.eye(outputs.shape[1], dtype=outputs.dtype)).square().sum()


class Contrast(nn.Module):
    """CLIP's loss between two halves of the outputs, with a temperature of its own and one among the outputs."""

    whole_batch = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        one, other = model(batch[0]).chunk(2, 1)
        return (one, other, model.net[0].bias.sum().exp()), None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        one, other, factor = outputs
        likeness = functional.normalize(one) @ functional.normalize(other).T * self.scale.exp() * factor
        labels = torch.arange(len(one))
        return (functional.cross_entropy(likeness, labels) + functional.cross_entropy(likeness.T, labels)) / 2


class Pair(nn.Module):
    """A generator and a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.G, self.D = nn.Linear(5, 5).double(), nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def forward(self, noise: Tensor) -> Tensor:
        return self.G(noise)


class Game:
    """Two critic steps, then one of the generator in the same step; noise is a function of the inputs."""

    def moves(self, step: int) -> list[str]:
        return ["D", "G"] if step % 2 else ["D"]

    def step(self, model: Any, batch: Any, optimizer: str) -> Any:
        real = batch[0]
        fake = model.G(real.flip(1))
        if optimizer == "G":
            return -model.D(fake).sum(), len(real)
        return {
            "real": functional.softplus(-model.D(real)).sum(),
            "fake": functional.softplus(model.D(fake.detach())).sum(),
        }, len(real)

    def predict(self, model: Any, batch: Any) -> Tensor:
        return model(batch[0])


class AllMove:
    """The same without `moves`."""

    step, predict = Game.step, Game.predict


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as its most used implementation writes it (github.com/davda54/sam, reduced)."""

    def __init__(self, params: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    def climb(self, p: nn.Parameter, by: Tensor) -> None:
        """Change a weight in place."""
        p.add_(by)

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                self.climb(p, p.grad * (group["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p].pop("old")).sub_(p.grad, alpha=group["lr"])


class NoWeights(OwnCounts):
    """Two denominators that nobody knows beforehand."""

    weights = None  # type: ignore[assignment]

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        return {
            "first": (outputs.sum(), len(outputs)),
            "second": (outputs.square().sum(), (batch[1][1] >= 0).sum()),
        }, None


class OtherNames(OwnCounts):
    def weights(self, batch: Any) -> dict[str, Any]:
        return {"one": 1, "other": 2}

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        return {"first": (outputs.sum(), 1), "second": (outputs.square().sum(), 2)}, None


class OtherLosses(Shared):
    """Another loss where the first sample is of class 0."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        return {"a" if int(batch[1][0][0]) else "b": outputs.sum()}, len(outputs)


class TwoRows(Contrast):
    """Both views in one tensor."""

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        return torch.cat([model(batch[0])] * 2), None


class OneLossMoves(Shared):
    """It says which optimizers move, but not what each of them minimizes."""

    def moves(self, step: int) -> list[str]:
        return ["body"]


class NobodyMoves(Game):
    def moves(self, step: int) -> list[str]:
        return []


class Alone(Game):
    """The critic's loss, for one optimizer."""

    def step(self, model: Any, batch: Any, optimizer: str = "D") -> Any:
        return super().step(model, batch, optimizer)


class SAMByData(SAM):
    """The same, writing through `.data`, which autograd's version counters don't see."""

    def climb(self, p: nn.Parameter, by: Tensor) -> None:
        p.data.add_(by)
