"""One run on 1, 2, 3, 1 and 4 processes in turn trains on what an undisturbed one trains on, and learns the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from killing import assert_each_sample_once, prepare
from runs import rows, run, traced

# No dropout and no BatchNorm, whose statistics are those of a micro-batch; sums in another order remain.
OPTIONS = (
    "--config",
    "chaos.yaml",
    "model={_target_: dist_train.models.MLP, in_features: 64, hidden: [32], out_features: 10}",
    "trainer.precision=fp32",
    "trainer.log_every=1step",
    "data.num_workers=0",
    "checkpoint.keep_best=null",
)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.chaos) for seed in range(1, 6))])
def test_a_run_that_changes_its_world_size_loses_no_sample_and_keeps_its_curve(tmp_path: Path, seed: int) -> None:
    """Stopped at random steps: in an epoch, at its end, or one step after the other."""
    prepare(tmp_path)
    worlds = (1, 2, 3, 1, 4) if seed else (1, 3, 2)  # the ordinary suite takes a short one
    stops = sorted(random.Random(seed).sample(range(1, 24), len(worlds) - 1))
    run(tmp_path, 1, *OPTIONS, "run.name=whole")
    for processes, stop in zip(worlds, [*(f"{step}step" for step in stops), "null"], strict=True):
        expect = 75 if processes == 1 else 0
        run(tmp_path, processes, *OPTIONS, "run.name=moved", f"trainer.stop_at={stop}", expect=expect)
    moved, whole = tmp_path / "runs" / "moved", tmp_path / "runs" / "whole"
    assert traced(moved) == traced(whole)
    assert_each_sample_once(moved)
    losses = [[row["loss"] for row in rows(place, "train")] for place in (moved, whole)]
    assert len(losses[0]) == len(losses[1]) == 24
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
