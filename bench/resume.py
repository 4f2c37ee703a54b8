"""Time from the start of a resumed run to the end of its first step, early and late in a long dataset.

Claim: resuming takes as long at sample 10,000,000 as at sample 100. The dataset has 20 million samples, each computed
from its index, and an epoch is shuffled: both starts pay for the permutation of 20 million numbers, which is measured alone too.

Instead of training 100,000 steps, the benchmark trains one step, and changes the position in copies of that checkpoint.
It measures whole programs (`python -m dist_train.main`), interleaved, so that noise on the machine affects both equally.

    python bench/resume.py [--trials 5] [--world 1]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.callbacks import Callback
from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.store import CheckpointStore
from dist_train.data.plan import Plan
from dist_train.runtime.storage import open_storage

LENGTH, BATCH = 20_000_000, 100
HERE = Path(__file__).resolve().parent
CONFIG = f"""
data:
  train: {{_target_: resume.Computed}}
  val: null
  test: null
  global_batch_size: {BATCH}
model: {{_target_: dist_train.models.MLP, in_features: 8, hidden: [16], out_features: 2}}
loss: {{_target_: torch.nn.CrossEntropyLoss}}
optimizer: {{_target_: torch.optim.Adam, lr: 0.001}}
scheduler: null
trainer: {{duration: 1ep}}
checkpoint: {{keep_best: null}}
tracking: {{tensorboard: false, report: false}}
callbacks:
  - {{_target_: resume.FirstStep, path: first_step}}
"""


class Computed(Dataset[tuple[Tensor, int]]):
    """Samples computed from their index: 8 float32 values and one of two classes."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((8,), index / LENGTH), index % 2


class FirstStep(Callback):
    """Records when the first step of a start was done."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_step_end(self, trainer: Any) -> None:
        if trainer.world.is_main and not self.path.exists():
            self.path.write_text(repr(time.time()))


def start(folder: Path, world: int, name: str, steps: int) -> float:
    """Run until `steps` optimizer steps are done in total; return the seconds from the start to the end of the first one."""
    (folder / "first_step").unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, "-m", "dist_train.main", "--config", "resume.yaml", f"run.name={name}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    began = time.time()
    done = subprocess.run(
        [*command, f"trainer.stop_at={steps}step"], cwd=folder, env=env, text=True, capture_output=True
    )
    if not (folder / "first_step").exists():
        raise RuntimeError(f"expected a step, but the run exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return float((folder / "first_step").read_text()) - began


def moved(trained: Path, samples: int) -> int:
    """Copy the run, and set the position in the copy's checkpoint to `samples`; return the number of steps."""
    place, step = trained.parent / f"at{samples}", samples // BATCH
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(trained, place, ignore=shutil.ignore_patterns("checkpoints"))
    found = CheckpointStore(open_storage(trained / "checkpoints")).find("last")
    parts = {part: found.load(part) for part in found.parts}
    parts["trainer"]["progress"] |= {"step": step, "samples": samples}
    CheckpointManager(open_storage(place / "checkpoints")).save(step, parts, found.meta, wait=True)
    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--world", type=int, default=1)
    options = parser.parse_args()
    times: dict[int, list[float]] = {100: [], 10_000_000: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "resume.yaml").write_text(CONFIG)
        start(folder, options.world, "trained", 1)
        for _ in range(options.trials):
            for samples, values in times.items():
                step = moved(folder / "runs" / "trained", samples)
                values.append(start(folder, options.world, f"at{samples}", step + 1))
    began = time.perf_counter()
    Plan(seed=0, length=LENGTH, global_batch_size=BATCH).batch(0)
    permutation = time.perf_counter() - began
    print(f"{LENGTH} samples, world size {options.world}, torch {torch.__version__}, {options.trials} trials")
    for samples, values in times.items():
        spread = ", ".join(f"{value:.2f}" for value in sorted(values))
        print(
            f"  resumed at sample {samples:>10}: median {statistics.median(values):6.2f} s to the first step's end ({spread})"
        )
    print(f"  ratio of the medians {statistics.median(times[10_000_000]) / statistics.median(times[100]):.2f}")
    print(f"  included in both: the epoch's permutation {permutation:.2f} s")


if __name__ == "__main__":
    main()
