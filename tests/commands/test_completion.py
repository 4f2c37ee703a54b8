"""What the shells offer for TAB."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

from dist_train.commands.completion import complete
from dist_train.commands.usage import COMMANDS
from dist_train.main import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a config, a run with two checkpoints, and another directory."""
    for step in ("step-00000010", "step-00000020"):
        (tmp_path / "runs" / "one" / "checkpoints" / step).mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").write_text(
        "model: {_target_: m.Net, width: 3}\noptimizer: {momentum: 0.9}\n"
    )
    (tmp_path / "mine.yaml").write_text("model: {_target_: m.Net, depth: 3}\n")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("eval", ["evaluate"]),
        ("help ev", ["evaluate"]),
        ("trainer.dur", ["trainer.duration="]),
        ("mine.yaml trainer.dur", ["trainer.duration="]),
        ("broken.yaml trainer.dur", ["trainer.duration="]),
        ("mine.yaml model.", ["model._target_=", "model.depth="]),
        ("train checkpoint.keep", ["checkpoint.keep_last=", "checkpoint.keep_best="]),
        ("trac", ["tracking."]),
        ("trainer.precision=f", ["trainer.precision=fp32", "trainer.precision=fp16"]),
        ("trainer.channels_last=t", ["trainer.channels_last=true"]),
        ("mi", ["mine.yaml"]),
        ("train --config ", ["broken.yaml", "data/", "mine.yaml", "runs/"]),
        ("train mine.yaml b", []),  # there is a config already
        ("evaluate ", ["data/", "runs/", "runs/one"]),
        ("evaluate runs/", ["runs/one"]),
        ("evaluate runs/one model.", ["model._target_=", "model.width="]),
        ("evaluate --run ru", ["runs/"]),
        ("evaluate runs/one --checkpoint s", ["step-00000010", "step-00000020"]),
        ("evaluate runs/one --split ", ["val", "test", "train"]),
        ("predict runs/one --for", ["--format"]),
        ("export runs/one --format s", ["state_dict", "safetensors"]),
        ("compare runs/", ["runs/one"]),
        ("verify runs/one --", ["--run", "--help"]),
        ("config --get run.n", ["run.name"]),
        ("runs --sort a", ["age", "attempts"]),
        ("runs d", ["data/"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("nonsense --x ", ["broken.yaml"]),
    ],
)  # fmt: skip
def test_commands_options_files_keys_runs_and_checkpoints_are_offered(
    place: Path, line: str, offered: list[str]
) -> None:
    found = list(dict(complete(line.split(" "))))
    if line.startswith("nonsense"):
        assert set(offered) <= set(found)
    else:
        assert sorted(found) == sorted(offered)


def test_every_command_and_no_traceback_is_offered(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(COMMANDS) <= {text for text, _ in complete([""])}
    for name in COMMANDS:
        assert main(["completion", "--words", name, ""]) == 0
        assert main(["completion", "--words", name, "--"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err


BASH = """
. ./script
try() { COMP_LINE="dist-train $1"; COMP_POINT=${#COMP_LINE}; COMPREPLY=(); _dist_train 2>/dev/null; echo "${COMPREPLY[*]}"; }
try trainer.dur; try trainer.precision=bf; try 'evaluate runs/'
"""
FISH = """
source script
complete -C 'dist-train trainer.dur'
complete -C 'dist-train trainer.precision=bf'
complete -C 'dist-train evaluate runs/'
"""
OFFERED = {
    "bash": ["trainer.duration=", "bf16", "runs/one"],  # bash splits words at = itself
    "fish": ["trainer.duration=", "trainer.precision=bf16", "runs/one"],
    "zsh": [],
}


@pytest.mark.parametrize(
    ("shell", "code"), [("bash", ["-c", BASH]), ("fish", ["--no-config", "-c", FISH]), ("zsh", ["-fn", "script"])]
)
def test_the_shells_themselves_complete_by_the_script(
    place: Path, shell: str, code: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    assert main(["completion", shell]) == 0
    (place / "script").write_text(capsys.readouterr().out)
    (place / "bin").mkdir()
    (place / "bin" / "dist-train").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m dist_train.main "$@"\n')
    (place / "bin" / "dist-train").chmod(0o755)
    env = environment(PATH=f"{place / 'bin'}:{os.environ['PATH']}", HOME=str(place))
    done = subprocess.run([shell, *code], env=env, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.split("\n")[:-1]] == OFFERED[shell]
