"""`--nproc N`: the same as torchrun, without its report, and with this command's exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs

from dist_train.config.errors import ConfigError
from dist_train.main import main
from dist_train.runtime.local import take_option


@pytest.mark.parametrize(
    ("arguments", "count", "rest"),
    [
        (["train", "a.yaml"], None, ["train", "a.yaml"]),
        (["train", "a.yaml", "--nproc", "4", "seed=1"], "4", ["train", "a.yaml", "seed=1"]),
        (["--nproc=gpu", "demo"], "gpu", ["demo"]),
        (["demo", "--nproc", "1"], None, ["demo"]),
    ],
)
def test_the_option_is_taken_out_wherever_it_stands(arguments: list[str], count: str | None, rest: list[str]) -> None:
    assert take_option(arguments) == (count, rest)


def test_a_wrong_number_and_a_launcher_around_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (["--nproc"], ["--nproc=0"], ["--nproc", "four"]):
        with pytest.raises(ConfigError, match="--nproc: expected a number of processes"):
            take_option(wrong)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="one of several already"):
        take_option(["--nproc", "2"])


def test_a_command_that_only_reads_files_is_no_job_of_several_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It printed its table once for each of them."""
    assert main(["runs", str(tmp_path), "--nproc", "2"]) == 2
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "command line: --nproc: runs is a command of one process\n")


def test_a_config_error_is_printed_once_and_a_stop_exits_with_75(tmp_path: Path) -> None:
    wrong = runs.run(tmp_path, 1, "--nproc", "2", "trainer.durations=1ep", expect=2, env=runs.forks_workers())
    assert wrong.stderr == "command line: trainer.durations: unknown key; did you mean trainer.duration?\n"
    options = ("trainer.stop_at=2step", "tracking={tensorboard: false, report: false}")
    done = runs.run(tmp_path, 1, "--nproc=2", "demo", *options, expect=75, env=runs.forks_workers())
    assert "saved at step 2; the same command resumes" in done.stdout
    assert json.loads((tmp_path / "runs/digits/status.json").read_text())["world_size"] == 2
