"""The cost of reducing the gradients of a small model among CPU processes of one machine, for each method.

    torchrun --standalone --nproc_per_node=2 bench/exchange.py [--hidden 128]

A step is a forward and a backward of 32 samples per process, with one thread each, and the reduction, nothing else. The methods
are interleaved; the numbers are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import numpy as np
import torch
from torch import nn

from dist_train.config.schema import DistributedConfig
from dist_train.data.plan import MicroBatch
from dist_train.objective.modules import Modules
from dist_train.objective.objective import Objective, SingleProcess
from dist_train.objective.precision import Precision
from dist_train.reduction.reduce import DataParallel, OneBucket, Reducer
from dist_train.runtime.launch import read_placement
from dist_train.runtime.world import World, open_world
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised


def ways(world: World, hidden: int) -> dict[str, Reducer]:
    """All reduction methods, each with its own model."""

    def objective() -> Objective:
        net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        return Objective(Modules(net), Supervised(Loss(nn.CrossEntropyLoss())), Precision("fp32", "cpu"))

    far = OneBucket(objective(), world)
    far.links.close()
    return {
        "no reduction": SingleProcess(objective()),
        "DistributedDataParallel over gloo": DataParallel(objective(), world.size, DistributedConfig()),
        "pairwise messages over gloo": far,
        "pairwise messages over Unix sockets": OneBucket(objective(), world),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    batch = torch.randn(32, 64), torch.randint(0, 10, (32,))
    micro = MicroBatch(0, 0, np.arange(32), 0, 32, last=True)
    with open_world(DistributedConfig(device="cpu", threads=1), read_placement(os.environ)) as world:
        reducers = ways(world, args.hidden)
        times: dict[str, list[float]] = {name: [] for name in reducers}
        for turn in range(args.turns + 1):
            for name, reducer in reducers.items():
                world.barrier()
                began = time.perf_counter()
                for _ in range(args.steps):
                    reducer.forward_backward(batch, micro, scale=1.0)
                    reducer.finish()
                    if not isinstance(reducer, SingleProcess):
                        continue
                    for parameter in reducer.objective.model.parameters():
                        parameter.grad = None
                if turn:  # the first one warms up
                    times[name].append((time.perf_counter() - began) / args.steps * 1e3)
        if world.is_main:
            size = (64 * args.hidden + args.hidden + args.hidden * 10 + 10) * 4 / 1024
            print(f"{world.size} processes, {size:.0f} KiB of gradients")
            for name, found in times.items():
                print(f"| {name} | {median(found):.2f} ms |")


if __name__ == "__main__":
    main()
