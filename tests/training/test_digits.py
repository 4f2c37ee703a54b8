"""The built-in example learns: what `make train` runs, for three seeds."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from runs import CONFIGS, result, run_several


def test_digits_reach_97_percent_over_three_seeds(tmp_path: Path) -> None:
    quiet = "tracking={tensorboard: false, report: false}"
    jobs = [[str(CONFIGS / "digits.yaml"), f"seed={seed}", f"run.name=seed{seed}", quiet] for seed in (0, 1, 2)]
    run_several(tmp_path, 1, jobs)
    accuracies = [result(tmp_path / f"runs/seed{seed}")["metrics"]["test"]["accuracy"] for seed in (0, 1, 2)]
    assert mean(accuracies) >= 0.97, accuracies
