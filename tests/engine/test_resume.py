"""A run that was stopped in the middle of an epoch and continued is, to the last bit, the run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import CONFIGS, result, rows, run, run_several, same_state_dicts, traced

FULL = f"""
extends: {CONFIGS / "digits.yaml"}
optimizer: {{_target_: torch.optim.Adam, lr: 0.003}}
data: {{drop_last: false, global_batch_size: 50}}
trainer: {{duration: 40step, ema_decay: 0.9, log_every: 7step, evaluate_every: 1ep, clip_grad_norm: 1.0}}
debug: {{trace_samples: true}}
tracking: {{tensorboard: false, report: false}}
"""


CASES = [(1, 2, "spawn"), (2, 2, "fork"), (3, 0, "auto"), (1, 0, "auto")]


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
    assert "going on from step 17" in " ".join(done.stdout.split())
    whole = folder / "runs" / f"whole{processes}"
    assert result(stopped) == {**result(whole)}
    assert same_state_dicts(stopped / "model.pt", whole / "model.pt")
    assert rows(stopped) == rows(whole)
    assert traced(stopped) == traced(whole)


def test_the_comparison_fails_for_another_seed(folder: Path) -> None:
    run(folder, 1, "--config", "full.yaml", "run.name=seed", "seed=1")
    seed, whole = folder / "runs" / "seed", folder / "runs" / "whole1"
    assert result(seed)["weights_sha256"] != result(whole)["weights_sha256"]
    assert not same_state_dicts(seed / "model.pt", whole / "model.pt")
    assert rows(seed) != rows(whole)
    assert traced(seed) != traced(whole)


def test_a_completed_run_prints_its_result_and_goes_on_when_it_is_to_be_longer(folder: Path) -> None:
    same = ("--config", "full.yaml", "run.name=longer", "debug.trace_samples=false")
    run(folder, 1, *same, "trainer.duration=10step")
    before = result(folder / "runs" / "longer")
    again = run(folder, 1, *same, "trainer.duration=10step")
    assert "is completed" in again.stdout
    assert result(folder / "runs" / "longer") == before
    assert len((folder / "runs/longer/attempts.jsonl").read_text().splitlines()) == 2, "nothing was started"
    run(folder, 1, *same, "trainer.duration=14step", "trainer.log_every=1step")
    assert result(folder / "runs" / "longer")["step"] == 14
    logged = rows(folder / "runs" / "longer", "train")
    assert [row["step"] for row in logged] == [7, 10, 11, 12, 13, 14]
    rates = [0.003 * step / 51 for step in (11, 12, 13, 14)]
    assert [row["lr"] for row in logged[2:]] == pytest.approx(rates), "the schedule of 10 steps goes on, in its warm-up"


def test_a_changed_learning_rate_needs_consent_and_then_really_changes(folder: Path) -> None:
    same = ("--config", "full.yaml", "run.name=changed", "debug.trace_samples=false")
    run(folder, 1, *same, "trainer.stop_at=10step", expect=75)
    place = folder / "runs" / "changed"
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    refused = run(folder, 1, *same, "optimizer.lr=0.006", expect=2)
    for part in ("optimizer.lr", "0.003", "0.006", "run.name", "checkpoint.accept_changes=true"):
        assert part in refused.stderr
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before, "something was written"
    run(folder, 1, *same, "trainer.duration=11step", "trainer.log_every=1step", "run.name=changed", "optimizer.lr=0.006",
        "checkpoint.accept_changes=true")  # fmt: skip
    run(
        folder,
        1,
        "--config",
        "full.yaml",
        "run.name=straight",
        "trainer.stop_at=11step",
        "trainer.log_every=1step",
        expect=75,
    )
    changed, straight = rows(place, "train")[-1], rows(folder / "runs" / "straight", "train")[-1]
    assert changed["step"] == straight["step"] == 11
    assert changed["lr"] == pytest.approx(2 * straight["lr"], rel=1e-9)
    done = run(folder, 1, *same, "optimizer.lr=0.003", "trainer.duration=11step", expect=2)
    assert "optimizer.lr" in done.stderr, "a finished run is asked for consent as well"


def test_what_the_data_order_depends_on_is_refused(folder: Path) -> None:
    changes = ("data.global_batch_size=40", "seed=5", "data.drop_last=true")
    whole = ("--config", "full.yaml", "run.name=whole1")
    done = run(folder, 1, *whole, *changes, "checkpoint.accept_changes=true", expect=2)
    for change in changes:
        assert change.split("=")[0] in done.stderr


def test_never_resuming_an_existing_run_is_refused(folder: Path) -> None:
    done = run(folder, 1, "--config", "full.yaml", "run.name=whole1", "checkpoint.resume=never", expect=2)
    assert "checkpoint.resume" in done.stderr


def test_a_run_can_begin_from_a_checkpoint_of_another_one(folder: Path) -> None:
    whole = folder / "runs" / "whole1"
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    earlier = min((whole / "checkpoints").glob("step-*"))
    assert earlier.name < "step-00000040"
    done = run(folder, 1, "--config", "full.yaml", "run.name=branch", f"checkpoint.resume={earlier}")
    assert f"from step {int(earlier.name[5:])}" in " ".join(done.stdout.split())
    assert same_state_dicts(folder / "runs" / "branch" / "model.pt", whole / "model.pt")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
