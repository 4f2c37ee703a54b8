"""How long a save blocks a training step: synchronous, asynchronous, and `torch.save` of the same state.

Claim: an asynchronous save blocks a step for at most 15 % of the time of `torch.save` of the same state.
State: ResNet-50 with Adam, fp32, after one step (about 307 MB). Saves to `--directory` (a temporary one by default),
`--trials` of each, interleaved, so that noise on the machine affects all of them equally; medians are reported. `torch.save` is
measured as users call it (no fsync, no hash) and with fsync.

    python bench/checkpoint.py [--device cuda] [--directory DIR_OR_URL] [--trials 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision

from dist_train.checkpoint.manager import CheckpointManager, SavePolicy
from dist_train.runtime.storage import open_storage


def build_state(device: str) -> dict[str, Any]:
    """State of a ResNet-50 with Adam after one step with random gradients."""
    model = torchvision.models.resnet50().to(device)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain(state: dict[str, Any], path: Path, sync: bool) -> None:
    """`torch.save`, durable or not."""
    with open(path, "wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--directory", default=None)
    parser.add_argument("--trials", type=int, default=7)
    options = parser.parse_args()
    state = build_state(options.device)
    moments = [t for slots in state["optimizer"]["state"].values() for t in slots.values()]
    size = sum(t.nbytes for t in [*state["model"].values(), *moments]) / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        place = options.directory or f"{scratch}/checkpoints"
        quiet: Callable[[str], None] = lambda line: None  # noqa: E731
        asynchronous = CheckpointManager(open_storage(place).sub("asynchronous"), SavePolicy(keep_last=1), log=quiet)
        policy = SavePolicy(keep_last=1, asynchronous=False)
        synchronous = CheckpointManager(open_storage(place).sub("synchronous"), policy, log=quiet)
        before = resident()
        first = seconds(lambda: asynchronous.save(1, state, {}))
        asynchronous.wait()
        extra = resident() - before
        times: dict[str, list[float]] = {}
        for trial in range(2, options.trials + 2):
            works: dict[str, Callable[[], object]] = {
                "torch.save": lambda: plain(state, Path(scratch) / "plain.pt", False),
                "torch.save + fsync": lambda: plain(state, Path(scratch) / "plain.pt", True),
                "synchronous": partial(synchronous.save, trial, state, {}),
                "asynchronous, blocking": partial(asynchronous.save, trial, state, {}),
                "asynchronous, until published": asynchronous.wait,
            }
            for name, work in works.items():
                times.setdefault(name, []).append(seconds(work))
        found = asynchronous.newest()
        assert found is not None
        verify, load = seconds(found.verify), seconds(lambda: [found.load(part) for part in found.parts])
    base = statistics.median(times["torch.save"])
    print(f"{size:.0f} MB on {options.device}, torch {torch.__version__}, {options.trials} trials: medians (minima)")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:<32}{median:8.3f} s ({min(values):.3f})  {median / base:6.1%} of torch.save")
    print(f"  {'first asynchronous, blocking':<32}{first:8.3f} s          {first / base:6.1%}")
    print(f"  verify {verify:.3f} s, load {load:.3f} s")
    print(f"  memory that the first asynchronous save added: {extra:.0f} MB, {extra / size:.2f} states")


if __name__ == "__main__":
    main()
