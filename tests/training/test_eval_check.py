"""What evaluation needs is tried before the first step of a run: by its key, before anything is written, leaving no trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import rows, run, run_several, same_state_dicts

from dist_train.config.errors import ConfigError
from dist_train.run import start
from dist_train.run.api import train

CHECKED = Path(__file__).parent / "programs" / "checked.py"
ACCURACY = {"metric": "accuracy", "of": "out"}
BASE: dict[str, Any] = {
    "data": {
        "train": {"_target_": "checked.Points"},
        "val": {"_target_": "checked.Points", "n": 30},
        "test": {"_target_": "checked.Points", "n": 12},
        "global_batch_size": 8,
        "eval_batch_size": 20,
        "num_workers": 0,
    },
    "model": {"_target_": "checked.Net"},
    "loss": {"_target_": "checked.loss"},
    "metrics": [ACCURACY],
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
    "trainer": {"duration": "2ep", "log_every": "1step"},
    "tracking": {"tensorboard": False, "report": False},
    "run": {"name": "checked"},
}


@pytest.fixture(autouse=True)
def folder(beside: Callable[[Path], Path]) -> Path:
    """The working directory, with the pieces beside the config."""
    return beside(CHECKED)


def metric(where: str, kind: str = "Fails") -> dict[str, Any]:
    return {"_target_": f"checked.{kind}", "where": where}


def points(**arguments: int) -> dict[str, Any]:
    return {"_target_": "checked.Points", **arguments}


EACH = {"metric": "f1", "of": "out", "average": "none"}
WRONG: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"metrics": ["accuracy"]}, "metrics.0", ["metric accuracy: ", "aux: float32 (8, 4)}", "of: logits"]),
    ({"metrics": [ACCURACY, {**EACH, "of": "logits"}]}, "metrics.1", ["metric f1: ", "have no logits: they are {out"]),
    ({"metrics": [ACCURACY, metric("sums")]}, "metrics.1", ["20 samples of data.val", "'logits'", "checked.py:"]),
    ({"metrics": [metric("result")]}, "metrics.0", ["evaluating 30 samples of data.val", "30 samples are too few"]),
    ({"metrics": [metric("shape")]}, "metrics.0", ["fails has shape (2, 2); only numbers and vectors"]),
    ({"metrics": [metric("update", "Whole")]}, "metrics.0", ["metric whole: KeyError: 'boxes'; it got outputs {out"]),
    ({"metrics": [metric("compute", "Whole")]}, "metrics.0", ["metric whole: ValueError: could not convert string"]),
    ({"metrics": [metric("loss", "Whole")]}, "metrics", ["a metric can't be called loss: that name is reserved"]),
    ({"data": {"val": points(broken=0)}}, "data.val", ["reading sample 0", "a file is missing"]),
    ({"data": {"test": points(n=5, broken=4)}}, "data.test", ["reading sample 4", "a file is missing"]),
    ({"task": {"_target_": "checked.TrainsOnly"}}, "task", ["8 samples of data.val", "no labels here", "checked.py:"]),
    ({"checkpoint": {"keep_best": "val/f2"}, "metrics": [EACH]}, "checkpoint.keep_best", ["val/f2 isn't computed"]),
    ({"metrics": [EACH]}, "checkpoint.keep_best", ["the evaluation gives val/loss, val/f1_low, val/f1_high_point"]),
]


@pytest.mark.parametrize(("parts", "key", "messages"), WRONG)
def test_what_fails_is_named_by_its_key_and_nothing_is_written(
    parts: dict[str, Any], key: str, messages: list[str], folder: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        train({**BASE, **parts, "data": {**BASE["data"], **parts.get("data", {})}})
    (problem,) = raised.value.problems
    assert problem.key == key
    assert [text for text in messages if text not in problem.message] == []
    assert not (folder / "runs").exists()


def test_a_value_that_needs_more_than_a_few_samples_gets_an_eval_batch() -> None:
    needs = {**metric("result"), "least": 12}
    assert train({**BASE, "metrics": [ACCURACY, needs]})["state"] == "completed"


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 1), (12, 0)])
def test_a_value_that_needs_more_samples_than_an_eval_batch_gets_more_batches(size: int, workers: int) -> None:
    data = {**BASE["data"], "eval_batch_size": size, "num_workers": workers}
    regression = {"_target_": "torchmetrics.R2Score"}  # of one sample: an error
    first = {"metric": regression, "of": {"_target_": "checked.first_column"}}
    needs = {**metric("result"), "least": 12}  # as many as data.test has
    done = train({**BASE, "data": data, "metrics": [first, needs], "trainer": {"duration": "1step"}})
    assert done["metrics"]["val"]["r2_score"] < 1
    assert done["metrics"]["test"]["fails"] == 1


def test_what_fails_with_a_few_samples_is_no_error_if_it_does_not_with_an_eval_batch() -> None:
    """Hard negatives, recall among the batch, a task's own top 10: what evaluation gives is a whole eval batch."""
    top = {"metric": {"_target_": "checked.Best", "k": 10}, "of": "out"}
    assert train({**BASE, "metrics": [top], "trainer": {"duration": "1step"}})["state"] == "completed"
    data = {**BASE["data"], "test": None, "eval_batch_size": 9}
    with pytest.raises(ConfigError, match=r"evaluating 9 samples of data.val failed.*metric best"):
        train({**BASE, "data": data, "metrics": [top], "run": {"name": "other"}})


def test_a_value_that_may_need_the_whole_of_a_large_split_is_a_warning(
    capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    val = points(n=700, own_noise=False)
    data = {**BASE["data"], "val": val, "test": None, "eval_batch_size": 100}
    needs = {**metric("result"), "least": 650, "name": "late"}
    checkpoint = {"keep_best": "val/late"}
    done = train({**BASE, "data": data, "metrics": [ACCURACY, needs], "checkpoint": checkpoint})
    assert done["metrics"]["val"]["late"] == 1
    out = " ".join("".join(capfd.readouterr()).split())
    assert "600 samples are too few" in out
    assert "the whole split may be enough" in out


def test_with_workers_this_process_reads_nothing() -> None:
    data = {split: {"_target_": "checked.Handle"} for split in ("train", "val", "test")}
    done = train({**BASE, "data": {**BASE["data"], **data, "num_workers": 1}, "trainer": {"duration": "1step"}})
    assert done["metrics"]["test"]["eval_samples"] == 60


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (15, 0), (15, 1)])
def test_a_dataset_in_which_only_neighbours_fit_into_a_batch_is_read_as_evaluation_reads_it(
    size: int, workers: int
) -> None:
    val = {"_target_": "checked.Lengths", "n": 30}
    data = {**BASE["data"], "val": val, "test": None, "eval_batch_size": size, "num_workers": workers}
    done = train({**BASE, "data": data, "model": {"_target_": "checked.Mean"}, "trainer": {"duration": "1step"}})
    assert done["metrics"]["val"]["eval_samples"] == 30


@pytest.mark.parametrize("others", [{}, {"ema_decay": 0.9}, {"evaluate_at_start": True}])
def test_a_run_is_bitwise_the_same_with_and_without_it(
    others: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one more sample read, one more call or one more draw would show."""
    shared = {"of": "out", "metric": {"_target_": "torchmetrics.MetricCollection", "metrics": {
        name: {"_target_": f"torchmetrics.classification.Multiclass{name}", "num_classes": 3, "average": "macro"}
        for name in ("Precision", "Recall", "F1Score")
    }}}  # fmt: skip
    metrics = [ACCURACY, {"_target_": "checked.Calls"}, shared, {"metric": "auroc", "of": "out"}]
    config = {**BASE, "metrics": metrics, "trainer": {**BASE["trainer"], **others}}
    checks = []

    def check(parts: Any) -> list[str]:
        checks.append(parts)
        return real(parts)

    real = start.check_evaluation
    for name, function in (("with", check), ("without", lambda parts: [])):
        monkeypatch.delitem(sys.modules, "checked", raising=False)
        monkeypatch.setattr(start, "check_evaluation", function)
        train({**config, "run": {"name": name}})
    assert len(checks) == 1
    one, other = folder / "runs" / "with", folder / "runs" / "without"
    assert rows(one) == rows(other)
    assert rows(one, "val")[0]["calls"] == 2, "two eval batches of 30 samples, and no more"
    assert same_state_dicts(one / "model.pt", other / "model.pt")


def test_it_is_done_at_a_fresh_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    monkeypatch.setattr(start, "check_evaluation", lambda parts: checks.append(parts) or [])
    for stop in ("3step", "5step", None):
        train({**BASE, "trainer": {**BASE["trainer"], "stop_at": stop}})
    assert len(checks) == 1


NAMED = [
    {"metric": name, "of": "out", **more}
    for name, more in (
        ("accuracy", {}), ("f1", {}), ("miou", {"per_class": True}), ("auroc", {"average": "none"}), ("perplexity", {})
    )
]  # fmt: skip


def test_several_processes_agree_on_the_number_of_classes_and_on_what_fails(folder: Path) -> None:
    """With one eval batch of each split, two of three processes have none."""
    config = folder / "x.yaml"
    splits = {split: points(n=n, own_noise=False) for split, n in (("train", 24), ("val", 30), ("test", 12))}
    config.write_text(
        yaml.safe_dump({**BASE, "data": {**BASE["data"], **splits, "eval_batch_size": 30}, "metrics": NAMED})
    )
    expected = train(str(config), "run.name=alone", "trainer.duration=3step")["metrics"]["val"]
    assert {*expected} >= {"accuracy", "f1", "miou", "iou_low", "iou_high_point", "iou_top", "auroc_top", "perplexity"}
    json.dumps(expected, allow_nan=False)
    run(folder, 3, "evaluate", "runs/alone", "--split", "val", "--output", "out.json")
    assert json.loads((folder / "out.json").read_text())["metrics"] == expected
    run_several(folder, 3, [[str(config), "run.name=three", "trainer.duration=3step"]])
    assert [*rows(folder / "runs" / "three", "val")[-1]][-len(expected) :] == [*expected]
    wrong = run(folder, 2, "--config", "x.yaml", "run.name=wrong", "metrics.1.of=logits", expect=1)  # torchrun's own
    assert "metrics.1: evaluating 30 samples of data.val failed" in wrong.stderr
    assert not (folder / "runs" / "wrong").exists()
