"""`distributed.reproducibility: bitwise`: all that a run leaves behind has the same bits on any number of processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bitwise_cases import CASES, case, layers
from bitwise_runs import Jobs, assert_same_bits, other_bits, states, train_all
from runs import result, rows

from dist_train.data.plan import Plan
from dist_train.main import main

# Those whose reduction has something that others don't have are trained on these numbers, the rest on few: chaos has all.
# On four processes, shares of one whole subtree each as on two and eight, the runs of CHANGES end.
MOST = (1, 2, 3, 5, 8)
EVERYWHERE = ("mlp-adamw", "cnn-sgd", "transformer-adamw", "weighted", "unused")
SOME = {name: MOST if name in EVERYWHERE else (1, 3, 5) for name in CASES} | {"resnet18-bf16": (1, 2, 3)}
# Stopped within an interval of the log, at the end of an epoch that is evaluated, and within one.
CHANGES = {1: "1step", 3: "3step", 2: "5step", 4: "null"}
MOVED = ("mlp-adamw", "cnn-sgd", "broken")
# Without dropout, which is drawn for each micro-batch: only the order of sums is another.
STILL = case(layers(("Linear", 5, 8), ("Tanh",), ("Linear", 8, 3)), debug={"digest": True})
FLIPPED = {"_target_": "faults.FlippedGradient", "step": 4, "rank": 2, "name": "2.weight"}


def changed(config: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    other = copy.deepcopy(config)
    other[section].update(values)
    return other


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; those of one number of processes are trained in one start."""
    jobs: Jobs = {n: [] for n in (*CHANGES, *MOST)}
    for name, worlds in SOME.items():
        for n in worlds:
            jobs[n].append((f"{name}-{n}", CASES[name], []))
    for n, stop in CHANGES.items():
        jobs[n] += [(f"{name}-moved", CASES[name], [f"trainer.stop_at={stop}"]) for name in MOVED]
    jobs[2].append(("cnn-sgd-workers", changed(CASES["cnn-sgd"], "data", num_workers=2), []))
    for n in (1, 3):
        jobs[n].append((f"still-{n}", STILL, []))
        jobs[n].append((f"fast-{n}", changed(STILL, "distributed", reproducibility="fast"), []))
    jobs[1].append(("micro-1", changed(STILL, "trainer", micro_batch_size=4), []))
    jobs[3].append(("flipped-3", STILL | {"callbacks": [FLIPPED]}, []))
    return train_all(tmp_path_factory.mktemp("bitwise"), jobs, timeout=800)


@pytest.mark.parametrize("name", CASES)
def test_everything_has_the_same_bits_on_any_number_of_processes(name: str, runs: Path) -> None:
    assert_same_bits(runs / f"{name}-{n}" for n in SOME[name])


@pytest.mark.parametrize("name", MOVED)
def test_a_run_whose_number_of_processes_changes_on_the_way_has_the_bits_of_one_process(name: str, runs: Path) -> None:
    assert other_bits(runs / f"{name}-1", runs / f"{name}-moved") == []
    starts = [json.loads(line) for line in (runs / f"{name}-moved" / "attempts.jsonl").read_text().splitlines()]
    assert [line["world_size"] for line in starts if line["event"] == "start"] == list(CHANGES)


def test_loader_workers_make_no_difference(runs: Path) -> None:
    assert other_bits(runs / "cnn-sgd-1", runs / "cnn-sgd-workers") == []


def test_samples_that_cannot_be_read_are_counted_in_every_row(runs: Path) -> None:
    broken = [index for index in range(40) if index in (8, 9, 10) or index % 7 == 3]
    plan = Plan(0, 40, 16, drop_last=False)
    replaced = np.cumsum([np.isin(plan.batch(step), broken).sum() for step in range(7)])
    for name in ("broken-3", "broken-moved"):
        found = [(row["step"], row["skipped_samples"]) for row in rows(runs / name, "train")]
        assert found == [(step, replaced[step - 1]) for step in (2, 4, 6, 7)]


def test_the_scaled_run_has_skipped_a_step(runs: Path) -> None:
    assert states(runs / "fp16-1")["trainer"]["stepper"]["scaler"]["scale"] < 2.0**16, "what it begins with"


def test_a_layer_that_some_micro_batches_leave_out_is_an_error_unless_it_may_be(tmp_path: Path) -> None:
    config = changed(CASES["unused"], "distributed", find_unused_parameters=False)
    with pytest.raises(AssertionError, match="find_unused_parameters"):
        train_all(tmp_path, {1: [("unused", config, [])]}, timeout=100)


def test_fast_differs_in_its_bits_and_in_nothing_else(runs: Path) -> None:
    one, three = runs / "fast-1", runs / "fast-3"
    assert result(one)["weights_sha256"] != result(three)["weights_sha256"]
    losses = [[row["loss"] for row in rows(place)] for place in (one, three)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_micro_batch_size_has_other_bits(runs: Path) -> None:
    one, other = runs / "still-1", runs / "micro-1"
    assert result(one)["weights_sha256"] != result(other)["weights_sha256"]
    assert [row["loss"] for row in rows(one)] == pytest.approx([row["loss"] for row in rows(other)], rel=1e-5)


def test_compare_finds_a_flipped_bit_of_one_ranks_gradient_beside_a_run_of_another_size(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs / "still-1"), str(runs / "still-3")]) == 0
    capsys.readouterr()
    assert main(["compare", str(runs / "still-1"), str(runs / "flipped-3")]) == 1
    out = capsys.readouterr().out
    assert "part at step 4, in the gradient of 2.weight" in out
    assert "equal in the 3 steps before it" in out
