"""What the benchmarks share: interleaved rounds, medians with their spread, and the machine they ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any


class SkippedError(Exception):
    """A contender that can't run here; the message says why."""


def interleaved(
    contenders: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, budget: float = float("inf")
) -> dict[str, list[Mapping[str, float]]]:
    """What each contender returns, once a round; their order rotates by one each round, so that noise affects all of them.

    One that raises SkippedError is left out and reported. A round begins only while it fits into `budget` seconds.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    names, began = list(contenders), time.monotonic()
    for number in range(rounds):
        started = time.monotonic()
        for name in names[number % max(1, len(names)) :] + names[: number % max(1, len(names))]:
            try:
                found.setdefault(name, []).append(contenders[name]())
            except SkippedError as error:
                print(f"{name} skipped: {error}", file=sys.stderr)
                names.remove(name)
                found.pop(name, None)
            print(f"round {number + 1}/{rounds}  {name}", file=sys.stderr)
        now = time.monotonic()
        if number + 1 < rounds and now - began + (now - started) > budget:
            print(f"{number + 1} of {rounds} rounds: {budget:.0f} s are over", file=sys.stderr)
            break
    return found


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """`median (least to most)`."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return median(value / other for value, other in zip(values, reference, strict=True))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def hardware() -> str:
    """The name of the CPU, and the number of CPUs that this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}, {cpus} CPUs{load}, {platform.system()} {platform.release()}"


def versions(packages: Sequence[str]) -> str:
    """The versions of Python and of those packages that are installed."""
    found: list[Any] = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def footer(packages: Sequence[str]) -> str:
    """Hardware, versions, date and command, for RESULTS.md."""
    script = Path(sys.argv[0])
    command = " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    return f"\n{hardware()}; {versions(packages)}; {time.strftime('%Y-%m-%d')}; `{command}`"
