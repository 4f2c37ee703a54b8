"""The table of runs, from records that are written here by hand."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from math import nan
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import environment

from dist_train.checkpoint.store import ranking_key
from dist_train.files import StorageError
from dist_train.listing.entries import entries_of
from dist_train.listing.runs import best_of, find_runs, read_run
from dist_train.listing.table import lines_of
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
        "metrics": {"val/loss": 1.0, "val/accuracy": 0.75, "train/loss": 0.1},
    }  # fmt: skip
    assert page["differences"] == {
        "metrics.0": {"a": "accuracy", "c": "accuracy", "sweep/b/seed/1": "mae"},
        "optimizer.lr": {"a": "0.1", "c": "0.1", "sweep/b/seed/1": "0.2"},
        "checkpoint.keep_best": {"a": "-", "c": "min val/loss", "sweep/b/seed/1": "-"},
    }
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = ["metrics", "optimizer.lr", "checkpoint.keep_best"]
    head = ["run", "state", "step", "best", "val/loss", *keys, "epoch", "samples/s", "age", "attempts", "reason"]
    assert sorted(lines[0].split()) == sorted(head)
    assert lines[1].split()[:5] == ["a", "completed", "31", "val/accuracy", "0.7500"]
    assert len(lines) == 4


def test_of_equal_metrics_the_one_with_the_lower_loss_is_the_best_as_for_the_weights_that_are_kept() -> None:
    losses = {10: 0.3, 20: 0.1, 30: nan, 40: 0.1}
    ranked = [
        (ranking_key({"val/accuracy": 0.97, "val/loss": loss}, "val/accuracy", "max"), step)
        for step, loss in losses.items()
    ]
    rows = [{"step": step, "accuracy": 0.97, "loss": loss if loss == loss else None} for step, loss in losses.items()]
    assert best_of(rows, {}) == {"metric": "val/accuracy", "value": 0.97, "step": min(ranked)[1]}
    assert min(ranked)[1] == 20


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


def sweep(folder: Path) -> Path:
    """Two learning rates with three seeds each, of which one is not completed, and one more with another config."""
    for lr, values in ((0.1, [0.7, 0.8, 0.1]), (0.3, [0.6, 0.9, 0.75])):
        for seed, value in enumerate(values):
            state = "failed" if value == 0.1 else "completed"
            write_run(folder / f"lr{lr}-s{seed}", lr, [0.05, value], state=state, seed=seed)
    write_run(folder / "other", 0.3, [0.5], seed=0, model={"hidden": [64, 64], "name": "x" * 300}, loss={"name": "y"})
    return folder


def order(capsys: pytest.CaptureFixture[str], place: Path, *options: str) -> list[str]:
    assert main(["runs", str(place), "--json", *options]) == 0
    return [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]]


def test_runs_are_sorted_and_filtered_by_states_metrics_and_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = sweep(tmp_path)
    best = ["lr0.3-s1", "lr0.1-s1", "lr0.3-s2", "lr0.1-s0", "lr0.3-s0", "other", "lr0.1-s2"]
    assert order(capsys, place, "--sort", "best") == order(capsys, place, "--sort", "accuracy") == best
    assert order(capsys, place, "--sort", "val/accuracy", "--reverse") == best[::-1]
    assert order(capsys, place, "--sort", "lr", "--where", "seed=0") == ["lr0.1-s0", "lr0.3-s0", "other"]
    assert order(capsys, place, "--sort", "model.name")[0] == "other"  # what has no value comes last
    assert order(capsys, place, "--where", "optimizer.lr > 0.2", "--where", "run!=other", "--where", "val/accuracy>=0.75") == [
        "lr0.3-s1", "lr0.3-s2",
    ]  # fmt: skip
    assert order(capsys, place, "--where", "state=failed") == ["lr0.1-s2"]
    assert order(capsys, place, "--where", "run=lr0.1-*", "--where", "state!=failed") == ["lr0.1-s0", "lr0.1-s1"]
    assert main(["runs", str(place), "--where", "lr>1"]) == 0
    assert "holds no runs with lr>1" in capsys.readouterr().out
    start = {"event": "start", "attempt": 2, "better": {"accuracy": "min"}}  # as the metric's `higher_is_better` says
    for run in place.iterdir():
        (run / "attempts.jsonl").write_text(json.dumps(start) + "\n")
    assert order(capsys, place, "--sort", "best")[:2] == ["lr0.1-s0", "lr0.1-s1"], (
        "0.05 is the best of their two evaluations"
    )
    assert order(capsys, place, "--sort", "best")[-1] == "other"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "optimiser.lr>1"], "did you mean optimizer.lr?"),
        (["--where", "loss"], "expected NAME=VALUE"),
        (["--where", "state>3"], "= and != compare text"),
        (["--where", "lr>fast"], "compares numbers, found 'fast'"),
        (["--sort", "speed"], "no run has 'speed'"),
        (["--columns", "lr,hiden"], "no run has 'hiden'"),
        (["--where", "name=x"], "name may be any of run.name, loss.name, model.name"),
        (["--html", "runs.html", "--watch"], "neither --watch nor --json"),
        (["--html", "s3://bucket/runs.html"], "a URL"),
    ],
)
def test_what_cannot_be_asked_of_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["runs", str(sweep(tmp_path)), *options]) == 2
    assert message in capsys.readouterr().err


def test_seeds_are_one_line_with_mean_and_deviation_of_the_completed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = sweep(tmp_path)
    assert main(["runs", str(place), "--seeds", "--sort", "best", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["seeds"]
    assert [(group["run"], group["n"], group["state"]) for group in groups] == [
        ("lr0.1-s*", "2 of 3", "2 completed, 1 failed"), ("lr0.3-s*", "3", "completed"), ("other", "1", "completed"),
    ]  # fmt: skip
    found = [group["metrics"]["val/accuracy"] for group in groups]
    assert [one["mean"] for one in found] == pytest.approx([0.75, 0.75, 0.5])
    assert [one["std"] for one in found[:2]] == pytest.approx(
        [np.std([0.7, 0.8], ddof=1), np.std([0.6, 0.9, 0.75], ddof=1)]
    )
    assert found[2]["std"] is None
    write_run(place / "lr0.3-s3", 0.3, [float("nan")], seed=3)  # it has diverged: no mean of the others
    assert main(["runs", str(place), "--seeds", "--where", "lr=0.3", "--where", "run=lr*", "--json"]) == 0
    [group] = json.loads(capsys.readouterr().out)["seeds"]
    assert (group["n"], group["metrics"]["val/accuracy"]) == ("4", {"mean": None, "std": None})
    write_run(
        place / "lr0.3-s3", 0.3, [0.75], seed=2
    )  # once more: it would count twice, and make the deviation smaller
    assert main(["runs", str(place), "--seeds", "--where", "lr=0.3", "--where", "run=lr*", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["seeds"]
    assert [(one["runs"], one["n"]) for one in again] == [
        (["lr0.3-s0", "lr0.3-s1", "lr0.3-s2"], "3"),
        (["lr0.3-s3"], "1"),
    ]
    shutil.rmtree(place / "lr0.3-s3")
    assert main(["runs", str(place), "--seeds", "--columns", "n,accuracy,seed"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        ["run", "n", "val/accuracy", "seed"], ["lr0.1-s*", "2", "of", "3", "0.7500", "\u00b10.0707", "*", "-"],
        ["lr0.3-s*", "3", "0.7500", "\u00b10.1500", "*", "-"],
    ]  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_the_table_fits_the_terminal_and_names_what_it_leaves_out(tmp_path: Path, width: int) -> None:
    place = sweep(tmp_path)
    write_run(place / ("long-" * 12), 0.1, [0.2], seed=9)
    root = open_storage(place)
    entries = entries_of([read_run(root, name) for name in find_runs(root)])
    lines = lines_of(entries, [], width)
    assert max(map(len, lines)) <= width
    assert any("0.9000 *" in line for line in lines[1:]) == (width > 20)
    assert ("seed" in lines[0].split()) == (width > 40)
    assert any(line.startswith("not shown: ") for line in lines) == (width < 200)
    everything = lines_of(entries, [], None)
    assert not any("not shown" in line for line in everything)
    assert [line.split()[0] for line in everything[1:9]] == [entry.facts["run"] for entry in entries]
    chosen = lines_of(entries, ["lr", "age"], width)
    assert chosen[0].split()[:2] in (["run", "lr"], ["run", "optimizer.lr"]) or width < 40


def test_values_that_no_terminal_should_get_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a,b <i>", 0.1, [0.5, float("nan")], note="red \x1b[31m\nnext")
    write_run(tmp_path / "c", 0.1, [float("nan")], note={"deep": [1, None, True]})
    status = {"state": "failed", "step": 1, "epoch": 0, "error": "\x1b[2J boom\nsecond line"}
    run.write_atomic("status.json", json.dumps(status).encode())
    assert main(["runs", str(tmp_path), "--sort", "best", "--columns", "best,note,reason"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert "\x1b" not in out
    assert "red \\x1b[31m next" in out
    assert out.splitlines()[2].split()[:2] == ["c", "-"]


def test_the_page_sorts_and_overlays_without_network_or_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = sweep(tmp_path / "runs")
    for k in range(4):
        write_run(place / f"<b>&{k}", 0.1, [0.4], state="failed", seed=k)
    page = tmp_path / "runs.html"
    assert main(["runs", str(place), "--sort", "best", "--html", str(page)]) == 0
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "<b>&" not in text
    assert text.count('type="checkbox" checked data-run') == 8
    body = text.partition("<tbody>")[2].partition("</tbody>")[0]
    assert [row.partition("> ")[2].partition("<")[0] for row in body.split("<tr>")[1:3]] == ["lr0.3-s1", "lr0.1-s1"]
    assert body.count('class="best"') >= 1
    assert main(["runs", str(place), "--seeds", "--html", str(page)]) == 0
    assert "lr0.3-s*" in page.read_text()
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none"), "--html", str(page)]) == 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_chromium_sorts_the_page_and_shows_the_curves_that_are_chosen(tmp_path: Path) -> None:
    page = tmp_path / "runs.html"
    assert main(["runs", str(sweep(tmp_path / "runs")), "--html", str(page)]) == 0
    act = """<script>
    const rows = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent.trim());
    const head = [...document.querySelectorAll("th")].find(head => head.textContent === "val/accuracy");
    head.click(); const up = rows(); head.click(); const down = rows();
    const box = document.querySelector("input[data-run='other']"); box.click();
    const drawn = [...document.querySelector(".chart").querySelectorAll("svg .line, .key")];
    const hidden = drawn.filter(el => el.style.display === "none");
    document.title = JSON.stringify({up, down, hidden: hidden.length, all: document.querySelector("#all").checked});
    </script>"""
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')  # it forbids the script of this test
    page.write_text(policy.sub("", page.read_text()).replace("</body>", act + "</body>"))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/c", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0]))
    assert found["up"] == found["down"][::-1]
    assert found["down"][0] == "lr0.3-s1"
    assert (found["hidden"], found["all"]) == (2, False)


def test_a_store_that_fails_is_named_without_the_report_of_a_crashed_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise StorageError("cannot list s3://bucket/runs: NoCredentialsError\x1b")

    monkeypatch.setattr("dist_train.commands.runs._chosen", fails)
    assert main(["runs", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: cannot list s3://bucket/runs: NoCredentialsError\\x1b\n"
