"""The logger: the record first, views in the background that may fail or hang without hurting the run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_train.tracking.logger import Logger, SinkThread
from dist_train.tracking.records import read_rows
from dist_train.views import sinks
from dist_train.views.sinks import open_logger


class Warnings(list[str]):
    def warn(self, text: str) -> None:
        self.append(text)


def make(root: Path, tensorboard: bool = True, **more: Any) -> tuple[Logger, Warnings]:
    said = Warnings()
    config = SimpleNamespace(tracking=SimpleNamespace(tensorboard=tensorboard, wandb=None))
    return open_logger(root, config, said, **more), said  # type: ignore[arg-type]


def scalars(root: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_reach_the_record_at_once_and_tensorboard_in_the_end(tmp_path: Path) -> None:
    log, said = make(tmp_path)
    log.row("train", 50, 1, 3200, {"loss": 0.5, "lr": 0.1})
    log.row("val", 50, 1, 3200, {"loss": 0.6, "accuracy": 0.9})
    assert [json.loads(line)["split"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        "train",
        "val",
    ]
    log.close("completed", timeout=60)
    assert said == []
    assert scalars(tmp_path, "train/loss") == [(50, 0.5)]
    assert scalars(tmp_path, "train/lr") == [(50, pytest.approx(0.1))]
    assert scalars(tmp_path, "val/accuracy") == [(50, pytest.approx(0.9))]


def test_a_resumed_run_has_every_step_once_in_record_and_tensorboard(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    for step in (10, 20, 30, 40):
        log.row("train", step, 1, step, {"loss": 1.0 * step})
    log.close("failed", timeout=60)
    log, said = make(tmp_path, start_step=20)
    for step in (30, 40, 50):
        log.row("train", step, 1, step, {"loss": 100.0 * step})
    log.close("completed", timeout=60)
    expected = [(10, 10.0), (20, 20.0), (30, 3000.0), (40, 4000.0), (50, 5000.0)]
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == expected
    assert scalars(tmp_path, "train/loss") == expected
    assert said == []


def test_tensorboard_takes_what_is_not_finite(tmp_path: Path) -> None:
    log, said = make(tmp_path)
    log.row("train", 1, 1, 64, {"loss": math.nan, "grad_norm": math.inf})
    log.close("failed", timeout=60)
    assert said == []
    assert math.isnan(scalars(tmp_path, "train/loss")[0][1])


def test_tensorboard_is_imported_before_the_steps_and_never_if_it_is_off(tmp_path: Path) -> None:
    program = Path(__file__).parent / "programs" / "logger_imports.py"
    command = [sys.executable, "-P", str(program), str(tmp_path)]  # -P: not forked from one that has imported torch
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.stdout.splitlines() == ["[]", "['tensorboard', 'torch']"], done.stderr


class Broken:
    def row(self, row: Any) -> None:
        raise RuntimeError("no space left on device")


def test_a_sink_that_raises_is_switched_off_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "TensorBoard", lambda *args: Broken())
    log, said = make(tmp_path)
    for step in range(1, 20):
        log.row("train", step, 1, step, {"loss": 1.0})
    log.close("completed")
    assert len(said) == 1
    assert "tensorboard" in said[0]
    assert "no space left on device" in said[0]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 19


def test_a_sink_that_cannot_be_made_is_switched_off_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log, said = make(tmp_path)
    for step in range(1, 5):
        log.row("train", step, 1, step, {"loss": 1.0})
        log.flush(wait=5)
    log.close("completed")
    assert len(said) == 1
    assert "tensorboard is switched off" in said[0]


def test_a_sink_that_hangs_costs_a_bounded_time_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    class Hanging:
        def row(self, row: Any) -> None:
            never.wait()

    monkeypatch.setattr(sinks, "TensorBoard", lambda *args: Hanging())
    log, said = make(tmp_path)
    log.row("train", 1, 1, 1, {"loss": 1.0})
    began = time.monotonic()
    log.flush(wait=0.3)
    log.close("completed", timeout=0.3)
    assert time.monotonic() - began < 2
    assert len(said) == 1
    assert "tensorboard" in said[0]
    assert "within" in said[0]
    never.set()


def test_a_sink_that_takes_nothing_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.tracking.logger.BACKLOG", 100)
    monkeypatch.setattr("dist_train.tracking.logger.STUCK", 0.05)
    never = threading.Event()
    said: list[str] = []
    thread = SinkThread("wandb", lambda: never.wait() and None, said.append)
    for _ in range(400):
        thread.put("row", {})
        time.sleep(0.002)
    assert len(said) == 1
    assert "wandb" in said[0]
    assert "has accepted nothing" in said[0]
    assert len(thread._queue) < 200
    never.set()


def test_one_hanging_sink_does_not_hold_up_another() -> None:
    never, got = threading.Event(), []
    hanging = SinkThread("wandb", lambda: never.wait() and None, [].append)
    working = SinkThread("tensorboard", lambda: SimpleNamespace(row=got.append, close=lambda outcome: None), [].append)
    for thread in (hanging, working):
        thread.put("row", 1)
    working.close("completed", timeout=5)
    assert got == [1]
    never.set()


def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    log, _ = make(tmp_path, tensorboard=False)
    log._file.close()  # type: ignore[union-attr]
    with pytest.raises((OSError, ValueError)):
        log.row("train", 1, 1, 1, {"loss": 1.0})


def test_other_ranks_have_a_logger_that_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = Logger()
    log.row("train", 1, 1, 1, {"loss": 1.0})
    log.image("inputs", 0, np.zeros((2, 2)))
    log.flush()
    log.close("completed")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_cannot_be_traced_is_reported_and_the_rest_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Strange(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            raise RuntimeError("not today")

    log, said = make(tmp_path)
    log.graph(Strange(), torch.zeros(1, 4))
    log.row("train", 1, 1, 1, {"loss": 1.0})
    log.close("completed", timeout=60)
    assert said == []
    assert "TensorBoard has no graph, torch.jit.trace failed: RuntimeError: not today" in caplog.text
    assert capsys.readouterr() == ("", "")
    assert scalars(tmp_path, "train/loss") == [(1, 1.0)]


def test_pictures_histograms_and_graph_are_read_back_by_tensorboard(tmp_path: Path) -> None:
    log, said = make(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
    log.graph(model, torch.zeros(1, 4))
    log.image("inputs", 0, np.zeros((8, 6, 3), np.uint8))
    log.image("features/conv", 5, np.ones((16, 12), np.float32))
    log.histogram("weights/0", 5, np.arange(10.0))
    log.histogram("weights/0", 6, np.array([1.0, math.nan]))
    log.histogram("weights/0", 7, np.array([]))
    log.close("completed", timeout=60)
    assert said == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.height, e.width) for e in events.Images("inputs")] == [(0, 8, 6)]
    assert [(e.step, e.height, e.width) for e in events.Images("features/conv")] == [(5, 16, 12)]
    assert [(e.step, e.histogram_value.num) for e in events.Histograms("weights/0")] == [(5, 10.0)]
    assert events.Tags()["graph"]
