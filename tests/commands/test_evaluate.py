"""The metrics of a run's checkpoint."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import F1, environment, result

from dist_train.main import main


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def plain(metrics: dict[str, float]) -> dict[str, float]:
    """Without those of the weights that no average was taken of."""
    return {name: value for name, value in metrics.items() if not name.startswith("raw_")}


def test_it_repeats_the_metrics_of_the_end_of_the_run(
    digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ended = result(digits)
    for split in ("test", "val"):
        got = evaluated(capsys, "--run", str(digits), "--split", split, "--output", str(tmp_path / "out.json"))
        assert got["metrics"] == plain(ended["metrics"][split])
        assert got["step"] == ended["kept_step"]
        assert json.loads((tmp_path / "out.json").read_text()) == got


def test_the_ema_weights_are_evaluated(digits: Path) -> None:
    ended = result(digits)["metrics"]["test"]
    assert ended["loss"] != ended["raw_loss"]


def test_three_processes_give_the_same_bits(digits: Path, together: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = evaluated(capsys, str(digits))
    assert json.loads((together / "3" / "out.json").read_text()) == alone
    printed = (together / "3" / "stdout").read_text().splitlines()
    assert len([line for line in printed if line.startswith("{")]) == 2  # one for each evaluate, not for each rank


def test_a_class_of_torchmetrics_gives_the_metric_of_one_process_on_three(
    digits: Path, together: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.metrics import f1_score

    alone = evaluated(capsys, str(digits), F1)["metrics"]
    assert json.loads((together / "3" / "f1.json").read_text())["metrics"] == alone
    with open(together / "3" / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    truth, guess = ([int(row[name]) for row in rows] for name in ("target", "prediction"))
    assert alone["multiclass_f1_score"] == pytest.approx(f1_score(truth, guess, average="macro"), abs=1e-6)
    each = evaluated(capsys, str(digits), F1.replace("10}", "10, average: null, name: f1}"))["metrics"]
    expected = dict(enumerate(f1_score(truth, guess, average=None)))
    assert {k: each[f"f1_{k}"] for k in range(10)} == pytest.approx(expected, abs=1e-6)
    confusion = "metrics=[{_target_: torchmetrics.ConfusionMatrix, task: multiclass, num_classes: 10}]"
    assert main(["evaluate", str(digits), confusion]) == 1
    assert "has shape (10, 10); only numbers and vectors can be recorded" in capsys.readouterr().err


def test_other_data_can_be_named(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = evaluated(capsys, str(digits), "data.test.split=val")
    assert got["metrics"] == plain(result(digits)["metrics"]["val"])


def test_nothing_in_the_run_is_touched(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    evaluated(capsys, str(digits), "--checkpoint", "last")
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "step-7"], "no checkpoint 'step-7'"),
        (["--checkpoint", "step-7"], "step-00000019"),
        (["data.test=null", "--split", "test"], "data.test: the run in"),
        (["model.hidden=[64]"], "don't fit this model"),
        (["data.test.spilt=val"], "spilt"),
        (["another"], "expected one run"),
        (["--output", "s3://bucket/out.json"], "a URL"),
        (["--output", "."], "it is a directory"),
        (["--output", "pyproject.toml/out.json"], "can't be written"),
        (["data.test={_target_: dist_train.data.Arrays, inputs: [], targets: []}"], "expected at least 1 sample"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(
    digits: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", str(digits), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_a_run_names_the_runs_near_it(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--run", str(digits.parent)]) == 2
    assert f"holds no run: config.yaml isn't there; runs that are there: {digits}" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "--run DIR" in capsys.readouterr().err


def test_corrupted_weights_are_not_evaluated(digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = shutil.copytree(digits, tmp_path / "run")
    step = result(copy)["kept_step"]
    weights = copy / "checkpoints" / f"step-{step:08d}" / "model.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert main(["evaluate", str(copy), "--checkpoint", f"step-{step}"]) == 1
    assert "model.pt" in capsys.readouterr().err


def test_a_checkpoint_that_training_deletes_while_it_is_read_gives_way_to_the_next(
    digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_train.run import open as restore

    copy, load = shutil.copytree(digits, tmp_path / "run"), restore.load_with_ema
    gone: list[str] = []

    def deleted_first(model: torch.nn.Module, found: restore.Found) -> None:
        if not gone:
            gone.append(found.name)
            shutil.rmtree(found.location)
        load(model, found)

    monkeypatch.setattr(restore, "load_with_ema", deleted_first)
    assert evaluated(capsys, str(copy), "--checkpoint", "last")["step"] == 38
    assert gone == ["step-00000057"]


def test_the_best_checkpoint_is_the_one_that_the_run_kept(digits: Path, tmp_path: Path) -> None:
    from dist_train.run.open import find_weights
    from dist_train.runtime.rundir import RunDir

    copy = shutil.copytree(digits, tmp_path / "run")
    steps = sorted(int(path.name.removeprefix("step-")) for path in (copy / "checkpoints").glob("step-*"))
    newest = torch.load(copy / "checkpoints" / f"step-{steps[-1]:08d}" / "trainer.pt", weights_only=True)
    best = newest["progress"]["best_step"]
    directory = RunDir(str(copy))
    assert find_weights(directory, None).step == find_weights(directory, "best").step == best
    assert best == result(copy)["kept_step"]
    assert find_weights(directory, "last").step == steps[-1]


def test_json_alone_is_printed_on_request_and_a_table_alone_on_a_terminal(
    digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = evaluated(capsys, str(digits))
    assert main(["evaluate", str(digits), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == both
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["evaluate", str(digits)]) == 0
    table = capsys.readouterr().out
    assert "{" not in table
    assert f"accuracy      {both['metrics']['accuracy']:.4f}" in table


def test_what_is_wrong_with_a_command_is_found_without_torch(digits: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom dist_train.main import main\n"
        "codes = [main(words) for words in json.loads(sys.argv[1])]\nprint(codes, 'torch' in sys.modules)"
    )
    run = str(digits)
    commands = [
        ["evaluate", "nowhere"], ["evaluate", run, "lr=1"], ["evaluate", run, "--checkpoint", "step-7"],
        ["evaluate", run, "--epochs", "3"], ["predict", "nowhere"], ["export", run, "--format", "onnx"], ["report", "nowhere"],
        ["report", run, "lr=1"], ["verify", "nowhere"], ["runs", "nowhere"], ["compare", run], ["trainer.durtion=1ep"],
        ["none.yaml"], ["new", run + "/config.yaml"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(commands)], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{[2] * len(commands)} False"], done.stderr
    assert list(tmp_path.iterdir()) == []
