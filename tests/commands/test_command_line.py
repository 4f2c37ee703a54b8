"""The command line itself: help, the version, and what is answered to the habits of other tools."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import CONFIGS, environment, result

from dist_train import __version__
from dist_train.commands.usage import COMMANDS
from dist_train.main import main

HEAVY = ("torch", "pydantic", "yaml", "rich", "fsspec", "numpy")


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns_and_a_commands_has_an_example_of_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([name, "--help"] if name else ["help"]) == 0
    wide = capsys.readouterr().out
    assert wide
    assert max(map(len, wide.splitlines())) <= 80
    assert not name or f"example:\n  dist-train {name}" in wide or name in ("train", "completion")
    assert name or all(f"  {command} " in wide for command in COMMANDS)
    monkeypatch.setenv("COLUMNS", "40")
    assert main([name, "--help"] if name else ["help"]) == 0
    assert capsys.readouterr().out.count("\n") > wide.count("\n")


@pytest.mark.parametrize(
    ("command", "offered"),
    [
        ("verify", {"--run"}),
        ("evaluate", {"--run", "--checkpoint", "--split", "--json", "--output"}),
        ("report", {"--run", "--checkpoint", "--output"}),
        ("demo", {"--nproc"}),
        ("train", {"--config", "--nproc"}),
        ("config", {"--config", "--get", "--schema"}),
        ("new", set()),
    ],
)
def test_help_offers_what_a_command_takes(command: str, offered: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out.partition("\nexample:")[0]
    assert set(re.findall(r"--[a-z]+", printed)) - {"--help"} == offered
    assert ("key=value" in printed) == (command in ("evaluate", "report", "demo", "train", "config"))


def test_help_and_version_of_the_console_script_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dist_train import main\n"
        "for words in ([], ['--version'], ['help', 'runs'], *([name, '--help'] for name in main.COMMANDS)):\n"
        "    sys.argv[1:] = words\n"
        "    try:\n        main.console_main()\n    except SystemExit as left:\n        assert not left.code\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("usage: dist-train COMMAND"), done.stderr
    assert f"dist-train {__version__}" in lines
    assert lines[-1] == "[]"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        ("-lr 0.1", ["-lr 0.1: ", "optimizer.lr=0.1"]),
        ("--lr=0.1", ["optimizer.lr=0.1"]),
        ("lr=0.1", ["optimizer.lr=0.1"]),
        ("lr 0.1", ["optimizer.lr=0.1"]),
        ("optimizer.lr 0.1", ["optimizer.lr=0.1"]),
        ("train --optimizer.lr 0.1", ["optimizer.lr=0.1"]),
        ("metrics=[acc]", ["did you mean accuracy?"]),
        ("--epochs 3 --seed 4 -lr 1", ["trainer.duration=3ep", "seed=4", "optimizer.lr=1"]),
        ("metrics=acc", ["write [acc]"]),
        ("optimizer=adam", ["on the command line optimizer._target_=torch.optim.Adam"]),
        ("loss=cross_entropy", ["{_target_: torch.nn.CrossEntropyLoss}"]),
        ("--lr 3 trainer.duration=3", ["optimizer.lr=3", "3 has no unit"]),  # all at once
        ("--global-batch-size 32", ["data.global_batch_size=32"]),
        ("-b 32", ["data.global_batch_size"]),
        ("--gpus 4", ["torchrun --nproc_per_node=4"]),
        ("-c some.yaml", ["--config some.yaml"]),
        ("--colour", ["train has no option --colour", "dist-train train --help"]),
        ("one.yaml two.yaml", ["expected one config, found one.yaml, two.yaml"]),
        ("none.yaml", ["none.yaml: no such file"]),
        ("traim", ["did you mean train?"]),
        ("run", ["run is a run's directory: dist-train run/config.yaml resumes it"]),
        ("train run", ["run is a run's directory"]),
        ("demo run", ["run is a run's directory"]),
        ("evaluate run --jsn", ["did you mean --json?"]),
        ("evaluate run --epochs 3", ["trainer.duration=3ep"]),
        ("evaluate --config some.yaml", ["evaluate takes the directory of a run"]),
        ("verify run --fast", ["verify has no option --fast"]),
        ("config --run run", ["config takes a config and its keys"]),
    ],
)
def test_habits_of_other_tools_are_answered_with_what_to_write(
    words: str, answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert all(answer in told for answer in answers), told
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "config.yaml"]


def test_every_command_has_a_module_whose_usage_names_it() -> None:
    for name in COMMANDS:
        assert importlib.import_module(f"dist_train.commands.{name}").USAGE.name == name


def test_a_config_alone_is_trained_and_the_demo_takes_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS / "digits_mlp.yaml", "mine.yaml")
    quick = ["trainer.duration=2step", "tracking.report=false", "tracking.tensorboard=false"]
    assert main(["mine.yaml", "run.name=one", *quick]) == 0
    assert main(["train", "--config", "mine.yaml", "run.name=two", *quick]) == 0
    assert result(Path("runs/one"))["weights_sha256"] == result(Path("runs/two"))["weights_sha256"]
    assert main(["demo", *quick]) == 0
    assert result(Path("runs/digits"))["step"] == 2
