"""Counts what a training step does beyond its kernels: reads of device values by the host, and collectives.

Run by torchrun with two processes; rank 0 prints, for three steps of each form of reduction, of a raw DDP loop, and of
`train()` by strategy, {form: {"reads": n, "collectives": [names]}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gradients import BATCH, INPUTS, LABELS, model, stepper
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from dist_train import train
from dist_train.config.schema import DataConfig, DistributedConfig
from dist_train.data.loader import TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions
from dist_train.runtime.launch import read_placement
from dist_train.runtime.world import World, open_world


class Reads(TorchDispatchMode):
    """Counts tensor values that reach Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def collectives(steps: Callable[[], object]) -> list[str]:
    """Names of what `steps` starts on this rank that other ranks take part in."""
    with profile() as profiler:
        steps()
    return sorted(event.name for event in profiler.events() if event.name.startswith("gloo:"))


def raw_steps() -> Callable[[], object]:
    """Three steps of a DDP loop as a person would write it."""
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def steps(count: int = 3) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(INPUTS), LABELS).backward()
            optimizer.step()

    steps(2)
    return steps


def ours(world: World, form: int) -> Callable[[], object]:
    """Three steps of the engine."""
    net, plan = model(), Plan(0, BATCH, BATCH)
    step = stepper(world, form, net, nn.CrossEntropyLoss(weight=torch.ones(4)), 0.1, plan, clip_grad_norm=1.0)
    reading = LoaderOptions(DataConfig(train=object(), num_workers=0), 0, world.device, world.rank, world.size)
    loader = TrainLoader(TensorDataset(INPUTS, LABELS), plan, reading, micro_batch_size=4)
    work = loader.steps(0, 9)

    def steps() -> None:
        for _ in range(3):
            step(next(work), want_norm=False)

    steps()  # the layout of buckets, first checks of targets
    return steps


class Losses:
    """Two losses with one denominator; `own`: with two, of which the task gives the weights beforehand."""

    def __init__(self, own: bool) -> None:
        if own:
            self.weights = lambda batch: {"entropy": len(batch[0]), "size": (batch[1] > 0).sum()}

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        entropy = nn.functional.cross_entropy(outputs, batch[1], reduction="sum")
        weights = self.weights(batch) if hasattr(self, "weights") else {"entropy": len(outputs), "size": len(outputs)}
        size = outputs.square().sum(1).where(batch[1] > 0, 0.0).sum()
        return {"entropy": (entropy, weights["entropy"]), "size": (size, weights["size"], 0.1)}, None

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])


def of_training(strategy: str, name: str, **keys: Any) -> dict[str, Any]:
    """What three steps more of a whole run cost: all that is done once and at its end is the same."""
    costs = []
    for steps in (5, 8):
        parts = {
            "run": {"name": f"{name}{steps}"},
            "data": {"train": TensorDataset(INPUTS, LABELS), "global_batch_size": BATCH, "num_workers": 0},
            "model": model(),  # a live one: every rank gets its weights back in the end
            "loss": nn.CrossEntropyLoss(weight=torch.ones(4)),
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1},
            "scheduler": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 9, "every": "1step"},
            "trainer": {"duration": f"{steps}step", "log_every": "9step", "clip_grad_norm": 1.0, "ema_decay": 0.9,
                        "micro_batch_size": 4},
            "checkpoint": {"every": []},
            "tracking": {"tensorboard": False, "report": False},
            "distributed": {"strategy": strategy, "device": "cpu"},
            **keys,
        }  # fmt: skip
        with Reads() as reads, contextlib.redirect_stdout(sys.stderr):
            names = collectives(partial(train, parts))
        costs.append((reads.count, Counter(names)))
    (few, before), (many, after) = costs
    return {"reads": many - few, "collectives": sorted((after - before).elements())}


def main() -> None:
    """Print the counts."""
    with open_world(DistributedConfig(device="cpu"), read_placement(os.environ)) as world:
        counts = {}
        for form, steps in {
            "near": ours(world, 0),
            "ddp": ours(world, 1),
            "far": ours(world, 2),
            "raw": raw_steps(),
        }.items():
            with Reads() as reads:
                steps()
            counts[form] = {"reads": reads.count, "collectives": collectives(steps)}
    counts |= {f"train {strategy}": of_training(strategy, strategy) for strategy in ("auto", "ddp")}
    counts["train losses"] = of_training("ddp", "losses", loss=None, task=Losses(own=False))
    counts["train own weights"] = of_training("ddp", "own", loss=None, task=Losses(own=True))
    counts["train digests"] = of_training("ddp", "digests", debug={"digest": True})
    if os.environ["RANK"] == "0":
        print(json.dumps(counts))


if __name__ == "__main__":
    main()
