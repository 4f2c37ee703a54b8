"""Starting real runs from tests, and reading what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
# What differs between two runs of the same thing: the clock.
CLOCK = {"time", "samples_per_s", "data_wait", "step_s_min", "step_s_max", "data_wait_s_min", "data_wait_s_max"}
CLOCK |= {"mfu", "peak_memory"}


def environment(**extra: str) -> dict[str, str]:
    """The environment of a test's processes: one thread, no GPU, nothing of a launcher that runs the tests themselves."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC", "SLURM_", "ACCELERATE_", "PET_", "PYTEST")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **extra}


def forks_workers() -> dict[str, str]:
    """PYTHONPATH for a script or shell that starts a real torchrun or `accelerate launch`, whose workers then are its forks."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(forking.HOOK), os.environ.get("PYTHONPATH")]))}


def command(processes: int, *arguments: str) -> list[str]:
    """One plain process, or torchrun with several; `processes=0` is torchrun with one."""
    module = ["-m", "dist_train.main", *arguments]
    if processes == 1:
        return [sys.executable, *module]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes or 1}"]
    return [*torchrun, *module]


def start(
    folder: Path, processes: int, *arguments: str, env: dict[str, str] | None = None, real: bool = False
) -> subprocess.Popen[str]:
    """Start a run in `folder`, in a session of its own; `real`: never as a fork of a process that has imported torch."""
    popen = forking.RealPopen if real else subprocess.Popen
    return popen(
        command(processes, *arguments), cwd=folder, env=environment(**(env or {})), text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(
    folder: Path,
    processes: int,
    *arguments: str,
    env: dict[str, str] | None = None,
    expect: int | None = 0,
    timeout: float = 300,
    real: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; fails with the whole output where the exit code isn't `expect`."""
    process = start(folder, processes, *arguments, env=env, real=real)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{arguments} took longer than {timeout} s\n{out}\n{err}") from None
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert expect is None or done.returncode == expect, f"exit code {done.returncode}\n{out}\n{err}"
    return done


F1 = "metrics=[{_target_: torchmetrics.classification.MulticlassF1Score, num_classes: 10}, accuracy]"


def run_several(
    folder: Path, processes: int, jobs: list[list[str]], timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Trainings of [config, override, ...] one after another in the same processes: starting these is what costs."""
    shutil.copy(ROOT / "tests" / "programs" / "several.py", folder)
    launcher = command(processes)[:-2]  # all before `-m dist_train.main`
    done = subprocess.run(
        [*launcher, "several.py", json.dumps(jobs)],
        cwd=folder, env=environment(), timeout=timeout, text=True, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def rows(folder: Path, split: str | None = None, clock: bool = False) -> list[dict[str, Any]]:
    """The records of a run, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in lines if split is None or row["split"] == split]
    return kept if clock else [{key: value for key, value in row.items() if key not in CLOCK} for row in kept]


def result(folder: Path) -> dict[str, Any]:
    """result.json without what the clock says."""
    content = json.loads((folder / "result.json").read_text())
    del content["seconds"]
    return content


def traced(folder: Path) -> dict[int, set[int]]:
    """The samples of each optimizer step, over all ranks; where attempts overlap, the later one counts.

    Fails where two ranks of one attempt trained on the same sample in a step (which `data.weights` allows: not for its runs).
    """
    steps: dict[int, set[int]] = {}
    attempts: dict[int, list[Path]] = {}
    for path in (folder / "trace").glob("attempt-*-rank-*.jsonl"):
        attempts.setdefault(int(path.name.split("-")[1]), []).append(path)
    for attempt in sorted(attempts):
        seen: dict[int, list[int]] = {}
        for path in attempts[attempt]:
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                seen.setdefault(entry["step"], []).extend(entry["indices"])
        for step, indices in seen.items():
            assert len(indices) == len(set(indices)), f"attempt {attempt}, step {step}: a sample on two ranks"
            steps[step] = set(indices)
    return steps


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all processes of pytest-xdist; for fixtures that no test changes."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        done = folder.with_name(f"{name}.done")
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def uploads_below(storage: Any) -> list[str]:
    """Keys of the multipart uploads that were begun below a `Storage` on S3 and neither completed nor aborted."""
    bucket, _, prefix = storage.location.removeprefix("s3://").partition("/")
    begun = [upload["Key"] for upload in storage.fs.list_multipart_uploads(bucket)]
    return [key for key in begun if key.startswith(prefix.rstrip("/") + "/")]


def same_state_dicts(one: Path, other: Path) -> bool:
    """Whether two files hold the same names, dtypes and bits."""
    import torch

    a, b = torch.load(one, weights_only=True), torch.load(other, weights_only=True)
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
