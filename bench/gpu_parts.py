"""One part of bench/gpu_check, in a process of its own: PYTHONPATH=. python bench/gpu_parts.py PART cuda|cpu FILE.

Each finding is appended to FILE immediately. The exit code is 0 if all are ok, 3 if the part can't run here.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import gpu_bitwise
import gpu_runs
import gpu_steps
import torch

PARTS: dict[str, Callable[[torch.device], gpu_runs.Findings]] = {
    part.__name__: part
    for part in (
        gpu_steps.overflow, gpu_steps.dtypes, gpu_steps.waits, gpu_steps.hostcopy, gpu_steps.random,
        gpu_runs.memory, gpu_runs.hang, gpu_runs.two, gpu_runs.workers, gpu_runs.speed, gpu_runs.tests, gpu_bitwise.splits,
        gpu_bitwise.ranks,
    )
}  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, which each line of the file records."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda if cuda else None,
                "nccl": nccl}  # fmt: skip
    return {"hardware": f"{name}, {os.cpu_count()} CPU cores", "versions": versions}


def main() -> int:
    """Run one part; `machine` prints the hardware and the versions."""
    name, kind, out = sys.argv[1:]
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    facts = machine(device)
    if name == "machine":
        print(json.dumps(facts))
        return 0

    def record(**what: Any) -> None:
        line = json.dumps({"part": name, **what, **facts}, default=str)
        with open(out, "a") as file:
            file.write(line + "\n")
        print("  " + json.dumps(what, default=str), flush=True)

    began, good = time.perf_counter(), True
    try:
        for finding in PARTS[name](device):
            outcome = "ok" if finding.pop("ok") else "failed"
            good = good and outcome == "ok"
            record(outcome=outcome, seconds=round(time.perf_counter() - began, 1), **finding)
    except gpu_runs.SkippedError as skipped:
        record(outcome="skipped", seconds=0.0, why=str(skipped))
        return 3
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dist_train" in frame.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        why = f"{type(error).__name__}: {str(error)[:500]}"
        record(outcome="failed", seconds=round(time.perf_counter() - began, 1), why=why, where=where)
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
