"""`trainer.profile`: the trace of a real run is read back as JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.utils.data import TensorDataset

from dist_train import train


class Points(TensorDataset):
    """60 points of 4 numbers in three classes: 10 steps an epoch."""

    def __init__(self) -> None:
        super().__init__(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)


def start(folder: Path, *overrides: str) -> dict[str, Any]:
    config = {
        "run": {"name": "a", "dir": str(folder)},
        "data": {"train": {"_target_": f"{__name__}.Points"}, "global_batch_size": 6, "num_workers": 0},
        "model": {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "9step"},
        "tracking": {"tensorboard": False, "report": False},
        "distributed": {"device": "cpu"},
    }
    return train(config, *overrides)


def traces(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The complete events of each trace, by its file's name."""
    found = {}
    for path in sorted((folder / "a/profile").glob("*")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name] = [event for event in events if event.get("ph") == "X"]
    return found


def steps_of(events: list[dict[str, Any]]) -> list[str]:
    return sorted({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})


def test_a_trace_has_the_named_steps_with_their_operators_and_no_bit_depends_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = start(tmp_path, "trainer.profile.steps=[3, 5]")
    ((name, events),) = traces(tmp_path).items()
    assert name == "rank-0-steps-3-5.pt.trace.json.gz"
    assert str(tmp_path / "a/profile" / name) in capsys.readouterr().out.replace("\n", "")
    assert steps_of(events) == ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]
    marks = [
        event for event in events if event["name"].startswith("ProfilerStep#") and event["cat"] == "user_annotation"
    ]
    products = [event for event in events if event["name"] == "aten::addmm"]  # the model's own layer, once a step
    inside = [[m["ts"] <= p["ts"] < m["ts"] + m["dur"] for p in products].count(True) for m in marks]
    assert inside == [1, 1, 1]
    plain = start(tmp_path / "plain")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start(tmp_path, "run.dir=memory://profiled", "trainer.profile.steps=[3, 5]", "trainer.duration=6step")
    with fsspec.open(f"memory://profiled/a/profile/{name}") as stored:
        assert steps_of(json.loads(gzip.decompress(stored.read()))["traceEvents"]) == steps_of(events)
    assert traced["weights_sha256"] == plain["weights_sha256"]


def test_a_start_inside_the_range_traces_the_rest_and_a_range_that_is_not_reached_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "trainer.profile.steps=[3, 6]"
    start(tmp_path, steps, "trainer.stop_at=4step")
    start(tmp_path, steps)
    assert [steps_of(events) for events in traces(tmp_path).values()] == [
        ["ProfilerStep#3", "ProfilerStep#4"],
        ["ProfilerStep#5", "ProfilerStep#6"],
    ]
    capsys.readouterr()
    start(tmp_path, steps, "trainer.duration=11step")
    assert "steps 3 to 6 are over, this start resumes after step 9" in capsys.readouterr().err
    start(tmp_path, "trainer.profile.steps=[40, 41]", "trainer.duration=12step")
    assert "steps 40 to 41 are never reached, the run ends at step 12" in capsys.readouterr().err
    start(tmp_path, "trainer.profile.steps=[14, 15]", "trainer.duration=20step", "trainer.stop_at=13step")
    assert "training ended at step 13, before step 14" in capsys.readouterr().err
    assert len(traces(tmp_path)) == 2
