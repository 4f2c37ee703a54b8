"""A run that was stopped in the middle of an epoch and continued is, to the last bit, the run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import CONFIGS, result, rows, run, run_several, same_state_dicts, traced

from dist_train import train
from dist_train.config.errors import ConfigError

FULL = f"""
extends: {CONFIGS / "digits.yaml"}
optimizer: {{_target_: torch.optim.Adam, lr: 0.003}}
data: {{drop_last: false, global_batch_size: 50}}
trainer: {{duration: 40step, ema_decay: 0.9, log_every: 7step, evaluate_every: 1ep, clip_grad_norm: 1.0}}
debug: {{trace_samples: true}}
tracking: {{tensorboard: false, report: false}}
"""


CASES = [(1, 1, "spawn"), (2, 2, "fork"), (3, 0, "auto")]  # one process without workers: tests/oracle/test_equal.py


def options(processes: int, workers: int, method: str) -> list[str]:
    """Config and overrides of a run that is stopped and continued."""
    workers_are = [f"data.num_workers={workers}", f"data.worker_start_method={method}"]
    return ["full.yaml", f"run.name=stopped{processes}-{workers}", *workers_are, *buckets(processes)]


def buckets(processes: int) -> list[str]:
    """Two processes reduce as small models do, three by DDP in several buckets, whose layout matters from three on."""
    return ["distributed.bucket_mb=0.01"] if processes == 3 else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs on 1, 2 and 3 processes, without workers: `whole1` and so on; and those that were stopped."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "full.yaml").write_text(FULL)
    for processes in (1, 2, 3):
        stopped = [[*options(*case), "trainer.stop_at=17step"] for case in CASES if case[0] == processes]
        whole = ["full.yaml", f"run.name=whole{processes}", "data.num_workers=0", *buckets(processes)]
        run_several(folder, processes, [whole, *stopped])
    return folder


@pytest.mark.parametrize(("processes", "workers", "method"), CASES)
def test_stopped_and_continued_equals_never_stopped(folder: Path, processes: int, workers: int, method: str) -> None:
    """With augmentation, dropout, BatchNorm, Adam, EMA, clipping, a cosine; on three processes DDP's buckets would show."""
    stopped = folder / "runs" / f"stopped{processes}-{workers}"
    assert json.loads((stopped / "status.json").read_text())["state"] == "preempted"
    assert not (stopped / "model.pt").exists()
    done = run(folder, processes, "--config", *options(processes, workers, method))
    assert "resuming from step 17" in " ".join(done.stdout.split())
    whole = folder / "runs" / f"whole{processes}"
    assert result(stopped) == {**result(whole)}
    assert same_state_dicts(stopped / "model.pt", whole / "model.pt")
    assert rows(stopped) == rows(whole)
    assert traced(stopped) == traced(whole)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, in which this process trains: starting others is what costs."""
    monkeypatch.chdir(folder)
    return folder


def start(*overrides: str) -> dict[str, Any]:
    """`full.yaml` in this process."""
    return train("full.yaml", "data.num_workers=0", *overrides)


def test_the_comparison_fails_for_another_seed(here: Path) -> None:
    folder = here
    start("run.name=seed", "seed=1")
    seed, whole = folder / "runs" / "seed", folder / "runs" / "whole1"
    assert result(seed)["weights_sha256"] != result(whole)["weights_sha256"]
    assert not same_state_dicts(seed / "model.pt", whole / "model.pt")
    assert rows(seed) != rows(whole)
    assert traced(seed) != traced(whole)


def test_a_completed_run_prints_its_result_and_resumes_when_it_is_to_be_longer(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, place = ("run.name=longer", "debug.trace_samples=false"), here / "runs" / "longer"
    start(*same, "trainer.duration=10step")
    before = result(place)
    capsys.readouterr()
    start(*same, "trainer.duration=10step")
    assert "is completed" in capsys.readouterr().out
    assert result(place) == before
    assert len((place / "attempts.jsonl").read_text().splitlines()) == 2, "nothing was started"
    start(*same, "trainer.duration=14step", "trainer.log_every=1step")
    assert result(place)["step"] == 14
    logged = rows(place, "train")
    assert [row["step"] for row in logged] == [7, 10, 11, 12, 13, 14]
    rates = [0.003 * step / 51 for step in (11, 12, 13, 14)]
    assert [row["lr"] for row in logged[2:]] == pytest.approx(rates), "the schedule of 10 steps resumes, in its warm-up"


def test_a_changed_learning_rate_needs_consent_and_then_really_changes(here: Path) -> None:
    """Under a schedule; test_trainer.py has the updates without one."""
    same, place = ("run.name=changed", "debug.trace_samples=false"), here / "runs" / "changed"
    start(*same, "trainer.stop_at=10step")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refused:
        start(*same, "optimizer.lr=0.006")
    for part in ("optimizer.lr", "0.003", "0.006", "run.name", "checkpoint.accept_changes=true"):
        assert part in str(refused.value)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before, "something was written"
    last = "trainer.log_every=1step"
    start(*same, "trainer.duration=11step", last, "optimizer.lr=0.006", "checkpoint.accept_changes=true")
    start("run.name=straight", "trainer.stop_at=11step", last)
    changed, straight = rows(place, "train")[-1], rows(here / "runs" / "straight", "train")[-1]
    assert changed["step"] == straight["step"] == 11
    assert changed["lr"] == pytest.approx(2 * straight["lr"], rel=1e-9)
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):  # a finished run is asked for consent as well
        start(*same, "optimizer.lr=0.003", "trainer.duration=11step")


def test_what_the_data_order_depends_on_is_refused(here: Path) -> None:
    changes = ("data.global_batch_size=40", "seed=5", "data.drop_last=true")
    with pytest.raises(ConfigError) as refused:
        start("run.name=whole1", *changes, "checkpoint.accept_changes=true")
    for change in changes:
        assert change.split("=")[0] in str(refused.value)


def test_never_resuming_an_existing_run_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.resume"):
        start("run.name=whole1", "checkpoint.resume=never")


def test_a_run_can_begin_from_a_checkpoint_of_another_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = here / "runs" / "whole1"
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    earlier = min((whole / "checkpoints").glob("step-*"))
    assert earlier.name < "step-00000040"
    start("run.name=branch", f"checkpoint.resume={earlier}")
    assert f"from step {int(earlier.name[5:])}" in " ".join(capsys.readouterr().out.split())
    assert same_state_dicts(here / "runs" / "branch" / "model.pt", whole / "model.pt")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
