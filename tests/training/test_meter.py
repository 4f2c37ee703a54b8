"""What a run says about its own speed: operations, peaks, utilization, memory, and whether it waits for its data."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dist_train import train
from dist_train.models.flops import peak_flops, training_flops
from dist_train.tracking.records import read_rows
from dist_train.training import meter
from dist_train.training.input_advice import InputFacts, advice


# Multiprocessors, products and sums of one in a clock, boost clock in GHz: from the architectures' white papers.
@pytest.mark.parametrize(("name", "precision", "units", "per_clock", "clock"), [
    ("Tesla V100-SXM2-16GB", "fp16", 80, 1024, 1.53),
    ("Tesla T4", "fp16", 40, 1024, 1.59),
    ("NVIDIA A100-SXM4-80GB", "bf16", 108, 2048, 1.41),
    ("NVIDIA A100 80GB PCIe", "tf32", 108, 1024, 1.41),
    ("NVIDIA A10", "bf16", 72, 1024, 1.695),
    ("NVIDIA L4", "bf16", 58, 1024, 2.04),
    ("NVIDIA L40S", "bf16", 142, 1024, 2.49),
    ("NVIDIA GeForce RTX 3090", "bf16", 82, 512, 1.695),
    ("NVIDIA GeForce RTX 4090", "fp32", 128, 256, 2.52),
    ("NVIDIA H100 80GB HBM3", "bf16", 132, 4096, 1.83),
    ("NVIDIA H100 PCIe", "tf32", 114, 2048, 1.62),
    ("NVIDIA H200", "fp32", 132, 256, 1.98),
    ("AMD Instinct MI300X", "bf16", 304, 2048, 2.1),
])  # fmt: skip
def test_peaks_are_what_units_and_clocks_give(
    name: str, precision: str, units: int, per_clock: int, clock: float
) -> None:
    assert peak_flops(name, precision) == pytest.approx(units * per_clock * clock * 1e9, rel=0.02)


@pytest.mark.parametrize("name", [
    "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100", "Quadro P4", "",
])  # fmt: skip
def test_devices_that_are_only_similar_have_no_peak(name: str) -> None:
    assert peak_flops(name, "fp16") is None


def test_precisions_without_tensor_cores_have_no_peak() -> None:
    assert peak_flops("Tesla T4", "bf16") is None


def test_operations_are_those_of_products_three_times_and_once_where_nothing_trains() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    conv, linear = 2 * 8 * 36 * 3 * 9, 2 * 8 * 36 * 10
    inputs = torch.ones(5, 3, 6, 6)
    assert training_flops(model, lambda: model(inputs)) == 5 * 3 * (conv + linear)
    model[0].requires_grad_(False)
    assert training_flops(model, lambda: model(inputs)) == 5 * (conv + 3 * linear)
    assert (
        training_flops(linear_alone := nn.Linear(7, 2).requires_grad_(False), lambda: linear_alone(torch.ones(1, 7)))
        == 28
    )


class Small(TensorDataset):
    """40 points of 4 numbers in three classes."""

    def __init__(self) -> None:
        super().__init__(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)


class Slow(Dataset[Any]):
    """Images that take 5 ms each to read, which no batch makes cheaper."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.005)
        return torch.full((3, 2, 2), index / 40), index % 3


def train_rows(run: Path) -> list[dict[str, Any]]:
    """With what depends on the clock."""
    return [row for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"]


def start(folder: Path, dataset: str, *overrides: str) -> dict[str, Any]:
    model = [{"_target_": "torch.nn.Flatten"}, {"_target_": "torch.nn.Linear", "in_features": 12, "out_features": 3}]
    config = {
        "run": {"name": "a", "dir": str(folder)},
        "data": {"train": {"_target_": f"{__name__}.{dataset}"}, "global_batch_size": 8, "num_workers": 0},
        "model": {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3}
        if dataset == "Small"
        else {"_target_": "torch.nn.Sequential", "_args_": model},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "8step", "log_every": "2step"},
        "tracking": {"tensorboard": False, "report": False},
        "distributed": {"device": "cpu"},
    }
    return train(config, *overrides)


def test_rows_have_the_utilization_of_a_device_with_a_known_peak_and_no_bit_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = start(tmp_path / "cpu", "Small")
    monkeypatch.setattr(meter, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    measured = start(tmp_path / "known", "Small")
    assert measured["weights_sha256"] == plain["weights_sha256"]
    for row in train_rows(tmp_path / "known/a"):
        assert row["mfu"] == pytest.approx(row["samples_per_s"] * 3 * 2 * 4 * 3 / 66.9e12)
    assert not any("mfu" in row or "peak_memory" in row for row in train_rows(tmp_path / "cpu/a"))
    monkeypatch.setattr(meter, "device_name", lambda device: "Abacus 3000")
    capsys.readouterr()
    start(tmp_path / "unknown", "Small")
    assert capsys.readouterr().out.count("no mfu: the peak FLOP/s of Abacus 3000 in fp32 isn't known here") == 1
    assert not any("mfu" in row for row in train_rows(tmp_path / "unknown/a"))


def test_a_run_that_waits_for_its_data_says_so_once_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meter, "SECONDS", 0.1)
    start(tmp_path / "fast", "Small")
    assert "bottleneck" not in capsys.readouterr().err
    start(tmp_path / "slow", "Slow")
    said = capsys.readouterr().err
    assert said.count("the input is the bottleneck: training waits for data") == 1
    for tip in ("a read_batch(indices) in Slow", "samples as uint8 with data.normalize"):
        assert tip in said
    waits = [row["data_wait"] for row in train_rows(tmp_path / "slow/a")]
    assert min(waits[:3]) > meter.WAITING


def test_advice_names_what_this_config_lacks() -> None:
    slow = InputFacts(
        "torchvision.datasets.folder.ImageFolder", cpus=8, workers=2, floats=True, cuda=True, pinned=False
    )
    said = advice(0.5, slow)
    assert "50% of the time" in said
    assert "2.0 times" in said
    for tip in ("data.num_workers=7 (2 now", "pin_memory=auto", "dist_train.data.ImageFolder", "data.normalize"):
        assert tip in said
    assert "keep it decoded" in advice(0.5, InputFacts("my.Own", own=("keep it decoded",)))
    ready = advice(0.3, InputFacts("my.Own", whole=True, cpus=1))
    assert "num_workers" not in ready
    assert "read_batch" not in ready
    assert "pin_memory" not in ready


def test_a_dataset_that_knows_what_would_make_it_faster_is_asked() -> None:
    said = advice(0.5, InputFacts("my.Own", own=("a faster way",)))
    assert "- a faster way" in said
    assert "read_batch" not in said


def test_a_rank_that_has_not_seen_the_first_batch_gives_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "SECONDS", 0)
    world = SimpleNamespace(is_main=False, device=torch.device("cpu"))
    other = meter.Meter(SimpleNamespace(world=world), print)  # type: ignore[arg-type]
    for _ in range(meter.INTERVALS):
        other.row({"data_wait": 1.0, "samples_per_s": 1.0})
    assert other.advice() == ""
    other.facts = InputFacts("my.Own", whole=True, cpus=1)  # a negative control
    assert "100% of the time" in other.advice()
