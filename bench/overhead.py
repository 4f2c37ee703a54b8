"""Steps per second, and seconds from start to first step: dist_train, a raw loop and four other trainers.

    python bench/overhead.py                       # about ten minutes; the table goes to stdout
    python bench/overhead.py --rounds 1 --steps 500 --world 1 --only raw dist_train

All train the digits MLP 64-128-10 (SGD with momentum, 64 samples per step over all processes) on the CPU, with one
thread per process. Each measurement runs in its own process. The contenders are interleaved within each round, in an order
that rotates by one each round, so that temporary noise affects all of them. The numbers are medians over the rounds, the ratios
medians of each round's ratio to the raw loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from rounds import hardware, versions

HERE = Path(__file__).resolve().parent
# Name -> required module, label in the table.
CONTENDERS = {
    "raw": ("torch", "raw loop, stock DataLoader"),
    "raw_chores": ("torch", "raw loop with evaluation, saving and logging"),
    "fabric": ("lightning", "Fabric"),
    "lightning": ("lightning", "Lightning Trainer, extras off"),
    "accelerate": ("accelerate", "accelerate"),
    "ignite": ("ignite", "Ignite"),
    "dist_train": ("dist_train", "**dist_train, all defaults on**"),
}
PACKAGES = ["torch", "lightning", "accelerate", "pytorch-ignite", "dist_train"]


def command(name: str, world: int, result: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one contender on `world` processes."""
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    if name != "dist_train":
        rest = [str(HERE / "contenders.py"), name, str(result)]
        return [*start, *rest, f"--warmup={args.warmup}", f"--steps={args.steps}", f"--repeat={args.repeat}"]
    return [
        *start,
        *(str(HERE / "step_clock.py"), str(args.warmup), str(args.steps), str(result)),
        *("--config", str(HERE / "overhead.yaml")),
        f"run.dir={result.parent}",
        f"data.train.repeat={args.repeat}",
        f"trainer.duration={args.warmup + args.steps}step",
    ]


def measure(name: str, world: int, args: argparse.Namespace) -> dict[str, float]:
    """One run; raises RuntimeError with the end of its output if it fails."""
    # One thread each: the model is too small for more, and OpenMP's spinning threads suffer from any other load.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        result = Path(folder) / "result.json"
        started = time.time()
        done = subprocess.run(
            command(name, world, result, args),
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=args.timeout,
        )
        if done.returncode != 0 or not result.exists():
            raise RuntimeError(f"{name} on {world} processes: exit {done.returncode}\n{done.stdout[-3000:]}")
        found: dict[str, float] = json.loads(result.read_text())
    found["start_s"] = found.pop("first_step_at") - started
    return found


def rounds(names: list[str], args: argparse.Namespace) -> dict[tuple[str, int], list[dict[str, float]]]:
    """All measurements, by contender and world size, one dict per round."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number in range(args.rounds):
        for world in args.world:
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                figures = measure(name, world, args)
                found.setdefault((name, world), []).append(figures)
                note = f"{figures['steps_per_s']:7.0f} steps/s, {figures['cpu_us']:.0f} us of CPU per step, "
                note += f"first step after {figures['start_s']:.1f} s"
                print(f"round {number + 1}/{args.rounds}  {world} process(es)  {name:11s} {note}", file=sys.stderr)
    return found


def cell(values: Iterable[float], reference: Iterable[float]) -> str:
    """`median (ratio to raw)`; the ratio is the median of the rounds' own ratios."""
    values = list(values)
    ratio = median(value / ref for value, ref in zip(values, reference, strict=True))
    return f"{median(values):,.0f} ({ratio:.2f})"


def table(found: dict[tuple[str, int], list[dict[str, float]]], worlds: list[int]) -> str:
    """The table in Markdown: one row per contender, and a second one for dist_train, without evaluations and saves."""
    many = [f"{world} process{'es' if world > 1 else ''}" for world in worlds]
    cpu = "CPU time of the main thread per step"
    head = ["steps/s (ratio to raw)", *many, cpu, *(f"start to first step, {text}" for text in many)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]

    def column(name: str, world: int, key: str) -> list[float]:
        return [figures[key] for figures in found[name, world]]

    for name, (_, label) in CONTENDERS.items():
        if (name, worlds[0]) not in found:
            continue
        rates = [cell(column(name, w, "steps_per_s"), column("raw", w, "steps_per_s")) for w in worlds]
        starts = [f"{median(column(name, w, 'start_s')):.2f} s" for w in worlds]
        busy = " / ".join(f"{median(column(name, w, 'cpu_us')):.0f} us" for w in worlds)
        lines.append("| " + " | ".join([label, *rates, busy, *starts]) + " |")
        if name == "dist_train":
            rates = [cell(column(name, w, "stepping_per_s"), column("raw", w, "steps_per_s")) for w in worlds]
            lines.append(
                "| " + " | ".join(["dist_train, without evaluations and saves", *rates, *[""] * len(worlds)]) + " |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds to take medians over (default 5)")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps to measure (default 4000)")
    parser.add_argument("--warmup", type=int, default=200, help="warm-up steps before them (default 200)")
    parser.add_argument("--repeat", type=int, default=50, help="repetitions of the 1,257 digits per epoch (default 50)")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2], help="process counts (default 1 2)")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--timeout", type=float, default=600, help="time limit per run in seconds (default 600)")
    args = parser.parse_args()
    names = [name for name in CONTENDERS if name in args.only or name == "raw"]
    for name in list(names):
        if importlib.util.find_spec(CONTENDERS[name][0]) is None:
            print(f"{name} skipped: {CONTENDERS[name][0]} isn't installed (bench/requirements.txt)", file=sys.stderr)
            names.remove(name)
    found = rounds(names, args)
    print(table(found, args.world))
    print(f"\nHardware: {hardware()}  \nVersions: {versions(PACKAGES)}  ")
    print(f"Epoch: {1257 * args.repeat // 64} steps, {args.steps} steps measured, median of {args.rounds} rounds  ")
    print(f"{time.strftime('%Y-%m-%d')}, `python bench/overhead.py {' '.join(sys.argv[1:])}`")


if __name__ == "__main__":
    main()
