"""Evaluation in bitwise mode: also many sums, of which not each eval batch has a row, are added in the order of the dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from runs import rows, run_several

PIECES = Path(__file__).parent.parent / "training" / "programs" / "leafy.py"


def test_many_sums_have_the_bits_of_one_process(tmp_path: Path) -> None:
    shutil.copy(PIECES, tmp_path)
    images = {"_target_": "leafy.Images"}
    for mode in ("bitwise", "fast"):
        config = {
            "data": {"train": images, "val": images, "global_batch_size": 8, "eval_batch_size": 3, "num_workers": 0},
            "model": {"_target_": "leafy.Net"},
            "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
            "metrics": [{"_target_": "leafy.Wide"}],
            "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.0},  # so that evaluation alone can differ
            "trainer": {"duration": "1step", "micro_batch_size": 2},
            "distributed": {"reproducibility": mode, "threads": 1, "deterministic": True},
            "tracking": {"tensorboard": False, "report": False},
            "checkpoint": {"keep_best": None},
        }
        (tmp_path / f"{mode}.yaml").write_text(yaml.safe_dump(config))
    for processes in (1, 3):
        names = {mode: f"run.name={mode}-{processes}" for mode in ("bitwise", "fast")}
        run_several(tmp_path, processes, [[f"{mode}.yaml", name] for mode, name in names.items()])
    values = {path.name: rows(path, "val")[0] for path in (tmp_path / "runs").iterdir()}
    assert len(values["bitwise-3"]) > 100
    assert values["bitwise-3"] == values["bitwise-1"]
    assert values["bitwise-1"] == pytest.approx(values["fast-3"])
    assert values["fast-3"] != values["fast-1"], "otherwise the order of these sums wouldn't show"
