"""A run's report: made at its end, and again on any number of processes; never a reason for a run to fail."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import result

from dist_train.main import main
from dist_train.pages.figures import Confusion, Regression
from dist_train.run.open import Restored, open_run
from dist_train.views.model import pictures_of


def page(folder: Path) -> str:
    return html.unescape((folder / "report.html").read_text())


def captions(folder: Path) -> list[str]:
    return re.findall(r"\d taken for \d, \d+%; sample \d+", page(folder))


def shown(restored: Restored) -> list[object]:
    loader = restored.loader(restored.split(None))
    return list(pictures_of(restored.run, restored.config, restored.evaluator, loader, restored.found.step))


def test_a_completed_run_has_a_report_with_its_errors(digits: Path) -> None:
    wrong = round((1 - result(digits)["metrics"]["test"]["accuracy"]) * 360)
    assert len(captions(digits)) == min(wrong, 24) > 0
    for title in ("Curves", "The model that was kept", "Confusion matrix", "Starts and ends", "Config", "Environment"):
        assert f"<h2>{title}" in page(digits)
    assert "<td>end 0: completed</td>" in page(digits)  # the end of this very run is in it
    assert re.search(rf"torch {re.escape(torch.__version__)}, python .*<td>1 process, cpu, ", page(digits), re.DOTALL)


def test_two_processes_make_the_same_report(digits: Path, together: Path) -> None:
    copy = together / "2" / "copy"
    assert (together / "2" / "stdout").read_text().count(f"{copy / 'report.html'}\n") == 1
    assert captions(copy) == captions(digits)


def test_every_sample_is_counted_once(digits: Path) -> None:
    with open_run(str(digits), None) as restored:
        (confusion,) = shown(restored)
    assert isinstance(confusion, Confusion)
    assert confusion.counts.sum() == 360
    assert confusion.counts.trace() / 360 == result(digits)["metrics"]["test"]["accuracy"]
    assert confusion.classes == [str(k) for k in range(10)]
    likely = [example.probability for example in confusion.worst]
    assert likely == sorted(likely, reverse=True)


def test_a_sample_of_a_larger_dataset_keeps_its_numbers(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(str(digits), None) as restored:
        (whole,) = shown(restored)
        monkeypatch.setattr("dist_train.views.model.SAMPLES", 120)
        (part,) = shown(restored)
    assert isinstance(whole, Confusion)
    assert isinstance(part, Confusion)
    assert part.counts.sum() == 120
    assert {example.index for example in part.worst} <= {example.index for example in whole.worst}


def test_inputs_that_are_images_are_shown(digits: Path) -> None:
    with open_run(str(digits), None, ["data.test.flat=false"]) as restored:  # the network flattens its inputs itself
        (confusion,) = shown(restored)
    assert isinstance(confusion, Confusion)
    assert all(example.picture is not None and example.picture.shape == (8, 8, 1) for example in confusion.worst)


def test_a_regression_is_shown_in_original_units(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(table.parent.parent)
    with open_run(str(table), None) as restored:
        (regression,) = shown(restored)
    assert isinstance(regression, Regression)
    assert regression.name == "price"
    assert len(regression.truth) == 20
    np.testing.assert_allclose(regression.prediction, regression.truth, atol=5)
    assert 800 < regression.truth.mean() < 1200
    assert "<h2>Predicted against true</h2>" in page(table)


def test_a_report_that_fails_costs_one_warning(together: Path) -> None:
    printed = (together / "2" / "stderr").read_text()
    assert printed.count("the report has no pictures: RuntimeError: rank 1: LookupError: nothing to say") == 1
    folder = together / "2" / "runs" / "mute"
    assert result(folder)["state"] == "completed"
    assert "<h2>Confusion matrix</h2>" not in page(folder)
    assert "<h2>Curves</h2>" in page(folder)


def test_a_run_without_checkpoints_is_reported_without_pictures(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(digits, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    assert main(["report", str(copy)]) == 0
    assert "the report has no pictures" in capsys.readouterr().err
    assert "<h2>Confusion matrix</h2>" not in page(copy)
    assert main(["report", str(copy), "--checkpoint", "last"]) == 2
    assert main(["report", str(tmp_path)]) == 2


def test_a_report_that_cannot_be_written_is_a_failure(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(digits, tmp_path / "run")
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    assert main(["report", str(copy)]) == 1
    assert "there is no report.html: IsADirectoryError" in capsys.readouterr().err


def test_several_runs_are_compared_on_one_page(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(digits, tmp_path / "other")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("momentum: 0.9", "momentum: 0.5"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--run", str(digits), "--run", str(other)]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    text = html.unescape((tmp_path / "comparison.html").read_text())
    assert "<td>optimizer.momentum</td><td>0.9</td><td>0.5</td>" in text
    assert "<th>optimizer.momentum</th>" in text  # a column beside the results, too
    assert main(["report", str(digits), str(tmp_path / "none")]) == 2
    assert main(["report", str(digits), str(other), "--checkpoint", "last"]) == 2
    assert main(["report", str(digits), "--output", "one.html"]) == 2
