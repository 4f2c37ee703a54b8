"""What the engine adds to an optimizer step, in microseconds: both loops get the same batches, without a loader.

    python bench/step_cost.py            # one process; about 20 s
    python bench/step_cost.py --lean     # with what can be left out left out
    torchrun --standalone --nproc_per_node=2 bench/step_cost.py

Blocks of steps of both loops alternate in one process, on the digits MLP of bench/overhead.py with all of its defaults, a log row
every 50 steps included; evaluations and checkpoints aren't. The raw loop on several processes is torch's DDP. Printed are the
medians over the blocks, and the difference with its quartiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import dist_train
from dist_train.data.plan import MicroBatch, StepWork
from dist_train.models import MLP
from dist_train.training.trainer import Trainer
from dist_train.watch.status import status

HERE = Path(__file__).resolve().parent
LEAN = {"tracking.tensorboard": "false", "trainer.log_every": "100000step"}
Seconds = dict[str, list[float]]


class Measure:
    """Runs both loops in place of a run's, and keeps the seconds of each step."""

    def __init__(self, blocks: int, steps: int, clock: Callable[[], float]):
        self.blocks, self.steps, self.clock = blocks, steps, clock
        self.seconds: Seconds = {"raw": [], "dist_train": []}

    def __call__(self, trainer: Any) -> str:
        trainer.control.start()
        trainer.console.begin(0, None, 0, None)
        works = self._works(trainer)
        batches = [work[1][0].batch for work in works]
        loops: dict[str, Callable[[], None]] = {
            "raw": raw_loop(batches, trainer.world.size),
            "dist_train": lambda: engine_loop(trainer, works),
        }
        for block in range(self.blocks + 1):
            for name, loop in loops.items():
                began = self.clock()
                loop()
                if block:  # the first one warms up
                    self.seconds[name].append((self.clock() - began) / self.steps)
        trainer.world.barrier()
        trainer.control.close()
        trainer.outcome = "preempted"
        return "preempted"

    def _works(self, trainer: Any) -> list[tuple[int, list[MicroBatch]]]:
        steps = trainer.parts.train_loader.steps(0, self.steps)
        return [(work.samples, list(work.micro_batches)) for work in steps]


def engine_loop(trainer: Any, works: list[tuple[int, list[MicroBatch]]]) -> None:
    """The steps as `Trainer.fit` runs them; they are always the first ones of the run."""
    trainer._due_at = 0
    for step, (samples, micro_batches) in enumerate(works):
        work = StepWork(step, 0, samples, iter(micro_batches))
        status.step = step + 1
        trainer.control.begin()
        trainer._run_step(work)
        trainer._boundary(trainer.control.due())
    trainer.progress.step = 0


def raw_loop(batches: list[Any], world: int) -> Callable[[], None]:
    """The loop that one would write."""
    model: nn.Module = MLP(64, [128], 10)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

    def run() -> None:
        for inputs, targets in batches:
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def report(seconds: Seconds) -> Iterator[str]:
    """The table."""
    raw, ours = seconds["raw"], seconds["dist_train"]
    low, middle, high = statistics.quantiles([(b - a) * 1e6 for a, b in zip(raw, ours, strict=True)], n=4)
    yield f"raw loop: {statistics.median(raw) * 1e6:.1f} us a step; dist_train: {statistics.median(ours) * 1e6:.1f} us"
    yield f"the engine adds {middle:.1f} us a step (quartiles {low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=500, help="steps of one block")
    parser.add_argument("--lean", action="store_true", help="without log rows and TensorBoard")
    parser.add_argument("--cpu", action="store_true", help="CPU time of the main thread, for a machine with other load")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(HERE))
    torch.set_num_threads(1)
    measure = Measure(args.blocks, args.steps, time.thread_time if args.cpu else time.perf_counter)
    with tempfile.TemporaryDirectory() as folder:
        config = yaml.safe_load((HERE / "overhead.yaml").read_text())
        changes = {
            "run.dir": os.environ.get("STEP_COST_DIR", folder),
            "data.train.repeat": 50,
            "trainer.duration": "1000000step",
            **(LEAN if args.lean else {}),
        }
        Trainer.fit = lambda trainer: measure(trainer)  # type: ignore[method-assign, assignment]
        dist_train.train(config, *(f"{key}={value}" for key, value in changes.items()))
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(report(measure.seconds)))


if __name__ == "__main__":
    main()
