"""The parts of bench/gpu_check that run steps in their own process; a part yields findings."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.checkpoint.staging import HostCopy
from dist_train.config.schema import DistributedConfig, TrainerConfig
from dist_train.data.plan import MicroBatch, Plan, StepWork
from dist_train.objective.modules import Modules
from dist_train.objective.objective import Objective, SingleProcess
from dist_train.objective.precision import Precision
from dist_train.optim.optim import build_optimizer
from dist_train.reduction.reduce import DataParallel, Reducer
from dist_train.runtime.seeding import seed_forward
from dist_train.step.step import Stepper
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised

Findings = Iterator[dict[str, Any]]
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}


def work(step: int, inputs: Tensor, targets: Tensor) -> StepWork:
    """A step of one micro-batch that is already on the device."""
    rows = np.arange(len(inputs))

    def micro() -> Iterator[MicroBatch]:
        yield MicroBatch(0, step, rows, 0, len(inputs), True, (inputs, targets))

    return StepWork(step, 0, len(inputs), micro())


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
