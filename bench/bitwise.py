"""The cost of `distributed.reproducibility: bitwise` on CPU processes of this machine: steps per second and memory.

    python bench/bitwise.py               # a quarter of an hour; the tables go to stdout
    python bench/bitwise.py --quick       # about a minute
    python bench/bitwise.py speed --model mlp --world 2 --profile      # where the time of a step goes

A step is the engine's own (`step.step.Stepper`: seeding, forward, backward, reduction, checks, update) on batches that are in
memory, with one thread in both modes. Each mode has a model of its own in the same processes; they take turns of a few steps, in
an order that alternates. The ratio is the median over the turns of the time in `fast` to that of its neighbor in `bitwise`. That
of rank 0's CPU time, of all threads, is less affected by other load on the machine, but leaves out waiting for other ranks. The
global batch is the same on any number of processes: with more of them each accumulates fewer micro-batches. Memory is measured in
runs of one mode alone.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from overhead import PACKAGES
from rounds import hardware, versions
from torch import Tensor, nn

from dist_train.config.schema import DistributedConfig, TrainerConfig
from dist_train.data.plan import MicroBatch, Plan, StepWork
from dist_train.objective.modules import Modules
from dist_train.objective.objective import Objective
from dist_train.objective.precision import Precision
from dist_train.optim.optim import build_optimizer
from dist_train.reduction.bitwise import Bitwise
from dist_train.reduction.reduce import reducer_for
from dist_train.runtime.launch import read_placement
from dist_train.runtime.world import World, open_world
from dist_train.step.step import Stepper
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised

MODES = ("fast", "bitwise")
LEAVES = 4  # micro-batches of a global batch
STEPS = 3  # of a turn


class Transformer(nn.Module):
    """A small language model: 4 layers of width 256, 64 tokens."""

    def __init__(self, words: int = 1000, width: int = 256):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)  # dropout 0.1
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(64, width))
        self.layers, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(width, words)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 64) int64 -> (B, words, 64)."""
        hidden = self.layers(self.words(tokens) + self.places, mask=self.mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)  # type: ignore[no-any-return]


def resnet18() -> nn.Module:
    """torchvision's, for ten classes."""
    import torchvision

    return torchvision.models.resnet18(num_classes=10)  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    """25.3 million parameters, with little to compute for each: bound by communication."""
    sizes = [512, 3200, 3200, 3200]
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(3200, 1000))


@dataclass(frozen=True)
class Case:
    """A model and its micro-batches."""

    label: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    micro: int
    optimizer: dict[str, Any]


def images(n: int) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) and (n,)."""
    return torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))


def vectors(n: int) -> tuple[Tensor, Tensor]:
    """(n, 512) and (n,)."""
    return torch.randn(n, 512), torch.randint(0, 1000, (n,))


def texts(n: int) -> tuple[Tensor, Tensor]:
    """(n, 64) and (n, 64)."""
    return torch.randint(0, 1000, (n, 64)), torch.randint(0, 1000, (n, 64))


SGD = {"_target_": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9}
ADAM = {"_target_": "torch.optim.AdamW", "lr": 1e-4}
CASES = {
    "resnet18": Case("ResNet-18, 32x32, micro-batch 32", resnet18, images, 32, SGD),
    "mlp": Case("MLP of 25 million, micro-batch 32", mlp, vectors, 32, SGD),
    "transformer": Case("transformer of 3.7 million, micro-batch 8 x 64", Transformer, texts, 8, ADAM),
}


class Contender:
    """One mode's training steps of one model."""

    def __init__(self, case: Case, mode: str, world: World):
        torch.manual_seed(0)
        model, task = case.build(), Supervised(Loss(nn.CrossEntropyLoss()))
        batch = case.micro * LEAVES
        self.plan = Plan(0, batch, batch, shuffle=False, leaf_size=case.micro if mode == "bitwise" else None)
        self.world, self.case, self.step, self.data = world, case, 0, case.batch(batch)
        self.deterministic = mode == "bitwise"
        config = DistributedConfig(reproducibility=mode)  # type: ignore[arg-type]
        objective = Objective(Modules(model, task=task), task, Precision("fp32", "cpu"), ranks=world.size)
        objective.modules.synchronize(world)
        self.stepper = Stepper(
            objective,
            build_optimizer(case.optimizer, objective.modules, world.device),
            lambda: reducer_for(objective, world, config),
            self.plan,
            lambda micro, work: micro.batch,
            TrainerConfig(),
        )

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds per step: by the clock, and of CPU time of all threads of this process."""
        torch.use_deterministic_algorithms(self.deterministic)
        self.world.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            batch = self.plan.batch(self.step)
            self.stepper(StepWork(self.step, 0, len(batch), self._micro_batches()), want_norm=False)
            self.step += 1
        return (time.perf_counter() - began) / steps, (time.process_time() - cpu) / steps

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for micro in self.plan.micro_batches(self.step, self.world.rank, self.world.size, self.case.micro):
            yield micro._replace(batch=tuple(part[micro.indices] for part in self.data))

    def gradient_copies(self) -> float:
        """Bytes that the reducer of `bitwise` keeps for sums and messages, over the bytes of the gradient."""
        reducer, own = self.stepper.reducer, sum(parameter.nbytes for parameter in self.stepper.parameters)
        assert isinstance(reducer, Bitwise)
        trees = [bucket._tree for bucket in reducer.buckets if bucket._tree is not None]
        tensors = [tensor for tree in trees for tensor in (*tree.mine, tree.total)]
        tensors += [
            room for tree in trees for one in tree._program for message in one.messages for room in message.receive
        ]
        kept = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(kept.values()) / own


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """In each process of a group: the modes of one model, in turns."""
    case, found = CASES[options.model[0]], dict[str, Any]()
    with open_world(DistributedConfig(device="cpu", threads=options.threads), read_placement(os.environ)) as world:
        before = peak()
        contenders = {mode: Contender(case, mode, world) for mode in options.modes}
        for contender in contenders.values():
            contender.run(2)
        found["seconds"] = {mode: list[tuple[float, float]]() for mode in contenders}
        for turn in range(options.turns):
            for mode in list(contenders)[:: 1 if turn % 2 else -1]:
                found["seconds"][mode].append(contenders[mode].run(STEPS))
        found["MiB"] = max(world.all_gather((peak() - before) / 2**20))
        if "bitwise" in contenders and world.size > 1:
            found["copies"] = max(world.all_gather(contenders["bitwise"].gradient_copies()))
        if options.profile:
            profile(contenders, world)
    return found


def profile(contenders: dict[str, Contender], world: World) -> None:
    """The functions that take most of the main thread's time, on rank 0."""
    for mode, contender in contenders.items():
        profiler = cProfile.Profile()
        profiler.enable()
        contender.run(4 * STEPS)
        profiler.disable()
        if world.is_main:
            print(f"{mode}, {4 * STEPS} steps", flush=True)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(14)


def peak() -> int:
    """Bytes of this process that were resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(model: str, world: int, modes: Iterable[str], turns: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run `worker` on `world` processes; raises CalledProcessError if it fails."""
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    with tempfile.TemporaryDirectory(prefix="bitwise-") as folder:
        out = Path(folder) / "found.json"
        line = [*start, __file__, "--out", str(out), "--model", model, "--turns", str(turns), "--modes", *modes]
        line += ["--threads", str(options.threads), *(["--profile"] if options.profile else [])]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(options.threads)}
        subprocess.run(line, env=env, check=True, timeout=1200, stdin=subprocess.DEVNULL)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def speed(model: str, world: int, options: argparse.Namespace) -> list[str]:
    """What the first table says."""
    found = measure(model, world, MODES, options.turns, options)
    turns = list(zip(*(found["seconds"][mode] for mode in MODES), strict=True))
    ratios, of_cpu = ([fast[k] / bitwise[k] for fast, bitwise in turns] for k in (0, 1))
    low, _, high = quantiles(ratios, n=4)
    rates = [f"{1 / median(mode[0] for mode in of_mode):.2f}" for of_mode in zip(*turns, strict=True)]
    return [*rates, f"**{median(ratios):.2f}** ({low:.2f}-{high:.2f})", f"{median(of_cpu):.2f}"]


def memory(model: str, world: int, options: argparse.Namespace) -> list[str]:
    """What the second table says."""
    fast, bitwise = (measure(model, world, [mode], 1, options) for mode in MODES)
    return [f"{fast['MiB']:.0f}", f"{bitwise['MiB'] - fast['MiB']:+.0f}", f"{bitwise.get('copies', 0):.2f}"]


TABLES: dict[str, tuple[Callable[[str, int, argparse.Namespace], list[str]], list[str]]] = {
    "speed": (speed, ["fast, steps/s", "bitwise, steps/s", "ratio (quartiles)", "ratio of CPU time"]),
    "memory": (memory, ["fast, MiB", "bitwise", "of it kept for sums and messages, in gradients"]),
}


def main() -> None:
    """Print the tables; with `--out`, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=list(TABLES), help="speed, memory (default both)")
    parser.add_argument("--model", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4], help="process counts (default 1 2 4)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each mode to take medians over (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads in both modes (default 1)")
    parser.add_argument("--quick", action="store_true", help="the speed on two processes, in four turns")
    parser.add_argument("--profile", action="store_true", help="also the functions that take most of rank 0's time")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        found = worker(options)
        if int(os.environ.get("RANK", "0")) == 0:
            options.out.write_text(json.dumps(found), encoding="ascii")
        return
    if options.quick:
        options.tables, options.world, options.turns = ["speed"], [2], 4
    for name in options.tables:
        cells, titles = TABLES[name]
        print("| " + " | ".join(["model", "processes", *titles]) + " |\n| --- |" + " ---: |" * (len(titles) + 1))
        for model in options.model:
            for world in options.world:
                row = [CASES[model].label, str(world), *cells(model, world, options)]
                print("| " + " | ".join(row) + " |", flush=True)
        print()
    print(f"Hardware: {hardware()}  \nVersions: {versions(PACKAGES)}  ")
    print(f"{options.turns} turns; {time.strftime('%Y-%m-%d')}, `python bench/bitwise.py {' '.join(sys.argv[1:])}`")


if __name__ == "__main__":
    main()
