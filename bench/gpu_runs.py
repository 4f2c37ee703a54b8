"""The parts of bench/gpu_check that start real runs, of the project in gpu_project/; a part yields findings."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
Findings = Iterator[dict[str, Any]]
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


class SkippedError(Exception):
    """The part can't run here."""


@contextlib.contextmanager
def project() -> Iterator[tuple[Path, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A project with a config and user code, and a function that runs Python in it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(shutil.copytree(ROOT / "bench/gpu_project", folder, dirs_exist_ok=True))
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": paths, "PET_LOCAL_ADDR": "127.0.0.1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

        def python(*arguments: str) -> subprocess.CompletedProcess[str]:
            line = [sys.executable, *arguments]
            return subprocess.run(line, cwd=place, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL)

        yield place, python


def train(device: torch.device, *overrides: str) -> tuple[str, ...]:
    """Arguments of the Python interpreter for one training run."""
    return "-m", "dist_train.main", "train", "--config", "c.yaml", f"distributed.device={device.type}", *overrides


def said(done: subprocess.CompletedProcess[str], word: str = "") -> list[str]:
    """Lines of the output that contain the word, otherwise its last lines."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if word and word in line][:3] or lines[-8:]


def memory(device: torch.device) -> Findings:
    """Out of memory: the run restarts with half the size in the same process, after the GPU memory has been freed."""
    with project() as (_, python):
        done = python(*train(device, "model._target_=user.Hungry"))
        halved = done.stderr.count("restart with micro-batches of")
        yield {"what": "halved", "rc": done.returncode, "times": halved, "said": said(done, "restart"),
               "ok": done.returncode == 0 and halved >= 1}  # fmt: skip


def hang(device: torch.device) -> Findings:
    """The device hangs and the main thread waits for it: hang detection reports it and ends the process."""
    with project() as (_, python):
        began = time.perf_counter()
        done = python(*train(device, "model._target_=user.Hangs", "distributed.hang_timeout=8s"))
        yield {"what": "hang", "rc": done.returncode, "took": round(time.perf_counter() - began, 1), "said": said(done, "hang"),
               "ok": done.returncode == 1 and "hangs in step" in done.stderr}  # fmt: skip


def two(device: torch.device) -> Findings:
    """DDP with two real ranks on one GPU, over gloo."""
    given = (f"distributed.device={device.type}", "distributed.strategy=ddp", "trainer.ema_decay=0.9")
    jobs = [
        [*given, "run.name=both"], [*given, "run.name=parts", "trainer.stop_at=5step"], [*given, "run.name=parts"],
        [*given, "run.name=odd", "data.global_batch_size=1", "trainer.duration=4step"],
    ]  # fmt: skip
    with project() as (place, python):
        for launcher, several in (((), [[*given, "run.name=one"]]), (RANKS, jobs)):
            done = python(*launcher, "two.py", json.dumps(several))
            if done.returncode:
                yield {"what": "runs", "rc": done.returncode, "said": said(done), "ok": False}

        def losses(name: str) -> list[float]:
            path = place / f"runs/{name}/metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            return [row["loss"] for row in rows if row["split"] == "train"]

        one, both, odd = losses("one"), losses("both"), losses("odd")
        close = len(one) == len(both) == 12 and all(abs(a - b) < 1e-3 for a, b in zip(one, both, strict=True))
        yield {"what": "the curve of one rank", "one": one[-1], "both": both[-1], "ok": close}
        yield {"what": "stopped and whole", "ok": losses("parts") == both}
        yield {"what": "a rank without samples", "losses": odd, "ok": len(odd) == 4 and all(map(math.isfinite, odd))}


def workers(device: torch.device) -> Findings:
    """Workers forked in each epoch while memory is page-locked, with the pin-memory thread and a save in every other step."""
    with project() as (place, python):
        results = {}
        options = ("trainer.duration=30step", "checkpoint.every=2step", "data.pin_memory=auto")
        for count in (0, 2):
            persist = ("data.persistent_workers=false",) if count else ()
            began = time.perf_counter()
            done = python(*train(device, f"run.name=w{count}", f"data.num_workers={count}", *persist, *options))
            if done.returncode:
                yield {"what": "workers", "count": count, "rc": done.returncode, "said": said(done), "ok": False}
                return
            results[count] = json.loads((place / f"runs/w{count}/result.json").read_text())["weights_sha256"]
            yield {"what": "run", "workers": count, "took": round(time.perf_counter() - began, 1), "ok": True}
        yield {"what": "the same bits with workers", "ok": results[0] == results[2]}


def speed(device: torch.device) -> Findings:
    """ResNet-18 with dist_train and the hand-written loop, interleaved."""
    if device.type != "cuda":
        raise SkippedError("needs a GPU")
    import gpu  # in this directory

    case = replace(gpu.CASES[0], steps=180)
    for _ in range(2):
        raw, ours = (gpu.measure(case, name, device, Path())["images_s"] for name in ("raw loop", "**dist_train**"))
        yield {"what": "images/s", "raw": round(raw), "ours": round(ours), "ratio": round(ours / raw, 3), "ok": True}


def tests(device: torch.device) -> Findings:
    """All tests that need a GPU, except those that run these parts."""
    for needed in ("pytest", "filelock"):
        if importlib.util.find_spec(needed) is None:
            raise SkippedError(f"{needed} is not installed")
    folders = ["tests/gpu/test_training.py"]
    if device.type == "cuda":
        folders += [
            "tests/gpu/test_augments_on_gpu.py",
            "tests/gpu/test_copies.py",
            "tests/data/test_normalize.py",
            "tests/data/test_placement.py",
            "tests/runtime/test_seeding.py",
            "tests/checkpoint/test_staging.py",
        ]
    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *several, *folders],
        cwd=ROOT, env={**os.environ, "DIST_TRAIN_TEST_DEVICE": device.type}, text=True, capture_output=True,
    )  # fmt: skip
    yield {
        "what": "pytest -m gpu",
        "rc": done.returncode,
        "said": done.stdout.splitlines()[-12:],
        "ok": done.returncode == 0,
    }
