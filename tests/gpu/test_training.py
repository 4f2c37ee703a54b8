"""On a CUDA device: no sync in a step, every precision, exact resume, and the engine's own checks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from torch import nn

from dist_train.data.loader import StepWork
from dist_train.data.sampler import MicroBatch
from dist_train.engine.finite import NonFiniteError
from dist_train.engine.losses import Loss
from dist_train.engine.modules import Modules
from dist_train.engine.precision import Precision, resolve_precision
from dist_train.engine.reduce import SingleProcess
from dist_train.engine.step import Stepper
from dist_train.engine.task import Supervised

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)
GPU = {"CUDA_VISIBLE_DEVICES": "0"}


def work(step: int, inputs: torch.Tensor, targets: torch.Tensor) -> StepWork:
    """A step of one micro-batch that is on the device already."""

    def micro() -> Iterator[MicroBatch]:
        yield MicroBatch(0, step, np.arange(len(inputs)), 0, len(inputs), True, (inputs, targets))

    return StepWork(step, 0, len(inputs), np.arange(len(inputs)), np.arange(len(inputs)), micro())


def stepper(
    precision: str, optimizer: str = "SGD", fused: bool = True, loss: nn.Module | None = None, **options: object
) -> Stepper:
    """A stepper over a small convolutional network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).to(CUDA)
    if loss is not None:
        net = nn.Sequential(net, nn.Linear(10, 1), nn.Sigmoid()).to(CUDA)
    kind = Precision(precision, "cuda")
    scaler = kind.scaler()
    made = getattr(torch.optim, optimizer)(net.parameters(), lr=0.01, fused=fused)
    task = Supervised(Loss(loss or nn.CrossEntropyLoss(label_smoothing=0.1)).to(CUDA))
    return Stepper(
        Modules(net), made, SingleProcess(Modules(net), task, kind, scaler), scaler=scaler, device=CUDA, seed=0, summed=False,
        prepare=lambda batch, epoch, indices: batch, indices_of=lambda k: np.arange(32), **options,  # type: ignore[arg-type]
    )  # fmt: skip


INPUTS = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 10, (32,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("precision", "clip"), [("fp32", None), ("bf16", None), ("bf16", 1.0), ("fp16", 1.0)])
def test_a_step_never_waits_for_the_device(precision: str, clip: float | None) -> None:
    step = stepper(precision, clip_norm=clip)
    inputs, labels = INPUTS.to(CUDA), LABELS.to(CUDA)
    for k in range(3):
        step(work(k, inputs, labels), want_norm=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(3, 13):
            step(work(k, inputs, labels), want_norm=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    total, weight = step.totals.tolist()
    step.guard.read()
    assert weight == 32 * (13 - step.guard.skipped)
    assert math.isfinite(total)


def test_the_sync_debugger_sees_a_sync() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones((), device=CUDA).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_step_is_on_record_and_ends_the_run_when_it_is_read(fused: bool) -> None:
    step = stepper("fp32", "Adam", fused)
    inputs, labels = INPUTS.to(CUDA), LABELS.to(CUDA)
    step(work(0, inputs, labels), want_norm=False)
    before = [parameter.detach().clone() for parameter in step.parameters]
    step(work(1, inputs * math.nan, labels), want_norm=False)
    kept = all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    assert kept == fused, "a fused optimizer leaves the update out"
    step(work(2, inputs, labels), want_norm=False)
    with pytest.raises(NonFiniteError, match="step 2"):
        step.guard.read()


def test_skipping_leaves_the_bad_step_out() -> None:
    inputs, labels = INPUTS.to(CUDA), LABELS.to(CUDA)
    with_bad, without = stepper("fp32", skip=True), stepper("fp32")
    for k, factor in enumerate((1.0, math.inf, 1.0)):
        with_bad(work(k, inputs * factor, labels), want_norm=False)
        if factor == 1.0:
            without(work(k, inputs, labels), want_norm=False)
    weights = [p for p in zip(with_bad.parameters, without.parameters, strict=True) if p[0].dim() > 1]
    assert all(torch.isfinite(a).all() for a, _ in weights)
    with_bad.guard.read()
    assert with_bad.guard.skipped == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sigmoid_and_bceloss_work_in_every_precision(precision: str) -> None:
    step = stepper(precision, loss=nn.BCELoss())
    for k in range(6):
        step(work(k, INPUTS.to(CUDA), (LABELS > 4).float().to(CUDA)), want_norm=False)
    assert math.isfinite(float(step.totals[0]))


def test_auto_precision_follows_the_device() -> None:
    major = torch.cuda.get_device_capability()[0]
    assert resolve_precision("auto", CUDA).name == ("bf16" if major >= 8 else "fp16" if major == 7 else "fp32")


def test_digits_train_on_the_gpu(tmp_path: Path) -> None:
    done = runs.run(tmp_path, 1, "trainer.duration=8ep", env=GPU)
    assert "bf16" in done.stdout or "fp16" in done.stdout
    assert json.loads((tmp_path / "runs/digits/result.json").read_text())["metrics"]["test"]["accuracy"] > 0.95


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stopped_and_continued_is_bit_identical_with_deterministic_kernels(tmp_path: Path, precision: str) -> None:
    options = (
        f"trainer.precision={precision}", "distributed.deterministic=true", "trainer.duration=40step", "trainer.ema_decay=0.9",
        "trainer.log_every=7step", "debug.trace_samples=true",
    )  # fmt: skip
    runs.run(tmp_path, 1, *options, "run.name=whole", env=GPU)
    runs.run(tmp_path, 1, *options, "run.name=parts", "trainer.stop_at=17step", env=GPU, expect=75)
    runs.run(tmp_path, 1, *options, "run.name=parts", env=GPU)
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    assert runs.result(parts) == runs.result(whole)
    assert runs.same_state_dicts(parts / "model.pt", whole / "model.pt")
    assert runs.rows(parts) == runs.rows(whole)
    runs.run(tmp_path, 1, *options, "run.name=seed", "seed=1", env=GPU)
    assert runs.result(tmp_path / "runs/seed")["weights_sha256"] != runs.result(whole)["weights_sha256"]


def test_more_ranks_than_gpus_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    done = runs.run(tmp_path, 2, "trainer.duration=1ep", env=GPU, expect=None)
    assert done.returncode != 0
    assert "2 processes were started" in done.stderr
    assert "1 usable GPU" in done.stderr


def test_compiled_and_channels_last_train_too(tmp_path: Path) -> None:
    runs.run(
        tmp_path, 1, "trainer.duration=2ep", "trainer.compile=true", "trainer.channels_last=true", env=GPU, timeout=300
    )
    assert (tmp_path / "runs/digits/model.pt").exists()
    names = torch.load(tmp_path / "runs/digits/model.pt", weights_only=True)
    assert not any("_orig_mod" in name for name in names)
