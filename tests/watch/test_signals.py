"""Which signals stop, when, and whom they leave alone; in a process of its own, since handlers are the process's."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

from dist_train.main import main
from dist_train.tracking import terminal
from dist_train.watch import signals
from dist_train.watch.processes import is_owned

PROGRAM = str(Path(__file__).parent / "programs" / "signal_cases.py")
# A function of the program, and what it prints.
CASES = {
    "held ones reach the control thread while the main thread is busy": ("busy_main_thread", "[10, 15]"),
    "a child that ends, and a user's own handlers, stop nothing": ("own_handlers", "[] True"),
    "the children of a user's pool die of their own signals": ("pool", "3\n[]"),
    "an event loop takes its own signals, and stops still stop": ("event_loop", "[15]\n[1]"),
    "an event loop around the training has its descriptor back, and hears what isn't a stop": (
        "wakeup_descriptor",
        "[15] [12]\nTrue True",
    ),
    "a hangup that nohup ignores is ignored": ("nohup", "[]"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], env=environment(), capture_output=True, text=True, timeout=180
    )


@pytest.mark.parametrize("case", CASES)
def test_signals_that_mean_stop_and_no_others_are_taken(case: str) -> None:
    name, printed = CASES[case]
    done = run(name)
    assert done.stdout.strip() == printed, done.stderr


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_before_the_run_has_started_each_of_them_ends_the_process(number: str, code: int) -> None:
    done = run("before_start", number)
    assert done.returncode == code
    assert done.stderr == f"dist_train: {number} before the run started: nothing was written\n"


def test_other_commands_take_ctrl_c_as_python_does_unless_their_main_thread_cannot() -> None:
    assert run("interrupted_command").stdout == "as ever\n"
    assert run("stubborn_command").returncode == 130


def test_main_leaves_nothing_behind_for_a_later_train_in_the_same_process(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    assert main(["train", "--config", "none.yaml"]) == 2
    assert main(["config", "--schema"]) == 0
    assert not is_owned()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
    assert "none.yaml" in capsys.readouterr().err


def test_a_second_ctrl_c_leaves_no_bar_under_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    out = io.StringIO()
    line = terminal.BottomLine(terminal.Stream(out))
    monkeypatch.setattr(terminal, "_line", line)
    monkeypatch.setattr(signals, "_interrupted_at", 0.0)
    monkeypatch.setattr(os, "_exit", leave)
    line.show("the bar")
    with pytest.raises(SystemExit, match="130"):
        signals._heard(signal.SIGINT)
    assert out.getvalue().endswith("the bar\x1b[J\r\r\x1b[J")
