"""bench/: its scripts run in a small form on the CPU, so that they don't fall behind the engine. No time is judged."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import runs
from torchvision.models import ResNet18_Weights

sys.path.append(str(runs.ROOT / "bench"))
import gpu
import input as bench_input
import rounds


def test_gpu_runs_in_a_small_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BENCH_FILES", "8")
    cases = ["ResNet-18, arrays", "ResNet-50, files"]
    monkeypatch.setattr(gpu, "CASES", [replace(case, model="resnet18") for case in gpu.CASES])
    found = gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--only", *cases])
    loops = {"raw loop", "**dist_train**", "timm's form"}
    assert {key for key in found if key[1] != "Lightning"} == {(case, loop) for case in cases for loop in loops}
    assert all(run["images_s"] > 0 for of in found.values() for run in of)
    assert "CPU: a test of the script" in capsys.readouterr().out


def test_operations_of_a_network_are_three_times_what_torchvision_states_for_its_forward() -> None:
    """Without the last layer's 990 classes more; torchvision counts a product and its sum as one."""
    stated = ResNet18_Weights.IMAGENET1K_V1.meta["_ops"] * 1e9 - 990 * 512
    assert gpu.flops("resnet18", 224) == pytest.approx(3 * 2 * stated, rel=1e-3)


def test_input_runs_in_a_small_form() -> None:
    found = bench_input.main(["--rounds", "1", "--images", "8"])
    assert len(found["arrays"]) == 3
    assert {"**dist_train ImageFolder**", "**dist_train ImageFolder, cached at 256**"} <= found["jpeg"].keys()
    assert all(ratio > 0 for ratios in found.values() for ratio in ratios.values())


def test_rounds_rotate_leave_out_what_cannot_run_and_end_with_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def missing() -> dict[str, float]:
        raise rounds.SkippedError("isn't installed")

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"x": float(len(order))}

    found = rounds.interleaved({"a": lambda: run("a"), "b": missing, "c": lambda: run("c")}, 3)
    assert order == ["a", "c", "c", "a", "a", "c"]
    assert list(found) == ["a", "c"]
    assert "b skipped: isn't installed" in capsys.readouterr().err
    assert rounds.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0
    assert len(rounds.interleaved({"a": lambda: run("a")}, 3, budget=0.0)["a"]) == 1
