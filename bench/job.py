"""A whole job, from the command to its end: `make train` (configs/digits.yaml), beside the same job as a script and in peers.

    python bench/job.py                     # about three minutes
    python bench/job.py --rounds 1 --world 1 --only plain dist_train

Wall time of the command: imports, building, 20 epochs with an evaluation and a checkpoint each, the test at the end. dist_train
runs with all its defaults, report and pictures included; `answered again` is the same command once the run is completed. Each
runs in its own process, interleaved; medians of the rounds (least to most), and of each round's ratio to the plain script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from overhead import CONTENDERS as OTHERS
from overhead import PACKAGES
from rounds import SkippedError, footer, interleaved, markdown, ratio, spread

HERE = Path(__file__).resolve().parent
LABELS = {
    "plain": "plain script", "fabric": "Fabric", "lightning": "Lightning Trainer", "accelerate": "accelerate", "ignite": "Ignite",
    "dist_train": "**dist_train, all defaults on**",
}  # fmt: skip


def measure(name: str, world: int, epochs: int) -> dict[str, float]:
    """One job. Raises RuntimeError with the end of its output if it fails."""
    module = OTHERS.get(name, ("torch", ""))[0]
    # One thread each, as `make train` on two CPUs: OpenMP's spinning threads suffer from any other load.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    with tempfile.TemporaryDirectory(prefix="job-") as folder:
        if name == "dist_train":
            config = ["--config", str(HERE.parent / "configs/digits.yaml"), f"run.dir={folder}", "run.name=job"]
            command = [*start, "-m", "dist_train.main", *config, f"trainer.duration={epochs}ep"]
        else:
            command = [*start, str(HERE / "job_contenders.py"), name, folder, f"--epochs={epochs}"]
        seconds = timed(command, env, folder, module)
        found = {"seconds": seconds}
        if name == "dist_train":
            found["again"] = timed(command, env, folder, module)
            found["test"] = json.loads(Path(folder, "job/result.json").read_text())["metrics"]["test"]["accuracy"]
        else:
            found["test"] = json.loads(Path(folder, "result.json").read_text())["test"]
    return found


def timed(command: list[str], env: dict[str, str], folder: str, module: str) -> float:
    """Seconds of a command. Raises SkippedError if the module isn't installed."""
    began = time.perf_counter()
    done = subprocess.run(
        command, env=env, cwd=folder, stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=600,
    )  # fmt: skip
    if f"No module named '{module}'" in done.stdout:
        raise SkippedError(f"{module} isn't installed (bench/requirements.txt)")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-3000:]}")
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(LABELS), default=list(LABELS))
    options = parser.parse_args(arguments)
    for world in options.world:
        names = [name for name in LABELS if name in options.only or name == "plain"]
        found = interleaved({name: partial(measure, name, world, options.epochs) for name in names}, options.rounds)
        seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
        rows = [
            [
                LABELS[name],
                spread(seconds[name], ".2f"),
                f"{ratio(seconds[name], seconds['plain']):.2f}",
                f"{runs[-1]['test']:.3f}",
            ]
            for name, runs in found.items()
        ]
        if "dist_train" in found:
            again = [run["again"] for run in found["dist_train"]]
            rows.append(
                ["dist_train, answered again", spread(again, ".2f"), f"{ratio(again, seconds['plain']):.2f}", ""]
            )
        head = [f"the whole job, {world} process{'es' if world > 1 else ''}", "seconds", "ratio", "test accuracy"]
        print(markdown(head, rows), end="\n\n", flush=True)
    print(footer(PACKAGES))


if __name__ == "__main__":
    main()
