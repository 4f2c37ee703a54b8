"""What the gradients of a small model cost on several processes of one machine, on the CPU, by each way of reducing them.

    torchrun --standalone --nproc_per_node=2 bench/exchange.py [--hidden 128]

A step is a forward and a backward of 32 samples a process with one thread each, the reduction, and nothing more. The ways take
turns; times are medians over the turns, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import torch
from torch import nn

from dist_train.config.schema import DistributedConfig
from dist_train.runtime.launch import read_placement
from dist_train.runtime.world import World, open_world
from dist_train.step.exchange import OneBucket
from dist_train.step.modules import Modules
from dist_train.step.objective import Objective, SingleProcess
from dist_train.step.precision import Precision
from dist_train.step.reduce import DataParallel, Reducer
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised


def ways(world: World, hidden: int) -> dict[str, Reducer]:
    """Every way to reduce, each with a model of its own."""

    def objective() -> Objective:
        net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        return Objective(Modules(net), Supervised(Loss(nn.CrossEntropyLoss())), Precision("fp32", "cpu"))

    far = OneBucket(objective(), world)
    far.links.close()
    return {
        "nothing": SingleProcess(objective()),
        "DistributedDataParallel over gloo": DataParallel(objective(), world.size, DistributedConfig()),
        "pairwise messages by gloo": far,
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
    with open_world(DistributedConfig(device="cpu", threads=1), read_placement(os.environ)) as world:
        reducers = ways(world, args.hidden)
        times: dict[str, list[float]] = {name: [] for name in reducers}
        for turn in range(args.turns + 1):
            for name, reducer in reducers.items():
                world.barrier()
                began = time.perf_counter()
                for _ in range(args.steps):
                    reducer.forward_backward(batch, scale=1.0, zero_weight=False, last=True)
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
