from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.config.load import load_config
from dist_train.runtime.location import expand_name, run_location


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("digits", "digits"),
        ("{time}-{job}", "20260102-030405-77_1"),
        ("lr{optimizer.lr}-s{seed}", "lr0.1-s0"),
        ("{optimizer._target_}", "SGD"),
        ("{data.global_batch_size}/x", "64/x"),
        ("{trainer.stop_at}", "None"),
        ("{data.train}", "_target_-dist_train.data.Digits-split-train-34eacb"),
    ],
)
def test_a_template_is_filled_in(template: str, name: str) -> None:
    assert expand_name(template, load_config(), time="20260102-030405", job="77_1") == name


def test_what_is_unsafe_in_a_path_is_replaced() -> None:
    config = load_config(None, ["run.dir=../a b//c:d*"])
    assert expand_name("{run.dir}", config, time="", job="") == "a-b-c-d-da4107"
    assert expand_name("{job}", config, time="", job="../..") == "none"


def test_different_values_give_different_names() -> None:
    written = ["a b", "a-b", "a/b", "-0.5", "0.5", "[1, 2]", "[-1, 2]", "'001'", "1", "1e-3", "[]", "''", "[1, 20]"]
    configs = [load_config(None, [f"model.bias={value}"]) for value in written]
    names = [expand_name("{model.bias}", config, time="", job="") for config in configs]
    assert len(set(names)) == len(names), names


def test_two_starts_in_one_second_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Array tasks start together. Each finds its own run again; a shell inside an allocation has no job to come back to."""
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=a-{time}"])
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "SLURM_PTY_PORT", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert len({run_location(config) for _ in range(4)}) == 4
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    first, again = [], []
    for locations in (first, again):
        for task in range(4):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            locations.append(run_location(config))
    assert first == again
    assert len(set(first)) == 4
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("ENVIRONMENT", "BATCH")
    assert run_location(config) == run_location(config)
    monkeypatch.delenv("ENVIRONMENT")
    monkeypatch.setenv("SLURM_PTY_PORT", "40000")
    assert run_location(config) != run_location(config)
