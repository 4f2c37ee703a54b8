"""What a start imports, and when: each module costs every rank time before its first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch

from dist_train import train
from dist_train.config.load import load_config
from dist_train.main import main
from dist_train.run.completed import answer, seems_completed
from dist_train.runtime.compiler import defer_compiler

# Prints the modules that are imported when the first step begins and when the last one ends, or when a command is over.
LOOK = """
import json, sys, threading
from dist_train.main import main
found, hook = {}, None
if len(sys.argv) > 4:
    from dist_train.step.step import Stepper
    steps, call = [], Stepper.__call__
    def watched(self, *args, **kwargs):
        if not steps:
            found["before"] = sorted(sys.modules)
        call(self, *args, **kwargs)
        steps.append(1)
        found["after"] = sorted(sys.modules)
    Stepper.__call__ = watched
code = main(sys.argv[2:4])
if len(sys.argv) > 4:  # what rank 0 of several does besides, and a GPU's meter
    import torch
    from dist_train.building.unsaved import NoCollectives
    from dist_train.models.flops import training_flops
    layer = torch.nn.Linear(2, 2)
    with NoCollectives(), torch.no_grad():
        found["flops"] = training_flops(layer, lambda: layer(torch.ones(1, 2)))
    found["after"] = sorted(sys.modules)
json.dump({"code": code, "end": sorted(sys.modules), **found}, open(sys.argv[1], "w"))
"""


def imported(folder: Path, *more: str) -> dict[str, set[str]]:
    """Modules by the moment, in a process of its own."""
    arguments = ["seen.json", "trainer.duration=3step", "tracking.report=false", *more]
    command = [sys.executable, "-P", "-c", LOOK, *arguments]
    subprocess.run(command, cwd=folder, env=runs.environment(), check=True, capture_output=True, timeout=120)
    found = json.loads((folder / "seen.json").read_text())
    assert found.pop("code") == 0
    assert found.pop("flops", 24) == 24
    return {moment: set(names) for moment, names in found.items()}


def test_a_start_imports_no_compiler_and_a_completed_run_is_answered_without_torch(tmp_path: Path) -> None:
    seen = imported(tmp_path, "watch the steps")
    heavy = {"torch._dynamo", "sympy", "torchvision", "sklearn", "matplotlib", "pandas", "wandb"}
    assert {"torch", "torch.optim"} <= seen["before"]
    assert not heavy & seen["after"]
    assert "torch.utils.tensorboard" in seen["before"]  # no other thread imports it beside the steps
    late = {name for name in seen["after"] - seen["before"] if name.startswith(("dist_train.", "tensorboard"))}
    assert late == set()
    again = imported(tmp_path)
    assert not {"torch", "numpy"} & again["end"]


def test_a_deferred_compiler_changes_no_bit_and_still_compiles_optimizers() -> None:
    """In this process torch._dynamo may have been imported: the wrappers then are torch's own."""

    def trained(optimizer: type[torch.optim.Optimizer]) -> list[torch.Tensor]:
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 12))
        stepper = optimizer([weights], lr=0.1)  # type: ignore[call-arg]
        for _ in range(3):
            (weights**3).sum().backward()
            stepper.step()
            stepper.zero_grad()
        return [weights.detach()]

    for kind in (torch.optim.SGD, torch.optim.AdamW):
        defer_compiler(kind)
        assert kind([torch.nn.Parameter(torch.ones(1))], lr=0.1).state_dict()["param_groups"]
        expected = _by_hand(kind)
        assert torch.allclose(trained(kind)[0], expected)
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.allclose(trained(torch.optim.SGD)[0], _by_hand(torch.optim.SGD))


def _by_hand(kind: type[torch.optim.Optimizer]) -> torch.Tensor:
    w, m, v = torch.linspace(-1, 1, 12), torch.zeros(12), torch.zeros(12)
    for k in range(1, 4):
        g = 3 * w**2
        if kind is torch.optim.SGD:
            w = w - 0.1 * g
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w * (1 - 0.1 * 0.01) - 0.1 * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    return w


def test_ranks_of_one_machine_answer_a_completed_run_alone_once_all_must_see_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["run.name=done", "trainer.duration=2step", "tracking.report=false", "tracking.tensorboard=false"]
    whole = train(None, *given)
    config = load_config(None, given)
    decision = seems_completed(config)
    assert decision is not None
    capsys.readouterr()

    def answered(rank: int, size: int, local: int) -> bool:
        names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": local}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        found = answer(config, decision)
        assert found is None or found == whole
        return found is not None

    assert not answered(0, 2, 2)  # just written: another rank may have seen less
    for path in (tmp_path / "runs" / "done").iterdir():
        os.utime(path, (0, 0))
    assert not answered(0, 2, 1)  # another host may have another directory
    assert answered(1, 2, 2)
    assert capsys.readouterr().out == ""
    assert answered(0, 2, 2)
    assert "is completed, after 2 steps" in capsys.readouterr().out
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert main(["--nproc", "2", "demo", *given]) == 0  # no process is started
    assert "is completed, after 2 steps" in capsys.readouterr().out
