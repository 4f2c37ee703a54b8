"""A run's model outside of it: in Python by `dist_train.load`, elsewhere by files."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROGRAMS
from runs import CONFIGS, environment
from torch import nn

import dist_train
from dist_train import train
from dist_train.config.errors import ConfigError
from dist_train.data import Digits
from dist_train.main import main
from dist_train.models import MLP


def images(count: int = 5) -> torch.Tensor:
    return Digits("test", flat=True).inputs[:count]


def test_load_gives_the_kept_weights_in_eval_mode(digits: Path) -> None:
    model = dist_train.load(digits)
    kept = torch.load(digits / "model.pt", weights_only=True)
    assert not model.training
    assert list(model.state_dict()) == list(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    last, named = dist_train.load(str(digits), "last").state_dict(), dist_train.load(digits, "step-57").state_dict()
    assert all(torch.equal(tensor, named[name]) for name, tensor in last.items())


def test_load_leaves_the_callers_random_numbers_alone(digits: Path) -> None:
    def draws() -> tuple[float, ...]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(7)
    expected = draws()
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(7)
    dist_train.load(digits)
    assert draws() == expected


def test_load_into_a_model_of_ones_own_calls_nothing_of_the_config(digits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(digits, tmp_path / "run")
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("dist_train.models.MLP", "nowhere.to.be.Found"))
    with pytest.raises(ConfigError, match="nowhere"):
        dist_train.load(copy)
    mine = dist_train.load(copy, model=MLP(64, [128], 10))
    with torch.no_grad():
        assert torch.equal(mine(images()), dist_train.load(digits)(images()))
    with pytest.raises(ConfigError, match="don't fit this model"):
        dist_train.load(copy, model=MLP(64, [12], 10))


# What somebody who has the file, torch and the model's code does with it.
USES = {
    "state_dict": "from dist_train.models import MLP; m = MLP(64, [128], 10); "
    "m.load_state_dict(torch.load(path, weights_only=True))",
    "module": "m = torch.load(path, weights_only=False)",
    "safetensors": "from dist_train.models import MLP; from safetensors.torch import load_file; "
    "m = MLP(64, [128], 10); m.load_state_dict(load_file(path))",
    "torch_export": "m = torch.export.load(path).module()",
}


@pytest.fixture(scope="module")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every format, and the outputs that each gives in one fresh process."""
    folder = tmp_path_factory.mktemp("export")
    torch.save(images(), folder / "images.pt")
    lines = ["import torch", "x = torch.load('images.pt')", "torch.set_num_threads(1)"]
    for name, use in USES.items():
        ending = {"safetensors": ".safetensors", "torch_export": ".pt2"}.get(name, ".pt")
        assert main(["export", str(digits), "--format", name, "--output", str(folder / (name + ending))]) == 0
        lines.append(f"path = '{name}{ending}'; {use}")
        lines.append(f"torch.save(m(x).detach(), '{name}.out')")
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, env=environment(), check=True)
    return folder


@pytest.mark.parametrize("name", USES)
def test_every_format_gives_the_same_outputs_in_a_fresh_process(digits: Path, exported: Path, name: str) -> None:
    with torch.no_grad():
        expected = dist_train.load(digits)(images())
    got = torch.load(exported / f"{name}.out")
    if name == "torch_export":
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


def test_what_is_exported_normalizes_by_what_it_has_seen_and_drops_nothing(tmp_path: Path) -> None:
    """A model with BatchNorm and dropout is in eval mode, whoever reads it."""
    kinds = [("Linear", 64, 8), ("BatchNorm1d", 8), ("Dropout", 0.5), ("Linear", 8, 10)]
    layers = [{"_target_": f"torch.nn.{name}", "_args_": list(sizes)} for name, *sizes in kinds]
    config = {"extends": str(CONFIGS / "digits_mlp.yaml"), "run": {"name": "a", "dir": str(tmp_path)}}
    model = {"_target_": "torch.nn.Sequential", "_args_": layers}
    quick = ["tracking={tensorboard: false, report: false}", "data.num_workers=0", "trainer.duration=4step"]
    train({**config, "model": model}, *quick)
    net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)).eval()
    net.load_state_dict(torch.load(tmp_path / "a" / "model.pt", weights_only=True))
    expected = net(images())
    for form in ("module", "torch_export"):
        assert main(["export", str(tmp_path / "a"), "--format", form, "--output", str(tmp_path / form)]) == 0
    program = io.BytesIO((tmp_path / "torch_export").read_bytes())
    read = torch.load(tmp_path / "module", weights_only=False), torch.export.load(program).module()
    for exported in (*read, dist_train.load(tmp_path / "a")):
        torch.testing.assert_close(exported(images()), expected)


def test_the_module_comes_with_a_warning(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "whole.pt"
    assert main(["export", "--run", str(digits), "--format", "module", "--output", str(output)]) == 0
    assert "warning: this is a pickle" in capsys.readouterr().err
    assert main(["export", "--run", str(digits), "--output", str(output)]) == 0
    assert capsys.readouterr().err == ""


def test_an_unknown_format_is_answered_with_those_there_are(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--run", str(digits), "--format", "onnx"]) == 2
    assert "torch_export" in capsys.readouterr().err


def test_the_graph_is_of_the_inputs_that_the_task_gives_the_model(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(PROGRAMS))
    export = ["export", str(digits), "--format", "torch_export", "--output", str(tmp_path / "out.pt2")]
    assert main([*export, "task._target_=answers.ByName"]) == 0
    program = torch.export.load(tmp_path / "out.pt2").module()
    torch.testing.assert_close(program(input=images()), dist_train.load(digits)(images()))
    (tmp_path / "out.pt2").unlink()
    assert main([*export, "task._target_=answers.Parts"]) == 2
    assert "the task's predict calls parts of the model only" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_torch_export_says_of_a_model_that_it_cannot_export_is_passed_on(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(PROGRAMS))
    path = tmp_path / "out.pt2"
    branching = [
        "model={_target_: answers.Branching, in_features: 64, hidden: [128], out_features: 10}",
        "--output",
        str(path),
    ]
    assert main(["export", str(digits), "--format", "torch_export", *branching]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "torch.export can't make a graph of Branching: " in told
    assert "data-dependent" in told.lower()
    assert "state_dict, safetensors and module need none" in told
    assert not path.exists()
    assert main(["export", str(digits), *branching]) == 0
