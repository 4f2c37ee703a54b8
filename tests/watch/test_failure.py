"""The words of a failure report, and when a rank counts as slow: without starting a run."""

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

import numpy as np
import pytest
import torch
from runs import environment

from dist_train.building.model import splitting_changes
from dist_train.config.errors import ConfigError, Problem
from dist_train.config.schema import DistributedConfig
from dist_train.data.errors import SampleError
from dist_train.data.plan import MicroBatch
from dist_train.data.reading import SampleReader
from dist_train.main import main
from dist_train.runtime.launch import Placement
from dist_train.runtime.world import open_world
from dist_train.task.losses import Loss as EngineLoss
from dist_train.watch import failure, signals
from dist_train.watch.leave import RunFacts, report_config_error
from dist_train.watch.pace import IN_A_ROW, Pace
from dist_train.watch.peers import Peers
from dist_train.watch.processes import owned_by_command, process_state
from dist_train.watch.status import EVALUATION, FORWARD, PHASES, Status, status, status_fd, status_of


def caught(action: object) -> BaseException:
    with pytest.raises(BaseException) as found:
        action()  # type: ignore[operator]
    return found.value


def test_the_users_line_is_the_innermost_outside_torch_and_this_package() -> None:
    error = caught(lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(3, 3))(torch.ones(1, 2)))
    line = failure.user_line("".join(traceback.format_exception(error)))
    assert line.startswith(f"{__file__}:")
    assert "torch.nn.Sequential" in line
    inner = caught(lambda: torch.nn.MSELoss()(torch.ones(2), torch.ones(2)).item.missing)
    assert "test_failure.py" in failure.user_line("".join(traceback.format_exception(inner)))


class MuteError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class EndlessError(Exception):
    def __str__(self) -> str:
        return "x" * 10**6


class OneThatFails(torch.utils.data.Dataset[Any]):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getitem__(self, index: int) -> Any:
        raise self.error


def test_any_exception_of_a_dataset_is_reported_in_one_line() -> None:
    lines = [
        (SystemExit(0), "SystemExit: 0"),
        (MuteError(), r"MuteError: \(its __str__ raises ValueError\)"),
        (ValueError("a\nb"), "a b"),
    ]
    for error, reported in [*lines, (EndlessError(), "EndlessError: x{2000}")]:
        reader = SampleReader(OneThatFails(error), 0)
        with pytest.raises(SampleError, match=rf"reading sample 4 .* failed: .*{reported} \(") as found:
            reader.samples(MicroBatch(0, 0, np.array([4]), 0, 1, True))
        assert len(failure.describe(found.value)["details"]) < 50_000


def test_an_exit_in_the_users_code_is_a_failure_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(error: BaseException) -> Any:
        def command(arguments: object) -> int:
            signals.hold()
            with open_world(DistributedConfig(device="cpu"), Placement()):
                raise error

        return SimpleNamespace(main=command)

    for error in (SystemExit(0), KeyboardInterrupt()):
        monkeypatch.setitem(sys.modules, "dist_train.commands.runs", ends(error))
        assert main(["runs"]) == 1
        assert type(error).__name__ in capsys.readouterr().err


def test_a_fork_of_the_users_code_ends_by_itself() -> None:
    peers = Peers(0, 1)
    for error, code in ((SystemExit(3), 3), (SystemExit(), 0), (ValueError("in the child"), 1)):
        if (child := os.fork()) == 0:
            peers.raised(error)
            os._exit(77)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_a_cause_is_named_before_its_consequences() -> None:
    def read() -> None:
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise RuntimeError("wrapped") from error

    assert 'raise KeyError("the cause")' in failure.user_line("".join(traceback.format_exception(caught(read))))


def test_an_exception_of_a_loader_worker_is_reported_by_its_own_last_line() -> None:
    wrapped = RuntimeError(
        'Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "/my/data.py", '
        "line 7, in __getitem__\n    return self.rows[index]\nKeyError: 7\n"
    )
    record = failure.describe(wrapped)
    assert record["error"] == "KeyError: 7"
    assert record["line"] == "/my/data.py:7, in __getitem__: return self.rows[index]"


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled {} (run with NCCL_DEBUG=INFO for details), "
    "NCCL version 2.28.9\n{}\nLast error:\n{}"
)
UNHANDLED = "ncclUnhandledCudaError: Call to CUDA function failed."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."
CUDA = (
    "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might "
    "be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
Backend, Accelerator = torch.distributed.DistBackendError, torch.AcceleratorError


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB"),
        Accelerator(CUDA.format("out of memory")),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        Backend(NCCL.format("cuda error", UNHANDLED, "Cuda failure 2 'out of memory'")),
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                     "allocate 40000000000000 bytes. Error code 12 (Cannot allocate memory)"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("unable to mmap 131072 bytes from file </torch_812_1_0>: Cannot allocate memory (12)"),
        caught(lambda: torch.empty(1 << 60)),
        caught(lambda: torch.zeros(1).numpy().repeat(1 << 60)),
    ],
)  # fmt: skip
def test_out_of_memory_is_recognized_in_every_wording(error: Exception) -> None:
    text = failure.one_line(error)
    assert failure.is_out_of_memory(text)
    assert "a smaller model or input" in failure.hint(text)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(28, "No space left on device"), "free disk space"),
        (IndexError("Target 10 is out of bounds."), "labels must be"),
        (ValueError("anything"), "one process"),
        (Accelerator(CUDA.format("device-side assert triggered")), "distributed.device=cpu to get the true line"),
        (Accelerator(CUDA.format("an illegal memory access was encountered")), "compute-sanitizer"),
        (Accelerator(CUDA.format("misaligned address")), "compute-sanitizer"),
        (Accelerator(CUDA.format("unspecified launch failure")), "dmesg | grep Xid"),
        (Accelerator(CUDA.format("no kernel image is available for execution on the device")), "get_arch_list()"),
        (Accelerator(CUDA.format("the provided PTX was compiled with an unsupported toolchain.")), "get_arch_list()"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update"), "update the"),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was "
                      "attempted on non supported HW"), "reboot"),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"), "fabricmanager"),
        (Accelerator(CUDA.format("uncorrectable ECC error encountered")), "use another host"),
        (Accelerator(CUDA.format("uncorrectable NVLink error detected during the execution")), "use another host"),
        (Accelerator(CUDA.format("unknown error")), "use another host"),
        (Accelerator(CUDA.format("CUDA-capable device(s) is/are busy or unavailable")), "compute mode"),
        (RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
                      "'spawn' start method"), "data.worker_start_method=spawn"),
        (Backend(NCCL.format("cuda error", UNHANDLED, "Cuda failure 999 'unknown error'")), "use another host"),
        (Backend(NCCL.format("system error", SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-CsYXMW (size 9)")),
         "--shm-size=8g, or"),
        (Backend(NCCL.format("system error", SYSTEM, "socketStartConnect: Connect to 10.0.0.2<41235> failed : Software caused")),
         "NCCL_SOCKET_IFNAME"),
        (Backend(NCCL.format("cuda error", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
                             "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000")), "one GPU per rank"),
        (Backend("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466, "
                 "NumelOut=466, Timeout(ms)=600000) ran for 600004 milliseconds before timing out."), "nccl-rank-N.json"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "too little memory left"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "too little memory left"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "too little memory left"),
        (RuntimeError("DataLoader worker (pid 812) is killed by signal: Bus error. It is possible that dataloader's workers are "
                      "out of shared memory. Please try to raise your shared memory limit."), "more /dev/shm"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_812_3>: Success (0)"), "df -h /dev/shm"),
        (OSError(28, "No space left on device", "/dev/shm/runs/digits/model.pt"), "checkpoint.keep_last=1"),
    ],
)  # fmt: skip
def test_what_to_try_follows_from_the_error(error: Exception, hint: str) -> None:
    text = failure.one_line(error)
    assert not failure.is_out_of_memory(text)
    assert hint in failure.hint(text)


@pytest.mark.parametrize(
    ("loss", "model", "micro", "hint", "halved"),
    [
        (torch.nn.CrossEntropyLoss(), torch.nn.Linear(2, 2), 32, "=16 (it was 32): the same gradient", 16),
        (torch.nn.CrossEntropyLoss(), torch.nn.Linear(2, 2), 1, "not even a single sample fits", None),
        (torch.nn.CrossEntropyLoss(), torch.nn.BatchNorm1d(2), 32, "=16 (it was 32): less memory, but BatchNorm", None),
        (torch.nn.CrossEntropyLoss(), torch.nn.Dropout(0.1), 32, "=16 (it was 32): less memory, but dropout", None),
        (lambda outputs, targets: outputs.mean(), torch.nn.Linear(2, 2), 32, "isn't known that the loss", None),
    ],
)
def test_memory_that_runs_out_is_halved_where_that_changes_nothing_and_else_the_changes_are_named(
    loss: Any, model: torch.nn.Module, micro: int, hint: str, halved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def less_memory() -> tuple[str, int | None]:
        changes = splitting_changes(SimpleNamespace(model=model, loss=EngineLoss(loss), task=None))  # type: ignore[arg-type]
        return failure.less_memory(micro, changes, auto=True)

    def raised(error: Exception, phase: int) -> Any:
        peers = Peers(0, 1)
        peers.attach(RunFacts(less_memory=less_memory))
        monkeypatch.setattr(status, "phase", phase)
        monkeypatch.setattr(peers._exit, "conclude", lambda record: None)
        with owned_by_command():
            return peers.raised(error)

    before = signal.getsignal(signal.SIGCHLD)
    record = raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), FORWARD)
    assert hint in record["try"]
    assert record.get("halved") == halved
    assert "data.eval_batch_size" in raised(MemoryError(), EVALUATION)["try"]
    signal.signal(signal.SIGCHLD, before)


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
def test_the_echo_of_a_lost_peer_is_not_a_ranks_own_failure(error: Exception, is_one: bool) -> None:
    assert failure.is_peer_failure(error) is is_one


def test_the_error_file_is_written_as_torchrun_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    failure.write_error_file("words", "details")
    message = json.loads(path.read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == "words"
    assert int(message["extraInfo"]["timestamp"]) > 0


@pytest.mark.parametrize("launcher", ["none", "torchrun", "restarting", "nproc"])
def test_a_failure_is_printed_once_and_its_traceback_only_where_no_log_has_it(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun prints the error file itself when it gives up; `--nproc` doesn't, and learns the exit code."""
    if launcher != "none":
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1" if launcher == "restarting" else "0")
    if launcher == "nproc":
        monkeypatch.setenv(failure.EXIT_CODE_FILE, str(tmp_path / "code"))
    record = failure.describe(ValueError("wrong"), rank=1)
    failure.report({**record, "logs": "runs/x/logs/rank-1.log"}, rank=1)
    with_log = capsys.readouterr().err
    failure.report(record)
    without = capsys.readouterr().err
    if launcher == "torchrun":
        assert with_log == without == ""
    else:
        assert with_log.startswith("dist_train: rank 1 on ")
        assert with_log.endswith("  traceback  runs/x/logs/rank-1.log\n")
        assert without.startswith("ValueError: wrong\n\ndist_train: rank 1 on ")
    failure.report({**record, "kind": "lost"}, rank=0)
    assert "was lost" in capsys.readouterr().err, "of another rank torchrun knows nothing"
    assert launcher != "nproc" or (tmp_path / "code").read_text() == "1"
    assert launcher == "none" or "was lost" in (tmp_path / "error.json").read_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_config_errors_are_wrapped_and_colored_on_a_terminal_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    message = "expected a positive number, found the string 'fast'"
    report_config_error(ConfigError([Problem("a.yaml:12", "optimizer.lr", message)]), 0)
    plain = f"a.yaml:12: optimizer.lr: {message}\n"
    colored = (
        "\x1b[2ma.yaml:12: \x1b[0m\x1b[31moptimizer.lr: \x1b[0mexpected a\n"
        "    positive number, found the string\n    'fast'\n"
    )
    assert capsys.readouterr().err == (colored if terminal else plain)


def test_the_status_of_a_process_can_be_read_after_it_was_killed() -> None:
    command = [sys.executable, str(Path(__file__).parent / "programs" / "status_writer.py")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert child.stdin is not None
    assert child.stdout is not None
    other = status_of(child.pid, int(child.stdout.readline()))
    assert isinstance(other, Status)
    assert (PHASES[other.phase], other.step) == ("forward", 41)
    child.stdin.write("\n")
    child.stdin.flush()
    child.wait(timeout=10)
    assert (other.phase, other.step) == (FORWARD, 42)
    assert process_state(child.pid) == "gone"
    assert process_state(os.getpid()) == "running"
    assert status_fd is not None
    assert status.step != 42


def test_a_rank_is_named_once_when_it_has_been_slow_for_a_while() -> None:
    pace = Pace(3)

    def hear(seconds: tuple[float, float, float], steps: int) -> None:
        for rank, own in enumerate(seconds):
            pace.update(rank, [steps, own * steps, 0.0], [0, 0.0, 0.0])

    assert pace.spread() == {}
    hear((0.1, 0.1, 0.11), 10)
    assert pace.spread() == pytest.approx(
        {"step_s_min": 0.1, "step_s_max": 0.11, "data_wait_s_min": 0, "data_wait_s_max": 0}
    )
    assert all(pace.slow()[0] is None for _ in range(2 * IN_A_ROW)), "within the usual"
    hear((0.1, 0.3, 0.1), 10)
    reported = [pace.slow() for _ in range(2 * IN_A_ROW)]
    assert [rank for rank, _ in reported if rank is not None] == [1]
    assert reported[IN_A_ROW - 1][0] == 1
    assert "300 ms per step" in reported[IN_A_ROW - 1][1]


def test_a_killed_loader_worker_is_named_though_its_lost_socket_is_seen_first() -> None:
    def handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, handler)
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGCHLD]).start()
    try:
        with owned_by_command():
            record = Peers().raised(ConnectionResetError(104, "Connection reset by peer"))
            assert record is not None
            assert record["error"] == "RuntimeError: DataLoader worker (pid 5) is killed by signal: Killed."
            other = Peers().raised(ValueError("of one's own"))
            os.kill(os.getpid(), signal.SIGCHLD)  # nothing is raised any more
            assert other is not None
            assert "one's own" in other["error"]
    finally:
        signal.signal(signal.SIGCHLD, before)
