"""What is said of a failure, and when a rank counts as slow: without any process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faulty import Loss
from runs import environment

from dist_train.engine.losses import Loss as EngineLoss
from dist_train.engine.parts import Parts
from dist_train.runtime import failure
from dist_train.runtime.here import EVALUATION, FORWARD, PHASES, Here, descriptor, here, of_process
from dist_train.runtime.pace import IN_A_ROW, Pace
from dist_train.runtime.peers import Peers
from dist_train.runtime.processes import process_state


def caught(action: object) -> BaseException:
    with pytest.raises(BaseException) as found:
        action()  # type: ignore[operator]
    return found.value


def test_the_users_line_is_the_innermost_outside_torch_and_this_package() -> None:
    error = caught(lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(3, 3))(torch.ones(1, 2)))
    line = failure.user_line("".join(traceback.format_exception(error)))
    assert line.startswith(f"{__file__}:")
    assert "torch.nn.Sequential" in line
    inner = caught(lambda: Loss()(torch.ones(2), torch.ones(2)).item.missing)
    assert "test_words.py" in failure.user_line("".join(traceback.format_exception(inner)))


def test_a_cause_goes_before_what_it_led_to() -> None:
    def read() -> None:
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise RuntimeError("wrapped") from error

    assert 'raise KeyError("the cause")' in failure.user_line("".join(traceback.format_exception(caught(read))))


def test_an_exception_of_a_loader_worker_is_told_by_its_own_last_line() -> None:
    wrapped = RuntimeError(
        'Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "/my/data.py", '
        "line 7, in __getitem__\n    return self.rows[index]\nKeyError: 7\n"
    )
    record = failure.describe(wrapped)
    assert record["error"] == "KeyError: 7"
    assert record["line"] == "/my/data.py:7, in __getitem__: return self.rows[index]"


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "a smaller model"),
        (OSError(28, "No space left on device"), "make room"),
        (RuntimeError("CUDA error: device-side assert triggered"), "CUDA_LAUNCH_BLOCKING"),
        (IndexError("Target 10 is out of bounds."), "labels must be"),
        (ValueError("anything"), "one process"),
    ],
)
def test_what_to_try_follows_from_the_error(error: Exception, hint: str) -> None:
    assert hint in failure.advice(error, failure.one_line(error))


@pytest.mark.parametrize(
    ("loss", "model", "micro", "hint", "halved"),
    [
        (torch.nn.CrossEntropyLoss(), torch.nn.Linear(2, 2), 32, "=16 (it was 32): the same gradient", 16),
        (torch.nn.CrossEntropyLoss(), torch.nn.Linear(2, 2), 1, "not even one sample at a time fits", None),
        (torch.nn.CrossEntropyLoss(), torch.nn.BatchNorm1d(2), 32, "=16 (it was 32): less memory, but BatchNorm", None),
        (torch.nn.CrossEntropyLoss(), torch.nn.Dropout(0.1), 32, "=16 (it was 32): less memory, but dropout", None),
        (lambda outputs, targets: outputs.mean(), torch.nn.Linear(2, 2), 32, "isn't known that the loss", None),
    ],
)
def test_memory_that_runs_out_is_halved_where_that_changes_nothing_and_else_it_is_told_what_changes(
    loss: Any, model: torch.nn.Module, micro: int, hint: str, halved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, ended = Peers(0, 1), []
    peers.micro_batch_size, peers.may_halve, peers.may_exit = micro, True, True
    peers.changes = lambda: Parts.what_splitting_changes(SimpleNamespace(model=model, loss=EngineLoss(loss)))  # type: ignore[arg-type]
    monkeypatch.setattr(peers, "_conclude", ended.append)
    monkeypatch.setattr(here, "phase", FORWARD)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    peers.raised(error)
    (record,) = ended or [error.dist_train_record]  # type: ignore[attr-defined]
    assert hint in record["try"]
    assert record.get("halved") == halved
    monkeypatch.setattr(here, "phase", EVALUATION)
    peers.raised(other := MemoryError())
    assert "data.eval_batch_size" in other.dist_train_record["try"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionRefusedError("Connection refused"), False),
        (OSError("Broken pipe"), False),
    ],
)
def test_what_a_rank_hears_of_a_peer_that_has_gone_is_not_its_own_failure(error: Exception, is_one: bool) -> None:
    assert failure.is_peer_failure(error) is is_one


def test_torchrun_is_told_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    failure.write_error_file("words", "details")
    message = json.loads(path.read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == "words"
    assert int(message["extraInfo"]["timestamp"]) > 0


def test_where_a_process_stood_can_be_read_after_it_was_killed() -> None:
    code = (
        "import os, time; from dist_train.runtime.here import here, descriptor, FORWARD\n"
        "here.phase, here.step = FORWARD, 41\nprint(descriptor, flush=True)\ninput()\nhere.step = 42\nos.kill(os.getpid(), 9)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert child.stdin is not None
    assert child.stdout is not None
    other = of_process(child.pid, int(child.stdout.readline()))
    assert isinstance(other, Here)
    assert (PHASES[other.phase], other.step) == ("forward", 41)
    child.stdin.write("\n")
    child.stdin.flush()
    child.wait(timeout=10)
    assert (other.phase, other.step) == (FORWARD, 42)
    assert process_state(child.pid) == "gone"
    assert process_state(os.getpid()) == "running"
    assert descriptor is not None
    assert here.step != 42


def test_a_rank_is_named_once_when_it_has_been_slow_for_a_while() -> None:
    pace = Pace(3)

    def hear(seconds: tuple[float, float, float], steps: int) -> None:
        for rank, own in enumerate(seconds):
            pace.hear(rank, [steps, own * steps, 0.0], [0, 0.0, 0.0])

    assert pace.spread() == {}
    hear((0.1, 0.1, 0.11), 10)
    assert pace.spread() == pytest.approx(
        {"step_s_min": 0.1, "step_s_max": 0.11, "data_wait_s_min": 0, "data_wait_s_max": 0}
    )
    assert all(pace.slow()[0] is None for _ in range(2 * IN_A_ROW)), "within the usual"
    hear((0.1, 0.3, 0.1), 10)
    told = [pace.slow() for _ in range(2 * IN_A_ROW)]
    assert [rank for rank, _ in told if rank is not None] == [1]
    assert told[IN_A_ROW - 1][0] == 1
    assert "300 ms a step" in told[IN_A_ROW - 1][1]


def test_a_killed_loader_worker_is_named_though_its_socket_is_missed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")

    monkeypatch.setattr(Peers, "may_exit", True)
    before = signal.signal(signal.SIGCHLD, handler)
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGCHLD]).start()
    try:
        Peers().raised(error := ConnectionResetError(104, "Connection reset by peer"))
        told = error.dist_train_record["error"]  # type: ignore[attr-defined]
        assert told == "RuntimeError: DataLoader worker (pid 5) is killed by signal: Killed."
        Peers().raised(other := ValueError("of one's own"))
        os.kill(os.getpid(), signal.SIGCHLD)  # nothing is raised any more
        assert "one's own" in other.dist_train_record["error"]  # type: ignore[attr-defined]
    finally:
        signal.signal(signal.SIGCHLD, before)
