"""Weights & Biases: every step once over restarts and kills; whatever goes wrong costs one warning."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from dist_train.config.schema_tracking import WandbConfig
from dist_train.tracking.logger import Logger
from dist_train.tracking.records import read_rows
from dist_train.views import wandb_run
from dist_train.views.sinks import open_logger

PROGRAM = Path(__file__).parent / "programs" / "wandb_steps.py"


def train(root: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), str(root), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def files(root: Path) -> list[Path]:
    return sorted(root.glob("wandb/offline-run-*/run-*.wandb"))


def wait_until_finished(root: Path, count: int, seconds: float = 60.0) -> None:
    """Waits until `count` wandb runs have written their last record."""
    end = time.monotonic() + seconds
    while sum(bool(summaries(path).get("outcome")) for path in files(root)) < count:
        assert time.monotonic() < end, [summaries(path) for path in files(root)]
        time.sleep(0.2)


def summaries(path: Path) -> dict[str, str]:
    """The summary's last values, by a search in the raw records (a reader apart from the one in the product)."""
    data, out = path.read_bytes(), {}
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0 or at + 7 + length > len(data):
            break
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            out |= {item.key: item.value_json for item in record.summary.update}
            if record.WhichOneof("record_type") == "run":
                out |= {f"config.{item.key}": item.value_json for item in record.run.config.update}
    return out


def points(root: Path, name: str) -> list[int]:
    rows = [row for path in files(root) for row in wandb_run.read_offline(path)]
    return [row["global_step"] for row in rows if name in row]


def test_every_step_is_logged_once_over_a_restart(tmp_path: Path) -> None:
    assert train(tmp_path, 0, 12, "preempted").stderr == ""
    assert train(tmp_path, 10, 20, "completed").stderr == ""
    assert len(files(tmp_path)) == 2
    assert points(tmp_path, "train/loss") == list(range(1, 21))
    assert points(tmp_path, "val/accuracy") == [5, 10, 15, 20]
    first, second = (summaries(path) for path in files(tmp_path))
    assert (first["outcome"], second["outcome"]) == ('"preempted"', '"completed"')
    assert json.loads(second["config.optimizer"]) == {"lr": 0.1}
    assert len({path.name for path in files(tmp_path)}) == 1  # one run id
    assert (tmp_path / "wandb" / "run_id").read_text() in files(tmp_path)[0].name


def test_a_run_that_is_killed_loses_no_point_and_doubles_none(tmp_path: Path) -> None:
    assert train(tmp_path, 0, 12, "kill", 3.0).returncode == -signal.SIGKILL
    assert train(tmp_path, 5, 20, "completed").stderr == ""  # at once: the first one's child is still writing
    wait_until_finished(tmp_path, 2)
    assert summaries(files(tmp_path)[0])["outcome"] == '"killed"'
    assert sorted(points(tmp_path, "train/loss")) == list(range(1, 21))
    assert sorted(points(tmp_path, "val/accuracy")) == [5, 10, 15, 20]


def test_points_that_never_reached_wandb_come_from_the_record(tmp_path: Path) -> None:
    assert train(tmp_path, 0, 12, "kill", 0.0).returncode == -signal.SIGKILL  # before wandb was even imported
    assert train(tmp_path, 12, 15, "completed").stderr == ""
    time.sleep(1)
    rows = {row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if row["split"] == "train"}
    assert rows == set(range(1, 16))
    assert set(points(tmp_path, "train/loss")) == rows


def logger(root: Path, wandb: dict[str, Any] | None) -> tuple[Logger, list[str]]:
    said: list[str] = []
    settings = WandbConfig(**wandb) if wandb is not None else None
    config = SimpleNamespace(tracking=SimpleNamespace(tensorboard=False, wandb=settings), to_dict=dict)
    return open_logger(root, config, SimpleNamespace(warn=said.append, note=said.append)), said  # type: ignore[arg-type]


def test_a_wandb_that_is_not_logged_in_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    log, said = logger(tmp_path, {"project": "p", "mode": "online"})
    for step in range(1, 4):
        log.row("train", step, 1, step, {"loss": 1.0})
    log.close("completed", timeout=60)
    assert len(said) == 1
    assert "wandb is switched off" in said[0]
    assert "wandb login" in said[0]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_a_wandb_server_that_never_answers_costs_one_warning_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        log, said = logger(tmp_path, {"project": "p", "mode": "online"})
        log.row("train", 1, 1, 1, {"loss": 1.0})
        began = time.monotonic()
        log.close("completed", timeout=2.0)
        assert time.monotonic() - began < 4
    assert len(said) == 1
    assert "it did not end within 2 s" in said[0]
    child = log._sinks[0]._sink._child  # type: ignore[union-attr]
    assert child.wait(timeout=5) == -signal.SIGKILL


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    for wandb in (None, {"project": "p", "mode": "disabled"}):
        log, said = logger(tmp_path, wandb)
        log.row("train", 1, 1, 1, {"loss": 1.0})
        log.close("completed")
        assert said == []
        assert log._sinks == []
    assert not (tmp_path / "wandb").exists()


def test_a_child_that_dies_costs_one_warning(tmp_path: Path) -> None:
    log, said = logger(tmp_path, {"project": "p", "mode": "offline"})
    log.row("train", 1, 1, 1, {"loss": 1.0})
    log.flush(wait=10)
    os.kill(log._sinks[0]._sink._child.pid, signal.SIGKILL)  # type: ignore[union-attr]
    time.sleep(0.3)
    log.row("train", 2, 1, 2, {"loss": 1.0})
    log.close("completed", timeout=20)
    assert len(said) == 1
    assert "wandb's process ended with code -9" in said[0]
