"""Promises 1 and 5: the same samples, losses and metrics on any number of processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import CONFIGS, result, rows, run_several, traced

MLP = (
    str(CONFIGS / "digits_mlp.yaml"),
    "trainer.duration=80step",
    "trainer.log_every=1step",
    "debug.trace_samples=true",
    "trainer.train_metrics=[accuracy]",
    "data.eval_batch_size=25",  # several cuts a rank, and not as many on each
    "tracking={tensorboard: false, report: false}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 1, 2 and 3 processes, named by their number; in float64 too."""
    folder = tmp_path_factory.mktemp("curves")
    shutil.copy(Path(__file__).parent / "programs" / "float64.py", folder)
    double = [*MLP, "model={_target_: float64.Net}", "debug.trace_samples=false"]
    for processes in (1, 2, 3):
        jobs = [[*MLP, f"run.name=single{processes}"], [*double, f"run.name=double{processes}"]]
        run_several(folder, processes, jobs)
    return folder / "runs"


def largest_difference(one: Path, other: Path) -> float:
    """The largest relative difference of the loss over all logged steps."""
    pairs = list(zip(rows(one, "train"), rows(other, "train"), strict=True))
    assert len(pairs) == 80
    assert all(a["step"] == b["step"] for a, b in pairs)
    return max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)


@pytest.mark.parametrize("processes", [2, 3])
def test_every_step_takes_the_same_samples(folder: Path, processes: int) -> None:
    one, many = traced(folder / "single1"), traced(folder / f"single{processes}")
    assert len(one) == 80
    assert one == many


@pytest.mark.parametrize("processes", [2, 3])
def test_losses_agree_over_80_steps(folder: Path, processes: int) -> None:
    assert largest_difference(folder / "single1", folder / f"single{processes}") < 1e-5
    assert largest_difference(folder / "double1", folder / f"double{processes}") < 1e-12


@pytest.mark.parametrize("processes", [2, 3])
def test_the_accuracy_of_training_batches_is_exact(folder: Path, processes: int) -> None:
    one, many = (rows(folder / f"single{number}", "train") for number in (1, processes))
    assert [row["accuracy"] for row in one] == [row["accuracy"] for row in many]
    assert one[-1]["accuracy"] > 0.9 > one[0]["accuracy"]
    assert all(row["accuracy"] * 64 == round(row["accuracy"] * 64) for row in one)


def test_the_comparison_would_notice_another_loss(folder: Path) -> None:
    assert (
        largest_difference(folder / "single1", folder / "double1") > 1e-8
    )  # float32 against float64 is no bit-equality
    assert traced(folder / "single1")[1] != traced(folder / "single1")[2]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_counts_every_sample_once(folder: Path, processes: int) -> None:
    metrics = result(folder / f"single{processes}")["metrics"]
    assert metrics["val"]["eval_samples"] == 180
    assert metrics["test"]["eval_samples"] == 360
    assert {row["eval_samples"] for row in rows(folder / f"single{processes}", "val")} == {180}
    alone = result(folder / "single1")["metrics"]
    assert metrics["test"]["accuracy"] == alone["test"]["accuracy"]
    assert metrics["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-5)
