"""The example notebook, executed by a kernel, and what notebooks see of the package."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT, environment

import dist_train
from dist_train import ConfigError, train
from dist_train.pages.notebook import NotebookLive, notebook_live
from dist_train.pages.result import Result
from dist_train.tracking.live import Beside, Position

QUICK = ["tracking.tensorboard=false", "tracking.report=false", "trainer.duration=2step", "run.name=cell"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder and the code cells with their outputs."""
    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.read(ROOT / "docs" / "examples" / "notebook.ipynb", 4)
    found = environment(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    # A real process (-P, see tests/forking.py): the client may signal the group that its kernel is in, which is to be its own.
    kernel = {
        "argv": [sys.executable, "-P", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this Python",
    }
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps({**kernel, "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_PATH", str(folder))
        for name, value in found.items():
            patch.setenv(name, value)
        NotebookClient(book, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return folder, [cell for cell in book.cells if cell.cell_type == "code"]


def shown(cell: Any, kind: str = "text/html") -> str:
    return "".join(output["data"].get(kind, "") for output in cell.outputs if "data" in output)


def test_a_result_is_shown_with_curves_the_best_and_the_files_that_are_there(executed: tuple[Path, list[Any]]) -> None:
    folder, cells = executed
    html = shown(cells[2])
    recorded = json.loads((folder / "runs/notebook/result.json").read_text())
    assert html.count("<svg") == 2
    assert f"<td>{recorded['metrics']['test']['accuracy']:.4f}</td>" in html
    assert 'href="runs/notebook/report.html"' in html
    assert "metrics.csv" not in html or (folder / "runs/notebook/metrics.csv").exists()
    assert float(shown(cells[3], "text/plain")) == recorded["metrics"]["test"]["accuracy"]


def test_a_cell_shows_bar_rows_and_curves_in_one_output_that_is_updated(executed: tuple[Path, list[Any]]) -> None:
    _, cells = executed
    (live,) = [output for output in cells[1].outputs if output.output_type == "display_data"]
    html = live["data"]["text/html"]
    assert '<progress value="152" max="152"' in html
    assert html.count("<svg") == 2
    assert html.count("<tr") == 1 + 8  # evaluations
    assert "epoch 8/8" in live["data"]["text/plain"]
    assert not any("epoch 2/8" in output.get("text", "") for output in cells[1].outputs)


def test_a_cell_that_is_run_again_trains_again_and_a_mistake_is_one_message(executed: tuple[Path, list[Any]]) -> None:
    folder, cells = executed
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["notebook", "notebook-2"]
    assert "'notebook-2'" in shown(cells[5], "text/plain")
    (error,) = [output for output in cells[6].outputs if output.output_type == "error"]
    assert len(error.traceback) == 2
    assert error.traceback[0].startswith("ConfigError: dict: optimizer.learning_rate: torch.optim.SGD has no argument")
    assert "duration=8ep" in error.traceback[1]
    assert (folder / "comparison.html").exists()


def test_in_a_notebook_only_a_completed_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = train(None, *QUICK)
    assert train(None, *QUICK).location == first.location  # a script's: the result again
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))
    assert train(None, *QUICK).location == f"{first.location}-2"
    stopped = train(None, *QUICK, "trainer.stop_at=1step")
    assert (stopped.location, stopped["step"]) == (f"{first.location}-3", 1)
    assert train(None, *QUICK, "optimizer.lr=0.1")["state"] == "completed"  # -3, resumed
    assert dist_train.result(f"{first.location}-3")["step"] == 2
    longer = train(None, *QUICK, "trainer.duration=3step")
    assert (longer.location, longer["step"]) == (first.location, 3)
    other = train(None, *QUICK, "optimizer.lr=0.05")
    assert other.location == f"{first.location}-4"
    with pytest.raises(ConfigError, match="holds no run"):
        dist_train.result(tmp_path / "none")


def test_the_package_offers_its_names() -> None:
    assert set(dir(dist_train)) >= {"train", "load", "result", "data", "models", "ConfigError"}
    assert all(getattr(dist_train, name) is not None for name in dist_train.__all__)
    assert "annotations" not in dir(dist_train)


def test_a_result_whose_run_is_gone_is_still_shown(tmp_path: Path) -> None:
    result = Result({"state": "completed", "reason": "<b>"}, str(tmp_path / "gone"))
    assert "&lt;b&gt;" in result._repr_html_()
    assert result == {"state": "completed", "reason": "<b>"}


def test_live_output_that_fails_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert notebook_live(Position(lambda: 0)) is None  # not a notebook
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    live = notebook_live(Position(lambda: 3, total=9))
    assert live is not None
    live.row(3, {"loss": 0.5}, Beside(1, {"loss": 0.6}))
    live.stop()
    assert [record.message[:15] for record in caplog.records] == ["no live output:"]


def test_what_was_last_is_not_shown_as_going_on_for_ever() -> None:
    live = NotebookLive(Position(lambda: 60, lambda: "saving", 60, 0))
    assert "saving" in live._content()["text/plain"]
    live.stop()
    assert "60/60" in (last := live._content())["text/plain"]
    assert "saving" not in str(last)


def test_the_best_that_is_marked_in_the_live_curve_is_the_trainer_s() -> None:
    """Whose metric says that less is better, which its name doesn't."""
    live = NotebookLive(Position(lambda: 3, total=3))
    for step, wrongs, best in ((1, 0.3, True), (2, 0.1, True), (3, 0.2, False)):
        live.row(step, {"loss": 0.5, "wrongs": wrongs}, Beside(step, {"loss": 1.0}, {}, "wrongs", best))
    curve = next(text for text in live._curves() if "wrongs" in text)
    assert re.findall(r"(0\.\d+) at (?:step )?(\d)", curve)[0] == ("0.1000", "2")


def test_a_long_training_shows_a_bounded_number_of_points_and_not_every_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = 0
    live = NotebookLive(Position(lambda: step, total=10_000))
    for _ in range(10):
        for _ in range(300):
            step += 1
            live.row(step, {"loss": 1 / step}, Beside(1, {"loss": 1.0}))
        live.stop()
    assert len(live._points) <= 2000
    assert {point["split"] for point in live._points} == {"train", "val"}
    assert capsys.readouterr().out.count("10,000") < 300  # outputs
