"""What can't be the same on any number of processes is refused before anything is written, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import result, run, run_several

from dist_train.config.errors import ConfigError
from dist_train.run.api import train

PIECES = Path(__file__).parent / "programs" / "leafy.py"


@pytest.fixture(autouse=True)
def folder(beside: Callable[[Path], Path]) -> Path:
    """The working directory, with the pieces beside the config."""
    return beside(PIECES)


def config(model: str, **distributed: Any) -> dict[str, Any]:
    return {
        "data": {"train": {"_target_": "leafy.Images"}, "global_batch_size": 8, "num_workers": 0},
        "model": {"_target_": f"leafy.{model}"},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01},
        "trainer": {"duration": "4step", "log_every": "1step", "micro_batch_size": 2},
        "distributed": {"reproducibility": "bitwise", **distributed},
        "tracking": {"tensorboard": False, "report": False},
        "run": {"name": "leafy"},
    }


REFUSED = {
    "OldSpectralNorm": "a forward changes features.weight_u: ",
    "SpectralNorm": "a forward changes features.parametrizations.weight.0._u: ",
    "Center": "a forward changes center: ",
    "Replaced": "a forward changes center: ",
    "ThroughData": "a forward changes center: ",
    "Scale": "a forward changes scale: ",
    "Usage": "a forward changes usage: ",
    "Teacher": "a forward changes teacher.weight: ",
    "ReentrantCenter": "a forward changes center: ",
    "MadeLate": "a micro-batch has another loss after a forward of another one",
    "Previous": "it may be previous, which it has made in the forward",
    "InADict": "a micro-batch has another loss after a forward of another one",
    "MaxNorm": "a forward changes table.weight (max_norm): ",
    "Shrinking": "a forward changes head.weight: ",
    "Forward": "max_unpooling2d_forward_out, which is needed by unpool (Unpool) in the forward: ",
    "Backward": "max_unpooling2d_forward_out, which is needed by squeeze (Squeeze) in the backward: ",
    "Sparse": "that of table.weight is one: set sparse=False",
    "Unused": "2 parameter(s) take no part in the loss of the first micro-batch: spare.weight, spare.bias",
}


MODELS = ("Net", "Counting", "Frozen", "Keeping", "Reentrant", "CheckpointedNorm", "resnet")


@pytest.mark.parametrize("model", REFUSED)
def test_what_would_depend_on_the_number_of_processes_is_refused_before_anything_is_written(model: str) -> None:
    with pytest.raises(ConfigError) as error:
        train(config(model))
    assert REFUSED[model] in str(error.value)
    assert not Path("runs").exists()


def test_running_statistics_counters_and_modules_that_work_in_place_are_taken(folder: Path) -> None:
    jobs = []
    for model in MODELS:
        assert train({**config(model), "run": {"name": f"{model}-1"}})["state"] == "completed"
        (folder / f"{model}.yaml").write_text(yaml.safe_dump({**config(model), "run": {"name": f"{model}-3"}}))
        jobs.append([f"{model}.yaml", "distributed.bucket_mb=0.001"])
    run_several(folder, 2, [[*job, f"run.name={model}-2"] for job, model in zip(jobs, MODELS, strict=True)])
    run_several(folder, 3, jobs)
    for model in MODELS:
        one, *others = (result(folder / "runs" / f"{model}-{processes}") for processes in (1, 2, 3))
        assert all(other["weights_sha256"] == one["weights_sha256"] for other in others), model


def test_fast_takes_them() -> None:
    assert train(config("Center", reproducibility="fast"))["state"] == "completed"


def test_unused_parameters_can_be_allowed() -> None:
    assert train(config("Unused", find_unused_parameters=True))["state"] == "completed"


def test_a_buffer_that_changes_later_ends_the_run() -> None:
    with pytest.raises(ValueError, match="a forward changes late: "):
        train(config("Late"))


def test_statistics_of_a_layer_in_eval_mode_stay_as_they_are() -> None:
    changed = {"data": {"train": {"_target_": "leafy.Images"}, "global_batch_size": 12, "num_workers": 0}}  # 3 leaves
    train({**config("Frozen"), **changed, "trainer": {"duration": "4step", "micro_batch_size": 4}})
    state = torch.load("runs/leafy/model.pt", weights_only=True)
    assert torch.equal(state["still.running_mean"], torch.full((4,), 0.1))
    assert not torch.equal(state["norm.running_mean"], torch.zeros(4))


def test_another_number_of_threads_is_told_and_recorded_and_nothing_is_left_behind(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stopped = {**config("Net"), "trainer": {"duration": "4step", "micro_batch_size": 2, "stop_at": "2step"}}
    train(stopped)
    assert "bits may differ" not in capfd.readouterr().err
    train(config("Net", threads=2))
    told = "threads is 2, and was 1 at the last start"
    assert f"{told}: kernels may round otherwise there" in capfd.readouterr().err
    lines = [json.loads(line) for line in Path("runs/leafy/attempts.jsonl").read_text().splitlines()]
    starts = [line for line in lines if line["event"] == "start"]
    assert [line.get("bits_may_differ") for line in starts] == [None, [told]]
    assert starts[0]["numerics"]["torch"] == torch.__version__
    assert starts[0]["numerics"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_fast_run_resumes_as_bitwise_by_consent_on_any_number_of_processes(folder: Path) -> None:
    fast = config("Counting", reproducibility="fast")
    (folder / "fast.yaml").write_text(yaml.safe_dump(fast))
    (folder / "bitwise.yaml").write_text(yaml.safe_dump(config("Counting")))
    run_several(folder, 2, [["fast.yaml", "trainer.stop_at=2step"]])
    assert any(torch.load(folder / "runs/leafy/checkpoints/step-00000002/ranks.pt", weights_only=True)[1])
    refused = run(folder, 2, "--config", "bitwise.yaml", expect=None)
    assert "distributed.reproducibility" in refused.stderr
    assert "checkpoint.accept_changes=true" in refused.stderr
    shutil.copytree(folder / "runs" / "leafy", folder / "runs" / "alone")
    accepted = ["bitwise.yaml", "checkpoint.accept_changes=true"]
    run_several(folder, 2, [accepted])
    run_several(folder, 1, [[*accepted, "run.name=alone"]])
    two, one = (torch.load(folder / "runs" / name / "model.pt", weights_only=True) for name in ("leafy", "alone"))
    assert all(torch.equal(two[name], one[name]) for name in one)
