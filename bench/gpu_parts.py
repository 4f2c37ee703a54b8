"""The parts of bench/gpu_check, one per process: PYTHONPATH=. python bench/gpu_parts.py PART cuda|cpu FILE.

A part yields findings; each is appended to FILE immediately. The exit code is 0 if all are ok, 3 if the part can't run here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.checkpoint.staging import HostCopy
from dist_train.config.schema import DistributedConfig, TrainerConfig
from dist_train.data.loader import StepWork
from dist_train.data.plan import MicroBatch, Plan
from dist_train.runtime.seeding import seed_forward
from dist_train.step.modules import Modules
from dist_train.step.objective import Objective, SingleProcess
from dist_train.step.optim import build_optimizer
from dist_train.step.precision import Precision
from dist_train.step.reduce import DataParallel, Reducer
from dist_train.step.step import Stepper
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised

ROOT = Path(__file__).resolve().parent.parent
Findings = Iterator[dict[str, Any]]
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}


class SkippedError(Exception):
    """The part can't run here."""


def work(step: int, inputs: Tensor, targets: Tensor) -> StepWork:
    """A step of one micro-batch that is already on the device."""
    rows = np.arange(len(inputs))

    def micro() -> Iterator[MicroBatch]:
        yield MicroBatch(0, step, rows, 0, len(inputs), True, (inputs, targets))

    return StepWork(step, 0, len(inputs), rows, micro())


def network() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def stepper(
    device: torch.device, loss: Any, precision: str, optimizer: Any = SGD, *, ddp: bool = False, net: nn.Module | None = None,
    **options: Any,
) -> Stepper:  # fmt: skip
    """A step as the engine builds it."""
    torch.manual_seed(0)
    net = (net or network()).to(device)
    kind = Precision(precision, device.type)
    task = Supervised(Loss(loss).to(device))
    objective = Objective(Modules(net, task=task), task, kind, kind.scaler())

    def reducer() -> Reducer:
        return DataParallel(objective, 1, DistributedConfig()) if ddp else SingleProcess(objective)

    plan, config = Plan(0, 32, 32, shuffle=False), TrainerConfig(**options)
    optimizer = build_optimizer(optimizer, objective.modules, device)
    return Stepper(objective, optimizer, reducer, plan, lambda micro, work: micro.batch, config)


def images(device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch with the same values on every device."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    return inputs.to(device), labels.to(device)


def overflow(device: torch.device) -> Findings:
    """The first step overflows and is skipped; the rest must equal a run of torch's unfused optimizer without it."""
    inputs, labels = images(device)
    for precision, deterministic in (("fp16", False), ("fp16", True), ("fp32", False)):
        torch.use_deterministic_algorithms(deterministic)
        ends = {}
        for form in ("fused", "foreach"):
            optimizer = SGD if form == "fused" else {**SGD, "foreach": True}
            step = stepper(device, nn.CrossEntropyLoss(), precision, optimizer, on_nonfinite="skip")
            dirty = [torch.full_like(p, 1e3) for p in step.parameters for _ in range(8)]
            del dirty  # memory that was never written to holds what was there
            for k in range(4):
                step(work(k, inputs * math.inf if k == 0 else inputs, labels), want_norm=False)
            step.guard.read()
            ends[form] = [p.detach().clone() for p in step.parameters]
            skipped = step.guard.skipped
        apart = max(float((a - b).abs().max()) for a, b in zip(ends["fused"], ends["foreach"], strict=True))
        yield {
            "what": "first step overflows", "precision": precision, "deterministic": deterministic, "apart": apart,
            "skipped": skipped, "ok": apart < 1e-2 and skipped == 1,
        }  # fmt: skip
    torch.use_deterministic_algorithms(False)


class Bag(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(50, 10, mode="sum", sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, n) int64 -> (B, 10)."""
        return self.table(inputs)  # type: ignore[no-any-return]


def dtypes(device: torch.device) -> Findings:
    """Weights and gradients that aren't float32 and dense."""
    inputs, labels = images(device)
    adam = {"_target_": "torch.optim.AdamW", "lr": 0.01}
    plain = {"_target_": "torch.optim.SGD", "lr": 0.1}
    words = torch.arange(64, device=device).view(32, 2) % 50
    kept = network()
    kept.prior = torch.ones(3)  # type: ignore[assignment]  # on the host, whatever .to() does
    cases: dict[str, Callable[[], tuple[Stepper, Tensor]]] = {
        "bf16": lambda: (
            stepper(device, nn.CrossEntropyLoss(), "fp32", adam, net=network().bfloat16()),
            inputs.bfloat16(),
        ),
        "float64": lambda: (
            stepper(device, nn.CrossEntropyLoss(), "fp32", adam, net=network().double()),
            inputs.double(),
        ),
        "sparse": lambda: (stepper(device, nn.CrossEntropyLoss(), "fp32", plain, net=Bag(), clip_grad_norm=1.0), words),
        "buffers on the host": lambda: (stepper(device, nn.CrossEntropyLoss(), "fp16", net=kept), inputs),
    }
    for name, make in cases.items():
        step, batch = make()
        for k in range(3):
            step(work(k, batch, labels), want_norm=True)
        step.guard.read()
        yield {"what": name, "ok": all(bool(p.isfinite().all()) for p in step.parameters)}


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A NCCL process group with one rank, eagerly initialized, and destroyed at the end."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1, device_id=own
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Any synchronization with the device raises an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(device: torch.device) -> Findings:
    """No step synchronizes with the device; DDP's weights equal those of one process."""
    inputs, labels = images(device)
    soft = torch.rand(32, 10, device=device)
    losses: dict[str, tuple[Any, Tensor]] = {
        "cross-entropy": (nn.CrossEntropyLoss(), labels),
        "class weights": (nn.CrossEntropyLoss(weight=torch.ones(10)), labels),
        "soft targets": (nn.CrossEntropyLoss(), soft),
        "elements": (nn.MSELoss(), soft),
        "own": (lambda outputs, targets: (outputs - targets).pow(2).mean(1), soft),
    }
    if device.type == "cuda":  # a negative control
        seen = False
        with no_waiting(device):
            try:
                labels.sum().item()
            except RuntimeError:
                seen = True
        yield {"what": "a wait is seen", "ok": seen}
    with one_rank(device):
        for name, (loss, targets) in losses.items():
            for precision in ("bf16", "fp16"):
                ends = []
                for ddp in (False, True):
                    step = stepper(
                        device,
                        loss,
                        precision,
                        ddp=ddp,
                        clip_grad_norm=1.0,
                        on_nonfinite="skip" if precision == "bf16" else "stop",
                    )
                    for k in range(3):
                        step(work(k, inputs, targets), want_norm=True)
                    with no_waiting(device):
                        for k in range(3, 8):
                            step(work(k, inputs, targets), want_norm=True)
                    step.guard.read()
                    ends.append([p.detach().float() for p in step.parameters])
                apart = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
                yield {"what": "no wait", "loss": name, "precision": precision, "ddp_apart": apart, "ok": apart < 0.05}
        began = time.perf_counter()
    yield {"what": "end of the process group", "took": round(time.perf_counter() - began, 2), "ok": True}


def hostcopy(device: torch.device) -> Findings:
    """The copy of a save: correct, fast, cheap to fork beside, and harmless if page-locking is refused."""
    gib = 1.0 if device.type == "cuda" else 0.1
    tree: dict[str, Tensor] = {f"t{k}": torch.randn(int(gib * 2**27 / 4), device=device) for k in range(8)}
    copier, took = HostCopy(), []
    for _ in range(3):
        began = time.perf_counter()
        copy = copier.take(tree)
        took.append(round(time.perf_counter() - began, 4))
    right = all(torch.equal(copy[name], tensor.cpu()) for name, tensor in tree.items())
    locked = device.type != "cuda" or bool(copy["t0"].is_pinned())
    yield {"what": "copy", "GiB": gib, "took": took, "locked": locked, "ok": right and locked}
    if sys.platform == "linux":
        ours, theirs = os.pipe()
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            os.read(ours, 1)
            os._exit(0)
        ms = round((time.perf_counter() - began) * 1e3, 1)
        lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        private = sum(int(line.split()[1]) for line in lines if line.startswith("Private")) // 1024
        os.write(theirs, b"x")
        os.waitpid(child, 0)
        yield {"what": "fork beside it", "ms": ms, "child_private_MB": private, "ok": private < 200 * gib}
    for tensor in tree.values():
        tensor.add_(1)
    copy = copier.take(tree)
    yield {"what": "copy after a fork", "ok": all(torch.equal(copy[n], t.cpu()) for n, t in tree.items())}
    copier.release()
    if device.type == "cuda":
        other, memory = HostCopy(), np.zeros(1 << 22, np.uint8)
        other._lock(memory)
        unlock, other._unlock = other._unlock, None
        other._lock(memory)  # a second time is refused
        sums = float((torch.ones(4, device=device) + 1).sum())
        copy = other.take({"t": tree["t0"]})
        kept = torch.equal(copy["t"], tree["t0"].cpu())
        yield {"what": "a refused lock", "ok": unlock is not None and other._unlock is None and sums == 8 and kept}


def random(device: torch.device) -> Findings:
    """cuDNN recreates its dropout state, with a device read, after each seeding."""
    net, inputs = nn.LSTM(64, 64, 2, dropout=0.5).to(device), torch.randn(20, 8, 64, device=device)
    for seeds in (False, True):
        for timed in (False, True):
            began = time.perf_counter()
            for k in range(50):
                if seeds:
                    seed_forward(0, k, 0, device)
                net(inputs)[0].sum()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if timed:
                yield {"what": "LSTM", "seeded": seeds, "ms": round((time.perf_counter() - began) * 20, 3), "ok": True}
    began = time.perf_counter()
    for k in range(1000):
        seed_forward(0, k, 0, device)
    us = round((time.perf_counter() - began) * 1e3, 1)
    yield {"what": "seed_forward", "us": us, "ok": us < 1000}


CONFIG = """
run: {name: run}
data:
  train: {_target_: user.Blobs, samples: 640}
  val: {_target_: user.Blobs, samples: 100}
  global_batch_size: 64
  num_workers: 0
model: {_target_: user.Net}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1, momentum: 0.9}
trainer: {duration: 12step, log_every: 1step, precision: fp32}
distributed: {deterministic: true}
tracking: {tensorboard: false, report: false}
"""
USER = '''
import os, time
import torch
from torch import nn
from torch.utils.data import Dataset

class Blobs(Dataset):
    def __init__(self, samples):
        self.samples = samples
    def __len__(self):
        return self.samples
    def __getitem__(self, index):
        label = index % 10
        return torch.randn(64) + 3 * (torch.arange(64) % 10 == label), label

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    def forward(self, x):
        return self.net(x)

class Hungry(Net):
    """Half of a card for 32 samples: 64 don't fit."""
    def forward(self, x):
        if self.training and len(x) > 16:
            if not x.is_cuda:
                raise MemoryError
            total = torch.cuda.get_device_properties(x.device).total_memory
            room = torch.empty(int(len(x) / 48 * total), dtype=torch.uint8, device=x.device)
        return super().forward(x)

class Hangs(Net):
    steps = 0
    def forward(self, x):
        Hangs.steps += self.training
        if Hangs.steps == 6:
            torch.cuda._sleep(10**13) if x.is_cuda else time.sleep(1000)
        return super().forward(x)
'''
TWO = """
import json, sys
import torch
import torch.distributed as dist
import dist_train.runtime.world as world

if torch.cuda.is_available():  # NCCL refuses two ranks on one GPU; gloo moves CUDA tensors through the host
    def one_card(choice, placement):
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    world.pick_device, join = one_card, dist.init_process_group
    dist.init_process_group = lambda backend, **options: join("cpu:gloo,cuda:gloo", **{**options, "device_id": None})
from dist_train.run.api import train

for overrides in json.loads(sys.argv[1]):  # sequentially in the same processes: starting them takes most of the time
    train("c.yaml", *overrides)
"""


RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@contextlib.contextmanager
def project() -> Iterator[tuple[Path, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A project with a config and user code, and a function that runs Python in it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.joinpath("c.yaml").write_text(CONFIG)
        place.joinpath("user.py").write_text(USER)
        place.joinpath("two.py").write_text(TWO)
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
    from torch.utils.data import TensorDataset

    gpu.WARMUP = 60
    data = TensorDataset(torch.randn(2048, 3, 32, 32), torch.randint(0, 10, (2048,)))
    for _ in range(2):
        raw, ours = gpu.raw("resnet18", data, 128, 240), gpu.ours("resnet18", data, 128, 240)
        yield {
            "what": "steps/s",
            "raw": round(raw, 1),
            "ours": round(ours, 1),
            "ratio": round(ours / raw, 3),
            "ok": True,
        }


def tests(device: torch.device) -> Findings:
    """All tests that need a GPU, except those that run these parts."""
    for needed in ("pytest", "filelock"):
        if importlib.util.find_spec(needed) is None:
            raise SkippedError(f"{needed} is not installed")
    folders = ["tests/gpu/test_training.py"]
    if device.type == "cuda":
        folders += ["tests/data/test_augment.py", "tests/runtime/test_seeding.py", "tests/checkpoint/test_staging.py"]
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
        for finding in globals()[name](device):
            outcome = "ok" if finding.pop("ok") else "failed"
            good = good and outcome == "ok"
            record(outcome=outcome, seconds=round(time.perf_counter() - began, 1), **finding)
    except SkippedError as skipped:
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
