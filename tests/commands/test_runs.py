"""The table of runs, from records that are written here by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from runs import environment

from dist_train.main import main


def write_run(folder: Path, lr: float, figures: list[float], *, metric: str = "accuracy", **config: object) -> None:
    folder.mkdir(parents=True)
    whole = {"run": {"name": folder.name}, "metrics": [metric], "optimizer": {"lr": lr, "momentum": 0.9}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    then = (datetime.now(UTC) - timedelta(seconds=90)).isoformat()
    status = {"state": "completed", "step": 30, "epoch": 3, "updated_at": then, "error": None}
    (folder / "status.json").write_text(json.dumps(status))
    rows = [
        {"time": then, "step": 10 * k, "epoch": k, "samples": 10, "split": "val", "loss": 1.0, metric: value}
        for k, value in enumerate(figures, start=1)
    ]
    rows.append({"time": then, "step": 30, "epoch": 3, "samples": 10, "split": "train", "loss": 0.1, "lr": lr})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = [{"event": "start", "attempt": 0}, {"event": "end"}, {"event": "start", "attempt": 1}]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts) + '{"event": "sta')


def test_runs_with_their_best_their_age_and_where_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 0.1, [0.5, 0.75, 0.7])
    write_run(tmp_path / "sweep" / "b", 0.2, [8.0, 7.5, 9.0], metric="mae")
    write_run(tmp_path / "c", 0.1, [0.3, 0.2], checkpoint={"keep_best": "min val/loss"})
    (tmp_path / ".jobs").mkdir()
    (tmp_path / "notes.txt").touch()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    runs = {run["run"]: run for run in told["runs"]}
    assert list(runs) == ["a", "c", "sweep/b"]
    assert runs["a"]["best"] == {"metric": "val/accuracy", "value": 0.75, "step": 20}
    assert runs["sweep/b"]["best"] == {"metric": "val/mae", "value": 7.5, "step": 20}
    assert runs["c"]["best"] == {"metric": "val/loss", "value": 1.0, "step": 10}
    assert runs["a"]["starts"] == 2
    assert 90 <= runs["a"]["age_seconds"] < 600
    assert told["differences"] == {
        "metrics.0": {"a": "accuracy", "c": "accuracy", "sweep/b": "mae"},
        "optimizer.lr": {"a": "0.1", "c": "0.1", "sweep/b": "0.2"},
        "checkpoint.keep_best": {"a": "-", "c": "min val/loss", "sweep/b": "-"},
    }
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["run", "state"], ["a", "completed"]]
    assert "val/accuracy 0.7500 (step 20)" in lines[1]
    assert lines[-1].split() == ["sweep/b", "mae", "0.2", "-"]


def test_a_run_that_has_only_begun_is_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text("seed: 1\n")
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["x", "never", "started", "0", "0", "0"]


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "found no directory" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "holds no runs" in capsys.readouterr().out


def test_it_does_not_wait_for_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.1, [0.5])
    code = f"import sys; from dist_train.main import main; main(['runs', {os.fspath(tmp_path)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
