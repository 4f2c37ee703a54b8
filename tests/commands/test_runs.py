"""The table of runs, from records that are written here by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from runs import environment

from dist_train.main import main
from dist_train.runtime.lease import Lease
from dist_train.runtime.storage import Storage, open_storage


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def write_run(
    place: Path | Storage,
    lr: float,
    values: list[float],
    *,
    metric: str = "accuracy",
    state: str = "completed",
    **config: object,
) -> Storage:
    run = place if isinstance(place, Storage) else open_storage(place)
    name = run.location.rpartition("/")[2]
    whole = {"run": {"name": name}, "metrics": [metric], "optimizer": {"lr": lr, "momentum": 0.9}, **config}
    status = {"state": state, "step": 30, "epoch": 3, "updated_at": ago(90), "error": None}
    rows = [
        {"time": ago(95), "step": 10 * k, "epoch": k, "samples": 10, "split": "val", "loss": 1.0, metric: value}
        for k, value in enumerate(values, start=1)
    ]
    last = {"step": 31, "epoch": 3, "samples": 10, "split": "train", "loss": 0.1, "lr": lr, "samples_per_s": 1234.5}
    rows.append({"time": ago(92), **last})
    starts = [{"event": "start", "attempt": 0}, {"event": "end", "cause": "SIGTERM"}, {"event": "start", "attempt": 1}]
    files = {
        "config.yaml": yaml.safe_dump(whole),
        "status.json": json.dumps(status),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "attempts.jsonl": "".join(json.dumps(row) + "\n" for row in starts) + '{"event": "sta',
    }
    run.makedirs()
    for file, text in files.items():
        run.write_atomic(file, text.encode())
    return run


def listed(capsys: pytest.CaptureFixture[str], place: object) -> dict[str, dict[str, object]]:
    assert main(["runs", str(place), "--json"]) == 0
    return {run["run"]: run for run in json.loads(capsys.readouterr().out)["runs"]}


def test_runs_are_listed_with_their_state_and_the_keys_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 0.1, [0.5, 0.75, 0.7])
    write_run(tmp_path / "sweep" / "b" / "seed" / "1", 0.2, [8.0, 7.5, 9.0], metric="mae")
    write_run(tmp_path / "c", 0.1, [0.3, 0.2], checkpoint={"keep_best": "min val/loss"})
    (tmp_path / ".jobs").mkdir()
    (tmp_path / "notes.txt").touch()
    assert main(["new", str(tmp_path / "project")]) == 0  # its config.yaml makes it no run
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    runs = {run["run"]: run for run in page["runs"]}
    assert list(runs) == ["a", "c", "sweep/b/seed/1"]
    assert runs["sweep/b/seed/1"]["best"] == {"metric": "val/mae", "value": 7.5, "step": 20}
    assert runs["c"]["best"] == {"metric": "val/loss", "value": 1.0, "step": 10}
    age = runs["a"].pop("age_seconds")
    assert 90 <= age < 600
    assert runs["a"] == {
        "run": "a", "state": "completed", "step": 31, "epoch": 3, "best": {"metric": "val/accuracy", "value": 0.75, "step": 20},
        "samples_per_s": 1234.5, "attempts": 2, "reason": "SIGTERM",
    }  # fmt: skip
    assert page["differences"] == {
        "metrics.0": {"a": "accuracy", "c": "accuracy", "sweep/b/seed/1": "mae"},
        "optimizer.lr": {"a": "0.1", "c": "0.1", "sweep/b/seed/1": "0.2"},
        "checkpoint.keep_best": {"a": "-", "c": "min val/loss", "sweep/b/seed/1": "-"},
    }
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "epoch", "best", "samples/s", "age", "attempts", "reason"]
    assert lines[1].split()[:4] == ["a", "completed", "31", "3"]
    assert "val/accuracy 0.7500 (step 20)" in lines[1]
    assert lines[-1].split() == ["sweep/b/seed/1", "mae", "0.2", "-"]


def test_runs_below_a_url_are_listed_too(s3_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    root = open_storage("s3://bucket/listed")
    write_run(root.sub("a"), 0.1, [0.5])
    write_run(root.sub("sweep/b"), 0.2, [0.6])
    runs = listed(capsys, "s3://bucket/listed/")
    assert [(name, run["state"], run["attempts"]) for name, run in runs.items()] == [
        ("a", "completed", 2), ("sweep/b", "completed", 2),
    ]  # fmt: skip
    assert list(listed(capsys, "s3://bucket/listed/sweep/b")) == ["b"]


def test_a_run_whose_process_is_gone_is_not_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        name: write_run(tmp_path / name, 0.1, [0.5], state="running") for name in ("here", "gone", "near", "silent")
    }
    imports = "import os, sys; from dist_train.runtime.lease import Lease; from dist_train.runtime.storage import open_storage"
    take = f"{imports}; Lease.acquire(open_storage(sys.argv[1])); os._exit(0)"
    subprocess.run([sys.executable, "-c", take, str(tmp_path / "gone")], env=environment(), check=True)
    for name, silent in (("near", 5), ("silent", 100)):
        owner = {"host": name, "machine": "another", "pid": 1, "acquired_at": ago(1000), "interval": 10.0}
        runs[name].write_atomic(".lease/00000001.json", json.dumps({**owner, "renewed_at": ago(silent)}).encode())
    with Lease.acquire(runs["here"]):
        found = listed(capsys, tmp_path)
    assert {name: run["state"] for name, run in found.items()} == {
        "gone": "dead", "here": "running", "near": "running", "silent": "dead",
    }  # fmt: skip
    assert 5 <= found["near"]["age_seconds"] < 60  # type: ignore[operator]
    assert 90 <= found["silent"]["age_seconds"] < 600  # type: ignore[operator]
    assert "killed, or its host went down" in str(found["gone"]["reason"])
    assert listed(capsys, tmp_path)["here"]["state"] == "dead"  # released, and its status says nothing else


def test_a_run_that_has_only_begun_is_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lease.acquire(open_storage(tmp_path / "x")):
        assert listed(capsys, tmp_path)["x"]["state"] == "starting"
    assert listed(capsys, tmp_path)["x"]["state"] == "never started"


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "good", 0.1, [0.5])
    write_run(tmp_path / "bad", 0.1, [0.5]).write_atomic("config.yaml", b"a: [")
    found = listed(capsys, tmp_path)
    assert [found[name]["state"] for name in ("bad", "good")] == ["unreadable", "completed"]
    assert main(["runs", str(tmp_path)]) == 0


@pytest.mark.parametrize("file", ["config.yaml", "status.json", "attempts.jsonl", "metrics.jsonl"])
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    for name, garbage in {"binary": bytes(range(256)), "a list": b"[1, 2]\n", "a number": b"7\n"}.items():
        write_run(tmp_path / name, 0.1, [0.5]).write_atomic(file, garbage)
    write_run(tmp_path / "fifo", 0.1, [0.5]).delete(file)
    os.mkfifo(tmp_path / "fifo" / file)
    for name, run in listed(capsys, tmp_path).items():
        assert file in str(run["reason"]), name
        assert run["epoch"] == (0 if file == "status.json" else 3)


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "found no directory" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "holds no runs" in capsys.readouterr().out


def test_watching_shows_what_changes_until_it_is_interrupted_and_never_waits_for_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 0.1, [0.5])
    code = "import sys; from dist_train.main import main; main(['runs', sys.argv[1], '--watch']); print('torch' in sys.modules)"
    command = [sys.executable, "-P", "-u", "-c", code, str(tmp_path)]  # -P: not forked from one that has imported torch
    watching = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    limit = threading.Timer(60, watching.kill)  # its output ends then, and the test fails
    limit.start()
    lines = iter(watching.stdout)
    assert next(line for line in lines if line.startswith("a ")).split()[1] == "completed"
    status = {"state": "failed", "step": 40, "epoch": 4, "error": "out of memory"}
    run.write_atomic("status.json", json.dumps(status).encode())
    changed = next(line for line in lines if line.startswith("a ") and "failed" in line)
    assert changed.split()[2] == "40"
    assert changed.endswith("out of memory\n")
    watching.send_signal(signal.SIGINT)
    assert list(lines)[-1] == "False\n"
    assert watching.wait(timeout=30) == 0
    limit.cancel()
