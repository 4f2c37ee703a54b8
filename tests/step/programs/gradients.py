"""One optimizer step on this many ranks, for several losses and micro-batch sizes; rank 0 compares with one big batch.

Run by torchrun; prints a JSON object {case: largest relative error of the gradient}.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dist_train.config.schema import DataConfig, DistributedConfig, TrainerConfig
from dist_train.data.loader import TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions
from dist_train.objective.modules import Modules
from dist_train.objective.objective import Objective, SingleProcess
from dist_train.objective.precision import Precision
from dist_train.reduction.reduce import DataParallel, OneBucket, Reducer, reducer_for
from dist_train.runtime.launch import read_placement
from dist_train.runtime.world import World, open_world
from dist_train.step.step import Stepper
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised

BATCH = 22  # divisible by neither 3 nor 4
GENERATOR = torch.Generator().manual_seed(1)
INPUTS = torch.randn(BATCH, 7, generator=GENERATOR)
LABELS = torch.randint(0, 4, (BATCH,), generator=GENERATOR)
REAL = torch.rand(BATCH, 4, generator=GENERATOR)
WEIGHTS = torch.tensor([0.1, 1.0, 4.0, 0.5])


def weighted_distance(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A loss whose denominator only its own code knows."""
    weight = 0.5 + targets.sum(1)
    return ((outputs - targets).pow(2).sum(1) * weight).sum(), weight.sum()


CASES = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=2), LABELS),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "bce": (nn.BCEWithLogitsLoss(), REAL),
    "mse": (nn.MSELoss(), REAL),
    "own": (weighted_distance, REAL),
}


def model() -> nn.Module:
    """The same weights on every rank and for every case."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 4))


class WithSpare(nn.Module):
    """A layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = model(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """As if there were no spare layer."""
        return self.used(x)


def reference(function: nn.Module, targets: Tensor) -> list[Tensor]:
    """The gradient of one big batch, by plain torch."""
    net = model()
    value = function(net(INPUTS), targets)
    (value[0] / value[1] if isinstance(value, tuple) else value).backward()
    return [parameter.grad for parameter in net.parameters()]


def reducer(world: World, form: int, objective: Objective) -> Reducer:
    """On several processes: form 0 is a small model's, 1 is DDP, 2 is form 0 as it is between machines."""
    kind = (OneBucket, DataParallel, OneBucket)[form] if world.size > 1 else SingleProcess
    made = reducer_for(objective, world, DistributedConfig(strategy=("auto", "ddp", "auto")[form]))
    assert type(made) is kind
    if isinstance(made, OneBucket):
        assert made.links._sockets, "all ranks are on one machine here"
        if form == 2:
            made.links.close()
    return made


def stepper(world: World, form: int, net: nn.Module, function: Any, lr: float, plan: Plan, **options: Any) -> Stepper:
    """The engine's step with plain SGD."""
    objective = Objective(Modules(net), Supervised(Loss(function)), Precision("fp32", "cpu"))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    new_reducer = functools.partial(reducer, world, form, objective)
    return Stepper(objective, optimizer, new_reducer, plan, lambda micro, work: micro.batch, TrainerConfig(**options))


def gradient(
    world: World, function: nn.Module, targets: Tensor, micro: int, samples: int = BATCH, form: int = 0,
    net: nn.Module | None = None,
) -> list[Tensor]:  # fmt: skip
    """What the engine makes of it: SGD with lr 1 moves the weights by the gradient."""
    net = net or model()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    reading = LoaderOptions(DataConfig(train=object(), num_workers=0), 0, world.device, world.rank, world.size)
    dataset, plan = TensorDataset(INPUTS[:samples], targets[:samples]), Plan(0, samples, BATCH, drop_last=False)
    step = stepper(world, form, net, function, 1.0, plan)
    loader = TrainLoader(dataset, plan, reading, micro_batch_size=micro)
    for work in loader.steps(0, 1):
        step(work, want_norm=False)
    return [old - new.detach() for old, new in zip(before, net.parameters(), strict=True)]


def error(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference, in units of the largest element."""
    scale = max(float(g.abs().max()) for g in wanted)
    return max(float((a - b).abs().max()) / scale for a, b in zip(wanted, got, strict=True))


def main() -> None:
    """All cases, with 1, 2 and 4 micro-batches per rank; and a global batch that leaves ranks without a sample."""
    errors = {}
    with open_world(DistributedConfig(device="cpu"), read_placement(os.environ)) as world:
        share = -(-BATCH // world.size)
        net = model()
        nn.functional.cross_entropy(net(INPUTS[:1]), LABELS[:1]).backward()
        alone = [parameter.grad for parameter in net.parameters()]
        for form in range(1 if world.size == 1 else 3):
            for name, (function, targets) in CASES.items():
                wanted = reference(function, targets)
                for count in (1, 2, 4):
                    got = gradient(world, function, targets, -(-share // count), form=form)
                    errors[f"{name}, {count} micro-batches, form {form}"] = error(wanted, got)
            got = gradient(world, nn.CrossEntropyLoss(), LABELS, 4, samples=1, form=form)
            errors[f"one sample for all ranks, form {form}"] = error(alone, got)
            copies = world.all_gather([part.tolist() for part in got])
            errors[f"ranks that differ, form {form}"] = sum(copy != copies[0] for copy in copies)
            if world.size > 1:
                try:
                    gradient(world, nn.CrossEntropyLoss(), LABELS, BATCH, form=form, net=WithSpare())
                except ValueError as refusal:
                    named = "2 parameter(s) took no part in the loss: spare.weight, spare.bias" in str(refusal)
                    errors[f"unused parameters not named, form {form}"] = float(not named)
        if world.is_main:
            print(json.dumps(errors))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
