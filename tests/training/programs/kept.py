"""Models, losses and tasks whose forward in training depends on what earlier forwards left behind."""

from __future__ import annotations

import enum
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.callbacks import Callback


class Data(torch.utils.data.Dataset):
    """40 points; `classes` of them."""

    def __init__(self, seed: int = 0):
        self.x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.y[index])


class Drift(nn.Module):
    """State of every kind: buffers in place, replaced, not persistent, expanded, sized late; tensors and numbers that are
    plain attributes; and numbers from Python's and numpy's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)
        self.register_buffer("late", None)
        self.register_buffer("mask", torch.ones(1, 1).expand(3, 6))
        self.plain, self.count, self.heat = torch.zeros(6), 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """In training the input's mean is followed; the outputs depend on all of it."""
        noise = 0.0
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.replaced = self.replaced + x.std()
                self.hidden += x.abs().mean()
                self.late = x.mean(0) if self.late is None else 0.5 * self.late + x.mean(0)
                self.plain = 0.9 * self.plain + x.amax(0)
            self.count, self.heat = self.count + 1, self.heat * 0.99
            noise = random.random() + np.random.rand()
        scale = 1 + 0.01 * self.replaced + 0.01 * self.hidden + 0.02 * self.count + self.heat
        late = self.late if self.late is not None else 0.0
        return self.head(self.body((x - self.mean + 0.1 * self.plain + late) * self.mask[0] * scale).tanh()) + noise


class Arc(nn.Module):
    """A loss with weights of its own, and a centre that follows the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("centre", torch.zeros(2))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One value per sample."""
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        return functional.cross_entropy((outputs - self.centre) @ self.W, targets, reduction="none")


class Teaches:
    """A task that is no module: a teacher that follows the model, a temperature that trains, and a count."""

    def __init__(self) -> None:
        self.teacher = nn.Linear(6, 2).requires_grad_(False)
        self.heat = nn.Parameter(torch.ones(()))
        self.steps = 0

    def step(self, model: nn.Module, batch: Any) -> tuple[Tensor, int, Tensor, Tensor]:
        """Cross-entropy, and the distance to the teacher."""
        inputs, targets = batch
        outputs = model(inputs)
        if model.training:
            self.steps += 1
            self.teacher.weight.data.mul_(0.9).add_(model.head.weight @ model.body.weight, alpha=0.1)
        loss = functional.cross_entropy(outputs * self.heat, targets, reduction="sum")
        drawn = functional.mse_loss(outputs, self.teacher(inputs), reduction="sum")
        return loss + 0.01 * self.steps * drawn, len(targets), outputs, targets

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """The outputs."""
        return model(batch[0] if isinstance(batch, list | tuple) else batch)


class Frozen(nn.Module):
    """A part that its author has put into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).requires_grad_(False).eval()
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Thaw(Callback):
    """Unfreezing as users write it; with `add` in a group of its own."""

    def __init__(self, add: bool = False):
        self.add = add

    def on_epoch_end(self, trainer: Any) -> None:
        """The body trains from the second epoch on."""
        if trainer.epoch == 1:
            body = list(trainer.model.body.requires_grad_(True).parameters())
            if self.add:
                trainer.optimizer.add_param_group({"params": body, "lr": 0.03})


class Weighted(nn.Module):
    """A loss with a constant that the config gives, and a buffer that counts."""

    def __init__(self, weight: float):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One value per sample."""
        if self.training:
            self.calls += 1
        return self.weight * functional.cross_entropy(outputs, targets, reduction="none")


class Averaging(torch.optim.SGD):
    """SGD whose `eval()` puts the mean of all weights so far in their place, in the manner of schedulefree."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr=lr)
        self.param_groups[0]["training"] = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.param_groups[0]["training"], "as schedulefree's, it insists on train()"
        super().step()
        for p in (p for group in self.param_groups for p in group["params"]):
            count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.detach(), 1 / count)

    def train(self) -> None:
        self._turn(True)

    def eval(self) -> None:
        self._turn(False)

    @torch.no_grad()
    def _turn(self, training: bool) -> None:
        if self.param_groups[0]["training"] != training:
            for p in (p for group in self.param_groups for p in group["params"]):
                if "mean" in self.state[p]:
                    p.lerp_(self.state[p]["mean"], 0.9 if not training else -9.0)  # there and back, with rounding
            self.param_groups[0]["training"] = training


class Hidden(nn.Linear):
    """What it has seen is in a list, which nobody saves."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(float(x.mean()))
        return super().forward(x) * (1 + sum(self.seen))


class Late(nn.Linear):
    """A number that its first forward makes."""

    def __init__(self) -> None:
        super().__init__(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.steps = getattr(self, "steps", 0) + 1
        return super().forward(x) / self.steps


class Usual(nn.Sequential):
    """Statistics and dropout, as in most models."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 2))


class Hooked(nn.Linear):
    """A hook that writes into a list of its own: a copy's would too, so none may run."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        calls = self.calls = list[int]()
        self.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 + len(self.calls))


class Gathers:
    """A task whose step is a collective."""

    def step(self, model: nn.Module, batch: Any) -> tuple[Tensor, int, Tensor, Tensor]:
        """Cross-entropy and the share of all ranks in it."""
        outputs = model(batch[0])
        total = torch.tensor(float(len(outputs)))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        loss = functional.cross_entropy(outputs, batch[1], reduction="sum")
        return loss * (8 / total), len(outputs), outputs, batch[1]

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """The outputs."""
        return model(batch[0])


class Mode(enum.IntEnum):
    """A number with a name."""

    FIRST = 0
    LATER = 1


class Foreign(nn.Module):
    """Idioms of other people's code: weights that are computed, a flag of the first forward, numpy's numbers, a frozen norm
    that only `train()` freezes, and a forward that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.utils.spectral_norm(nn.Linear(6, 5))
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(6))
        self.begun, self.count, self.mode = False, np.int64(0), Mode.FIRST

    def train(self, mode: bool = True) -> Foreign:
        """As in detection: the norm keeps its statistics."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The first one sets `scale`; each shifts its input in place."""
        x.add_(0.5)
        if self.training:
            if not self.begun:
                self.scale.data.fill_(2.0)
            self.begun, self.count, self.mode = True, self.count + np.int64(1), Mode.LATER
        slow = 1 / (1 + 0.1 * float(self.count)) + self.mode
        return self.head(self.norm(self.new(self.old(x * self.scale).tanh()))) * slow


class Slowing(torch.optim.SGD):
    """Counts its steps in an attribute of its own, which `state_dict` leaves out; and adds noise, as Langevin dynamics does."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure: Any = None) -> None:
        """The lr falls."""
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.steps
        super().step()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


class Growing(nn.Linear):
    """Makes a parameter when it is first called."""

    def forward(self, x: Tensor) -> Tensor:
        """Adds it to the outputs."""
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.zeros(2))
        return super().forward(x) + self.late
