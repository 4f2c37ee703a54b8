"""Which signals stop, when, and whom they leave alone; in a process of its own, since handlers are the process's."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from runs import environment

from dist_train.main import main
from dist_train.watch import signals
from dist_train.watch.processes import is_owned

BEGIN = """
import asyncio, ctypes, multiprocessing, os, signal, subprocess, sys, threading, time
from dist_train.watch import signals

def me(number):
    os.kill(os.getpid(), number)

def taken(seconds=0.25):
    got = []
    while more := signals.take(seconds):
        got += more
    return sorted(got)
"""
# What runs after BEGIN, and what it prints.
CASES = {
    "held ones reach the control thread while the main thread is busy": (
        "signals.hold(); threading.Timer(0.1, me, [15]).start(); threading.Timer(0.2, me, [10]).start()\n"
        "threading.Thread(target=lambda: (time.sleep(0.6), print(taken()))).start(); ctypes.PyDLL(None).usleep(400000)",
        "[10, 15]",
    ),
    "a child that ends, and a user's own handlers, stop nothing": (
        "heard = []\n"
        "for number in (signal.SIGCHLD, signal.SIGALRM, signal.SIGWINCH, signal.SIGUSR2):\n"
        "    signal.signal(number, lambda number, frame: heard.append(number))\n"
        "signals.hold(); subprocess.run(['true'])\n"
        "for number in (signal.SIGALRM, signal.SIGWINCH, signal.SIGUSR2): me(number)\n"
        "print(taken(), sorted(heard) == sorted([17, 14, 28, 12]))",
        "[] True",
    ),
    "the children of a user's pool die of their own signals": (
        "signals.hold()\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool: print(sum(pool.map(abs, [-1, 2])))\n"
        "print(taken())",
        "3\n[]",
    ),
    "an event loop takes its own signals, and stops still stop": (
        "signals.hold()\n"
        "async def main():\n"
        "    came = asyncio.Event(); asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, came.set)\n"
        "    me(signal.SIGUSR2); await asyncio.wait_for(came.wait(), 5); me(15)\n"
        "asyncio.run(main()); print(taken()); me(1); print(taken())",
        "[15]\n[1]",
    ),
    "an event loop around the training has its descriptor back, and hears what isn't a stop": (
        "import socket\n"
        "theirs, mine = socket.socketpair(); mine.setblocking(False); signal.set_wakeup_fd(mine.fileno())\n"
        "signal.signal(signal.SIGUSR2, lambda *_: None); signals.hold(); me(15); me(signal.SIGUSR2)\n"
        "print(taken(), list(theirs.recv(9))); signals.restore()\n"
        "print(signal.set_wakeup_fd(-1) == mine.fileno(), signal.getsignal(15) == signal.SIG_DFL)",
        "[15] [12]\nTrue True",
    ),
    "a hangup that nohup ignores is ignored": (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); signals.hold(); me(signal.SIGHUP); print(taken())",
        "[]",
    ),
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + code], env=environment(), capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("case", CASES)
def test_signals_that_mean_stop_and_no_others_are_taken(case: str) -> None:
    code, printed = CASES[case]
    done = run(code)
    assert done.stdout.strip() == printed, done.stderr


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_before_the_run_has_started_each_of_them_ends_the_process(number: str, code: int) -> None:
    done = run(f"signals.install(); threading.Timer(0.1, me, [signal.{number}]).start(); time.sleep(20)")
    assert done.returncode == code
    assert done.stderr == f"dist_train: {number} before the run started: nothing was written\n"


def test_other_commands_take_ctrl_c_as_python_does_unless_their_main_thread_cannot() -> None:
    begin = "signals.install(stops=False); threading.Timer(0.1, me, [signal.SIGINT]).start()\n"
    done = run(begin + "try: time.sleep(20)\nexcept KeyboardInterrupt: print('as ever')")
    assert done.stdout == "as ever\n"
    stubborn = "while True:\n    try: time.sleep(20)\n    except KeyboardInterrupt: pass"
    assert run(begin + stubborn).returncode == 130


def test_main_leaves_nothing_behind_for_a_later_train_in_the_same_process(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    assert main(["train", "--config", "none.yaml"]) == 2
    assert main(["config", "--schema"]) == 0
    assert not is_owned()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
    assert "none.yaml" in capsys.readouterr().err
