"""Counts what a training step does beyond its kernels: reads of device values by the host, and collectives.

Run by torchrun with two processes; rank 0 prints {"reads": n, "collectives": n, "raw_collectives": n} for three steps.
"""

from __future__ import annotations

import json
import os

import torch
from gradients import BATCH, INPUTS, LABELS, model
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from dist_train.config.schema import DataConfig, DistributedConfig
from dist_train.data.loader import Reading, TrainLoader
from dist_train.data.plan import Plan
from dist_train.engine.losses import Loss
from dist_train.engine.precision import Precision
from dist_train.engine.reduce import DataParallel
from dist_train.engine.step import Stepper
from dist_train.engine.task import Supervised
from dist_train.runtime.world import open_world, read_placement

COLLECTIVES = ("gloo:", "c10d::")


class Reads(TorchDispatchMode):
    """Counts tensor values that reach Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def collectives(steps: object) -> int:
    """How many collectives running `steps` starts on this rank."""
    with profile() as profiler:
        steps()  # type: ignore[operator]
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("gloo:"))


def raw_steps() -> object:
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


def main() -> None:
    """Print the counts."""
    with open_world(DistributedConfig(device="cpu"), read_placement(os.environ)) as world:
        net = model()
        task = Supervised(Loss(nn.CrossEntropyLoss(weight=torch.ones(4))))
        reducer = DataParallel(
            net, task, Precision("fp32", "cpu"), None, world_size=world.size, bucket_mb=25, find_unused_parameters=False
        )
        stepper = Stepper(
            net, torch.optim.SGD(net.parameters(), lr=0.1), reducer, scaler=None, device=world.device, seed=0, summed=False,
            prepare=lambda batch, epoch, indices: batch, indices_of=lambda step: range(BATCH), clip_norm=1.0,
        )  # fmt: skip
        reading = Reading(DataConfig(train=object(), num_workers=0), 0, world.device, world.rank, world.size)
        loader = TrainLoader(TensorDataset(INPUTS, LABELS), Plan(0, BATCH, BATCH), reading, micro_batch_size=4)
        work = loader.steps(0, 9)
        for _ in range(3):  # the layout of buckets, first checks of targets
            stepper(next(work), want_norm=False)
        with Reads() as reads:
            for _ in range(3):
                stepper(next(work), want_norm=False)
        ours = collectives(lambda: [stepper(next(work), want_norm=False) for _ in range(3)])
        raw = collectives(raw_steps())
        if world.is_main:
            print(json.dumps({"reads": reads.count, "collectives": ours, "raw_collectives": raw}))


if __name__ == "__main__":
    main()
