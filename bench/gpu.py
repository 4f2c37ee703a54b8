"""Training on one GPU: dist_train beside a hand-written loop, timm's form of a loop and Lightning, in less than eight minutes.

    python bench/gpu.py                                # a table goes to stdout; parts that don't fit into --budget are left out
    python bench/gpu.py --only 'ResNet-18, arrays' --rounds 5
    python bench/gpu.py --device cpu --small           # a test of this script, in seconds

bf16 autocast, channels_last, SGD, one intra-op thread, for all alike. `synthetic`: one batch on the device, again and again, so
that only the loop counts. `arrays`: 32x32 pictures in host memory, read as uint8 by whole batches, cropped, flipped and
normalized on the device by the same code for all. `files`: JPEG files of 640x427 with as many loader workers for all, decoded and
cropped to 224: by torchvision's ImageFolder and v1 transforms for the others, by dist_train's ImageFolder for dist_train.
Contenders are interleaved within a round. Reported are images per second, the ratio to the hand-written loop, model FLOPs
utilization, host syncs a step, seconds to the end of the first step (model and compilation included) and peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import gpu_loops
import torch
import torchvision
from gpu_loops import Clock, Stop
from input import MEAN, STD, write_jpegs
from rounds import SkippedError, footer, markdown

import dist_train
from dist_train.callbacks import Callback
from dist_train.models.flops import peak_flops, training_flops


@dataclass(frozen=True)
class Case:
    """What is trained: a model of torchvision's on pictures of a size, from `synthetic`, `arrays` or `files`.

    `warmup` steps aren't measured, `steps` are.
    """

    title: str
    model: str
    size: int
    batch: int
    source: str
    warmup: int
    steps: int
    compiled: bool = False
    images: int = 50_000  # of `arrays`; the number of `files` is BENCH_FILES, by default 1024


CASES = [  # the most informative first
    Case("ResNet-18, synthetic", "resnet18", 32, 256, "synthetic", 60, 300),
    Case("ResNet-50, synthetic", "resnet50", 224, 128, "synthetic", 20, 60),
    Case("ResNet-18, arrays", "resnet18", 32, 256, "arrays", 60, 300),
    Case("ResNet-50, files", "resnet50", 224, 128, "files", 12, 30),
    Case("ResNet-18, synthetic, compiled", "resnet18", 32, 256, "synthetic", 60, 300, compiled=True),
    Case("ResNet-50, synthetic, compiled", "resnet50", 224, 128, "synthetic", 20, 60, compiled=True),
]


def small(case: Case) -> Case:
    """The same in seconds on a CPU."""
    return replace(case, size=32, batch=4, warmup=1, steps=2, images=64)


class Ticks(Callback):
    """The clock as a callback of dist_train."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, trainer: Any) -> None:
        with contextlib.suppress(Stop):  # the duration ends it
            self.clock.tick()


def ours(case: Case, device: torch.device, folder: Path, clock: Clock) -> None:
    """With dist_train: all defaults, except that nothing is saved every epoch, which takes a second or less here."""
    data: dict[str, Any] = {"global_batch_size": case.batch, "num_workers": 0}
    if case.source == "files":
        data |= {
            "train": dist_train.data.ImageFolder(files(folder), random_resized_crop=case.size),
            "augment": [{"_target_": "dist_train.data.RandomHorizontalFlip"}],
            "num_workers": workers(),
        }
    elif case.source == "arrays":
        crop = {"_target_": "dist_train.data.RandomCrop", "size": case.size, "padding": 4}
        data |= {
            "train": pictures(case.size, case.images),
            "augment": [crop, {"_target_": "dist_train.data.RandomHorizontalFlip"}],
        }
    else:
        data |= {"train": gpu_loops.OneBatch(case.size, case.batch, device)}
    if case.source != "synthetic":
        data["normalize"] = {"mean": MEAN, "std": STD}
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        dist_train.train(
            {
                "run": {"dir": place, "name": "bench"},
                "data": data,
                "model": {"_target_": f"torchvision.models.{case.model}", "num_classes": 10},
                "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
                "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9},
                "callbacks": [Ticks(clock)],
                "trainer": {
                    "duration": f"{clock.total}step", "precision": "bf16", "channels_last": True, "compile": case.compiled
                },
                "distributed": {"device": device.type, "threads": 1},
                "checkpoint": {"every": "15min"},
            }
        )  # fmt: skip


def theirs(loop: Callable[..., None]) -> Callable[[Case, torch.device, Path, Clock], None]:
    """Another loop, over batches that are read and augmented alike."""

    def run(case: Case, device: torch.device, folder: Path, clock: Clock) -> None:
        model = getattr(torchvision.models, case.model)(num_classes=10).to(device, memory_format=torch.channels_last)
        with contextlib.suppress(Stop):
            loop(torch.compile(model) if case.compiled else model, device, lambda: batches(case, device, folder), clock)

    return run


CONTENDERS: dict[str, Callable[[Case, torch.device, Path, Clock], None]] = {
    "raw loop": theirs(gpu_loops.raw),
    "**dist_train**": ours,
    "timm's form": theirs(gpu_loops.timm_form),
    "Lightning": theirs(gpu_loops.lightning),
}


def batches(case: Case, device: torch.device, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Endless (inputs, targets) for the loops of others: on the host, with what is left to do on the device."""
    if case.source == "synthetic":
        return gpu_loops.OneBatch(case.size, case.batch, device).forever()
    if case.source == "arrays":
        return gpu_loops.augmented(pictures(case.size, case.images), case.batch, device, MEAN, STD)
    return gpu_loops.from_files(files(folder), case.size, case.batch, workers(), MEAN, STD)


@cache
def pictures(size: int, count: int) -> gpu_loops.Pictures:
    return gpu_loops.Pictures(size, count)


@cache
def files(folder: Path) -> Path:
    """The JPEG files, written once."""
    write_jpegs(folder / "files", int(os.environ.get("BENCH_FILES", "1024")))
    return folder / "files"


def workers() -> int:
    """As dist_train's auto."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus - 1, 8) if cpus > 2 else 0


def measure(case: Case, name: str, device: torch.device, folder: Path) -> dict[str, float]:
    """One run: images per second, seconds to the first step, syncs a step, peak memory in GiB.

    Raises SkippedError where the contender can't run here.
    """
    if name == "Lightning" and importlib.util.find_spec("lightning") is None:
        raise SkippedError("lightning isn't installed (bench/requirements.txt)")
    if case.source == "files":
        files(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if case.compiled:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device, case.warmup, case.steps)
    with warnings.catch_warnings():
        CONTENDERS[name](case, device, folder, clock)
    found = {"images_s": clock.rate() * case.batch, "first_s": clock.first, "syncs": clock.syncs_per_step()}
    if device.type == "cuda":
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


@cache
def flops(model: str, size: int) -> float:
    """Of an image in training."""
    net = getattr(torchvision.models, model)(num_classes=10).eval()
    with torch.no_grad():
        return training_flops(net, lambda: net(torch.zeros(1, 3, size, size)))


def row(
    case: Case, name: str, runs: list[dict[str, float]], raw: list[dict[str, float]], peak: float | None
) -> list[str]:
    """A line of the table; the ratio is the median of the rounds that both have run."""
    images = median(run["images_s"] for run in runs)
    ratios = [run["images_s"] / other["images_s"] for run, other in zip(runs, raw, strict=False)]
    spread = f"{min(run['images_s'] for run in runs):,.0f} to {max(run['images_s'] for run in runs):,.0f}"
    mfu = "" if peak is None else f"{images * flops(case.model, case.size) / peak:.1%}"
    return [
        f"{case.title}: {name}", f"{images:,.0f} ({spread})", f"{median(ratios):.2f}" if ratios else "", mfu,
        f"{median(run['syncs'] for run in runs):.1f}" if "GiB" in runs[0] else "",
        f"{median(run['first_s'] for run in runs):.2f} s", f"{runs[-1]['GiB']:.2f}" if "GiB" in runs[-1] else "",
    ]  # fmt: skip


def compete(
    cases: list[Case], device: torch.device, rounds: int, budget: float
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """All runs, by case and contender, as long as the budget lasts: a run isn't begun if one like it wouldn't fit any more."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    took: dict[tuple[str, str], float] = {}
    began, gone = time.monotonic(), set[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for case in cases if number == 0 else [case for case in cases if not case.compiled]:
                names = [name for name in CONTENDERS if not case.compiled or name in ("raw loop", "**dist_train**")]
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    key, started = (case.title, name), time.monotonic()
                    if key in gone or started - began + took.get(key, 20.0) > budget:
                        continue
                    try:
                        found.setdefault(key, []).append(measure(case, name, device, Path(folder)))
                    except SkippedError as error:
                        print(f"{case.title}: {name} skipped: {error}", file=sys.stderr)
                        gone.add(key)
                        found.pop(key, None)
                    took[key] = time.monotonic() - started
                    print(f"round {number + 1}  {case.title}: {name}, {took[key]:.1f} s", file=sys.stderr)
    files.cache_clear()
    return found


def main(arguments: list[str] | None = None) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Print the table; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="few steps of small pictures, not compiled: a test of the script"
    )
    parser.add_argument("--only", nargs="+", choices=[case.title for case in CASES], help="cases, default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=420, metavar="S", help="seconds for all runs; default: 420")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = [case for case in CASES if options.only is None or case.title in options.only]
    if options.small:
        cases = [small(case) for case in cases if not case.compiled]
    found = compete(cases, device, options.rounds, options.budget)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if device.type == "cuda" else None
    rows = [
        row(case, name, found[case.title, name], found.get((case.title, "raw loop"), []), peak)
        for case in cases
        for name in CONTENDERS
        if (case.title, name) in found
    ]
    print(
        torch.cuda.get_device_name() if device.type == "cuda" else "CPU: a test of the script, no measurement",
        end="\n\n",
    )
    head = ["", "images/s (least to most)", "ratio to raw", "MFU", "host syncs a step", "first step", "peak GiB"]
    print(markdown(head, rows))
    print(footer(["torch", "torchvision", "lightning"]))
    return found


if __name__ == "__main__":
    main()
