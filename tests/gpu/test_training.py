"""On a CUDA device: every precision, exact resume, and the engine's own checks; bench/gpu_check runs these and more."""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
from pathlib import Path

import pytest
import runs
import torch
from torch import nn

from dist_train.objective.precision import resolve_precision
from dist_train.step.digest import TensorDigests
from dist_train.step.finite import NonFiniteError

sys.path.append(str(runs.ROOT / "bench"))
from gpu_steps import network, stepper, work

# DIST_TRAIN_TEST_DEVICE=cpu runs what a CPU can run of these: a test of the tests.
DEVICE = torch.device(os.environ.get("DIST_TRAIN_TEST_DEVICE", "cuda"))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, *([needs_cuda] if DEVICE.type == "cuda" else [])]
ENV = {"CUDA_VISIBLE_DEVICES": "0"} if DEVICE.type == "cuda" else {}
INPUTS = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 10, (32,), generator=torch.Generator().manual_seed(1))


@needs_cuda
@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_step_is_on_record_and_ends_the_run_when_it_is_read(fused: bool) -> None:
    adam = {"_target_": "torch.optim.Adam", "lr": 0.01, **({} if fused else {"foreach": True})}
    step = stepper(DEVICE, nn.CrossEntropyLoss(), "fp32", adam)
    inputs, labels = INPUTS.to(DEVICE), LABELS.to(DEVICE)
    step(work(0, inputs, labels), want_norm=False)
    before = [parameter.detach().clone() for parameter in step.parameters]
    step(work(1, inputs * math.nan, labels), want_norm=False)
    kept = all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    assert kept == fused, "a fused optimizer leaves the update out"
    step(work(2, inputs, labels), want_norm=False)
    with pytest.raises(NonFiniteError, match="step 2"):
        step.guard.read()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sigmoid_and_bceloss_work_in_every_precision(precision: str) -> None:
    net = nn.Sequential(network(), nn.Linear(10, 1), nn.Sigmoid(), nn.Flatten(0))
    step = stepper(DEVICE, nn.BCELoss(), precision, net=net)
    for k in range(6):
        step(work(k, INPUTS.to(DEVICE), (LABELS > 4).float().to(DEVICE)), want_norm=False)
    assert math.isfinite(float(step.totals[0]))


@needs_cuda
def test_auto_precision_follows_the_device() -> None:
    major = torch.cuda.get_device_capability()[0]
    assert resolve_precision("auto", DEVICE).name == ("bf16" if major >= 8 else "fp16" if major == 7 else "fp32")


def test_digits_train_on_the_gpu(tmp_path: Path) -> None:
    done = runs.run(tmp_path, 1, "trainer.duration=8ep", env=ENV)
    assert DEVICE.type == "cpu" or "bf16" in done.stdout or "fp16" in done.stdout
    assert json.loads((tmp_path / "runs/digits/result.json").read_text())["metrics"]["test"]["accuracy"] > 0.95


def test_rows_measure_the_device_and_a_profile_has_its_kernels(tmp_path: Path) -> None:
    done = runs.run(
        tmp_path, 1, "trainer.duration=2ep", "trainer.log_every=10step", "trainer.profile.steps=[5,7]", env=ENV
    )
    lines = (tmp_path / "runs/digits/metrics.jsonl").read_text().splitlines()
    row = [row for row in map(json.loads, lines) if row["split"] == "train"][-1]
    (trace,) = (tmp_path / "runs/digits/profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {f"ProfilerStep#{k}" for k in (5, 6, 7)} <= {event["name"] for event in events}
    if DEVICE.type == "cuda":
        assert 0 < row["peak_memory"] < 4
        assert ("mfu" in row) == ("no mfu" not in done.stdout)
        assert 0 < row.get("mfu", 0.1) < 1
        assert any(event.get("cat") == "kernel" for event in events)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stopped_and_continued_is_bit_identical_with_deterministic_kernels(tmp_path: Path, precision: str) -> None:
    options = (
        f"trainer.precision={precision}", "distributed.deterministic=true", "trainer.duration=40step", "trainer.ema_decay=0.9",
        "trainer.log_every=7step", "debug.trace_samples=true",
    )  # fmt: skip
    runs.run(tmp_path, 1, *options, "run.name=whole", env=ENV)
    runs.run(tmp_path, 1, *options, "run.name=parts", "trainer.stop_at=17step", env=ENV, expect=75)
    runs.run(tmp_path, 1, *options, "run.name=parts", env=ENV)
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    assert runs.result(parts) == runs.result(whole)
    assert runs.same_state_dicts(parts / "model.pt", whole / "model.pt")
    assert runs.rows(parts) == runs.rows(whole)
    runs.run(tmp_path, 1, *options, "run.name=seed", "seed=1", env=ENV)
    assert runs.result(tmp_path / "runs/seed")["weights_sha256"] != runs.result(whole)["weights_sha256"]


@needs_cuda
def test_more_ranks_than_gpus_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    done = runs.run(tmp_path, 2, "trainer.duration=1ep", env=ENV, expect=None)
    assert done.returncode != 0
    assert "2 processes were started" in done.stderr
    assert "1 usable GPU" in done.stderr


def test_compiled_and_channels_last_train_too(tmp_path: Path) -> None:
    runs.run(
        tmp_path, 1, "trainer.duration=2ep", "trainer.compile=true", "trainer.channels_last=true", env=ENV, timeout=300
    )
    assert (tmp_path / "runs/digits/model.pt").exists()
    names = torch.load(tmp_path / "runs/digits/model.pt", weights_only=True)
    assert not any("_orig_mod" in name for name in names)


@needs_cuda
def test_digests_on_a_gpu_are_those_of_the_cpu_and_wait_for_nothing() -> None:
    tensors = [
        torch.randn(300, 70, 3, 3),
        torch.randn(5_000_000).bfloat16(),
        torch.arange(7),
        torch.randn(9, dtype=torch.complex64),
    ]
    moved = [tensors[0].cuda().to(memory_format=torch.channels_last), *(tensor.cuda() for tensor in tensors[1:])]
    there = TensorDigests()
    there(moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = there(moved)
        torch.use_deterministic_algorithms(True)
        again = there(moved)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == again.tolist() == TensorDigests()(tensors).tolist()
