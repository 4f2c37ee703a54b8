"""What a run promises of its clock, its rows and its checkpoints, and of what is changed between two starts."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import result, rows
from torch import nn
from torch.utils.data import TensorDataset

from dist_train import train
from dist_train.callbacks import Callback
from dist_train.config.errors import ConfigError
from dist_train.data.plan import Plan
from dist_train.training import trainer as engine_trainer
from dist_train.watch import control

INPUTS = torch.randn(45, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(45) % 3
BATCH = 7
STEPS = 7  # of an epoch, whose last one has 3 samples


class Points(TensorDataset):
    """45 points; or as many as there are by now."""

    there = 45

    def __init__(self) -> None:
        super().__init__(INPUTS[: self.there], LABELS[: self.there])


def start(folder: Path, *overrides: str, **changed: Any) -> dict[str, Any]:
    """Some steps of a linear model, over all samples of each epoch."""
    parts: dict[str, Any] = {
        "run": {"name": "a", "dir": str(folder)},
        "data": {"train": {"_target_": f"{__name__}.Points"}, "global_batch_size": BATCH, "drop_last": False},
        "model": {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.5},
        "trainer": {"duration": "10step", "log_every": "1step"},
        "tracking": {"tensorboard": False, "report": False},
        "distributed": {"device": "cpu"},
    }
    return train({**parts, **changed}, "data.num_workers=0", *overrides)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_without_a_schedule_consented_values_are_those_of_the_next_update(tmp_path: Path, kind: str) -> None:
    """Of the group with options of its own too; what it was saved with would come back with its state."""
    options: dict[str, dict[str, Any]] = {
        "SGD": {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.0},
        "AdamW": {"lr": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.0},
    }
    later: dict[str, dict[str, Any]] = {
        "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2},
        "AdamW": {"lr": 0.1, "betas": [0.5, 0.9], "weight_decay": 0.3},
    }
    groups = [{"match": "bias", "weight_decay": 0.1}], [{"match": "bias", "weight_decay": 0.4}]
    target = {"_target_": f"torch.optim.{kind}"}
    start(tmp_path, "trainer.stop_at=6step", optimizer={**target, **options[kind], "groups": groups[0]})
    changed = {**target, **later[kind], "groups": groups[1]}
    start(tmp_path, "checkpoint.accept_changes=true", scheduler=None, optimizer=changed)

    torch.manual_seed(0)
    net, plan = nn.Linear(4, 3), Plan(0, 45, BATCH, drop_last=False)
    optimizer = getattr(torch.optim, kind)([{"params": [net.weight]}, {"params": [net.bias]}], **options[kind])
    optimizer.param_groups[1].update(weight_decay=0.1)
    for step in range(10):
        if step == 6:
            for group, decay in zip(optimizer.param_groups, (later[kind]["weight_decay"], 0.4), strict=True):
                group.update({**later[kind], "weight_decay": decay})
        index = plan.batch(step).copy()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(INPUTS[index]), LABELS[index]).backward()
        optimizer.step()
    got = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    torch.testing.assert_close(got, dict(net.state_dict()), rtol=1e-5, atol=1e-6)
    assert [row["lr"] for row in rows(tmp_path / "a")] == [options[kind]["lr"]] * 6 + [later[kind]["lr"]] * 4


class Second(Callback):
    """A second passes with each step, on a clock that nothing else moves."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def on_step_end(self, trainer: Any) -> None:
        self.clock[0] += 1.0
        time.sleep(0.05)  # for the control thread, which looks every 10 ms


def test_a_second_start_trains_what_is_left_of_a_duration_and_the_clock_saves_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    fake = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(engine_trainer, "time", fake)
    monkeypatch.setattr(control, "POLL_SECONDS", 0.01)
    data = {"train": TensorDataset(INPUTS, LABELS), "global_batch_size": 1, "drop_last": False}
    options = ("trainer.duration=20s", "checkpoint.every=[1s]", "checkpoint.keep_last=99", "trainer.log_every=4s")
    pieces: dict[str, Any] = {"data": data, "callbacks": [Second(clock)], "checkpoint": {}, "trainer": {}}
    first = start(tmp_path, *options, "trainer.stop_at=12s", **pieces)
    clock[0] += 1000.0  # what lies between two starts isn't training
    done = start(tmp_path, *options, **pieces)
    assert 12 <= first["step"] <= 15
    assert 20 <= done["step"] <= 24
    assert 20 <= done["seconds"] <= 24
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "a" / "checkpoints").glob("step-*"))
    assert max(saved) < 45, "an epoch"
    assert len(saved) > 8
    assert rows(tmp_path / "a")[0]["step"] in (4, 5, 6, 7)


class Counts(Callback):
    """Has seen so many steps, over all starts."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, trainer: Any) -> None:
        self.steps += 1
        trainer.log("steps", self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_a_rows_loss_times_its_samples_is_what_the_steps_since_the_row_before_come_to(tmp_path: Path) -> None:
    """Also over a stop in the middle of an interval, and where an epoch's last step is smaller; callbacks count on, too."""
    counts = [{"_target_": f"{__name__}.Counts"}]
    start(tmp_path / "each", callbacks=counts)
    start(tmp_path / "some", "trainer.stop_at=6step", "trainer.log_every=4step", callbacks=counts)
    start(tmp_path / "some", "trainer.log_every=4step", callbacks=counts)
    each, some = rows(tmp_path / "each" / "a"), rows(tmp_path / "some" / "a")
    sizes = [len(Plan(0, 45, BATCH, drop_last=False).batch(step)) for step in range(10)]
    assert sizes[6] == 3
    assert [row["samples"] for row in each] == [sum(sizes[: step + 1]) for step in range(10)]
    assert [(row["step"], row["samples"]) for row in some] == [(4, 28), (8, sum(sizes[:8])), (10, sum(sizes))]
    assert all(row["steps"] == row["step"] for row in each + some)
    sums = [row["loss"] * size for row, size in zip(each, sizes, strict=True)]
    for row, begin in zip(some, (0, 4, 8), strict=True):
        steps = slice(begin, row["step"])
        assert row["loss"] * sum(sizes[steps]) == pytest.approx(sum(sums[steps]), rel=1e-6)
    assert result(tmp_path / "each" / "a") == result(tmp_path / "some" / "a")


def test_a_changed_length_of_the_dataset_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, "trainer.stop_at=2step")
    monkeypatch.setattr(Points, "there", 44)
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"has trained on 45 samples, but the dataset now has 44"):
        start(tmp_path, "checkpoint.accept_changes=true")
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


def test_rows_are_durable_before_the_manifest_that_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, rename = os.fsync, os.rename
    durable = {"rows": b""}
    published: dict[int, list[int]] = {}

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/metrics.jsonl"):
            durable["rows"] = (tmp_path / "a" / "metrics.jsonl").read_bytes()

    def renamed(source: Any, target: Any) -> None:
        if found := re.search(r"/step-(\d+)$", str(target)):
            published[int(found[1])] = [json.loads(line)["step"] for line in durable["rows"].splitlines()]
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    start(tmp_path, "trainer.duration=4step", "checkpoint.every=[1step]")
    assert sorted(published) == [1, 2, 3, 4]
    for step, there in published.items():
        assert there[:step] == list(range(1, step + 1)), "a row that a power failure takes is never written again"
