"""Every command in the README runs as shown, in a bare shell, on the README's own Python and YAML files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forking import HOOK
from runs import ROOT, result

README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
    if line.split("#")[0].strip()
]
# Installing from a clone is tested by .ci/run; here the tools are already installed.
MAKE = ("make train", "make test-cpu")


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a bare shell that finds only the tools of this environment, with one thread; launchers fork workers."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    env = {"PATH": path, "HOME": str(folder), "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(HOOK)
    return subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's directory with mine.py and mine.yaml, copied from the README."""
    folder = tmp_path_factory.mktemp("reader")
    python, yaml = (next(text for kind, text in BLOCKS if kind == wanted) for wanted in ("python", "yaml"))
    (folder / "mine.py").write_text(python)
    (folder / "mine.yaml").write_text(yaml)
    return folder


def test_the_readme_shows_commands() -> None:
    assert [command for command in COMMANDS if command.startswith("make")] == list(MAKE)
    assert len(COMMANDS) >= 10


def test_the_readmes_make_targets_exist() -> None:
    for command in MAKE:
        done = subprocess.run(
            ["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr


def test_every_command_of_the_readme_runs(folder: Path) -> None:
    """In the README's order: later commands evaluate what earlier ones trained."""
    ran = [command for command in COMMANDS if command not in MAKE]
    for command in ran:
        done = shell(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if "--get trainer.duration" in command:
            assert done.stdout.strip() == "20ep"
    metrics = [result(folder / "runs" / name)["metrics"]["val"] for name in ("mine", "two", "accelerated")]
    assert all(metric["eval_samples"] == 300 for metric in metrics)
    assert metrics[0]["accuracy"] > 0.95
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-3)
    assert metrics[2] == metrics[0], "accelerate with one process is one process"
    assert result(folder / "runs" / "digits")["epoch"] == 22


def test_the_model_file_loads_with_plain_torch(folder: Path) -> None:
    line = re.search(r"`(Net\(\)\.load_state_dict\(.*?\))`", README)
    assert line is not None
    done = shell(f"{sys.executable} -c 'import torch; from mine import Net; print({line[1]})'", folder)
    assert "All keys matched" in done.stdout, done.stderr


def test_a_config_error_is_reported_as_shown(folder: Path) -> None:
    shown = next(text for kind, text in BLOCKS if not kind)
    text = (folder / "mine.yaml").read_text().replace("duration: 20ep", "epochs: 20")
    (folder / "mistake.yaml").write_text(text)
    done = shell("python -m dist_train.main --config mistake.yaml", folder)
    assert done.returncode == 2
    assert done.stderr.strip().replace("mistake.yaml", "mine.yaml") == shown.strip()


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_link_targets_exist(text: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert os.path.exists(ROOT / target), target
    for test in re.findall(r"`(tests/[\w/.]+)`", text):
        assert os.path.exists(ROOT / test), test


def test_the_chinese_readme_shows_the_same_commands_files_and_tests() -> None:
    """Everything but prose and comments, which are translated, is the same."""

    def code(text: str) -> list[str]:
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        return [line.split("#")[0].rstrip() for block in blocks for line in block.splitlines()]

    def named(text: str) -> set[str]:
        return set(re.findall(r"tests/[\w/.]+", text))

    assert code(CHINESE) == code(README)
    assert named(CHINESE) == named(README)
