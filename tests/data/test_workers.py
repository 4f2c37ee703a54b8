from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import environment
from torch.utils.data import IterableDataset

from dist_train.config.schema import DataConfig
from dist_train.data import DataError, Digits
from dist_train.data.errors import SampleError
from dist_train.data.loader import TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions
from dist_train.data.workers import resolve_workers, run_signals_blocked
from dist_train.runtime.world import usable_cpus
from dist_train.watch.processes import raise_file_limit

PROGRAMS = Path(__file__).parent / "programs"
JOB = PROGRAMS / "worker_job.py"
GROUP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


@contextlib.contextmanager
def job(method: str, action: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(JOB), method, action],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def line(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith(word):
            return text
    raise AssertionError(f"the job ended without saying {word}")


def gone(pid: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def storm(method: str, action: str) -> tuple[int, str]:
    """Signals to the process group from before the workers start until all is read; exit code and output."""
    with job(method, action) as process:
        line(process, "HANDLERS")
        sent = 0
        while process.poll() is None and sent < 1500:
            os.killpg(process.pid, GROUP_SIGNALS[sent % len(GROUP_SIGNALS)])
            sent += 1
            time.sleep(0.01)
        text, _ = process.communicate(timeout=180)
        assert sent > 20 or process.returncode, text  # without protection it may end sooner
        return process.returncode, text


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_signals_to_the_group_kill_no_worker_even_while_it_starts_and_leaving_without_closing_ends_it(
    method: str,
) -> None:
    code, text = storm(method, "read")  # whose end would otherwise be waited for without end
    assert code == 0, text
    (answer,) = (line for line in text.splitlines() if line.startswith("WORKERS "))
    pid = int(answer.removeprefix("WORKERS "))
    assert gone(pid, within=5)


def test_without_the_block_the_same_signals_kill_workers() -> None:
    code, text = storm("spawn", "bare")
    assert code != 0
    assert "WORKERS" not in text


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_dies_with_its_parent_even_inside_a_slow_read(method: str) -> None:
    with job(method, "hang") as process:
        pid = int(line(process, "WORKERS").split()[1])
        assert alive(pid)
        process.kill()
        process.wait()
        assert gone(pid, within=20)


def test_the_block_ends_with_the_start_of_the_workers() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with run_signals_blocked():
        assert set(GROUP_SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_the_number_of_workers_is_what_was_asked_for() -> None:
    assert resolve_workers(3, Digits("val")) == 3
    assert resolve_workers(0, range(10)) == 0
    with pytest.raises(DataError, match=r"data.num_workers: expected at most \d+ .* found 100000000"):
        resolve_workers(100_000_000, range(10))


class Tensors:
    """Samples of many tensors, which travel as a file each; the item at `last` ends the process that reads it."""

    def __init__(self, last: int = -1) -> None:
        self.last = last

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return {str(k): torch.zeros(4) for k in range(1 if self.last >= 0 else 100)}


def read_all(dataset: Any) -> None:
    config = DataConfig(train=object(), num_workers=2, prefetch_factor=8)
    loader = TrainLoader(dataset, Plan(0, 16, 2), LoaderOptions(config, 0, torch.device("cpu")), micro_batch_size=2)
    try:
        for work in loader.steps(0, 8):
            list(work.micro_batches)
    finally:
        loader.close()


def test_workers_that_cannot_send_fail_at_once_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, limits[1]))
    try:
        with pytest.raises(
            (DataError, SampleError), match=r"(Too many open files|ancdata).*ulimit -n.*prefetch_factor"
        ):
            read_all(Tensors())
    finally:
        raise_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    read_all(Tensors())  # what was wrong was the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(DataError, match=r"worker died without a Python error \(pid \d+ was killed by SIGKILL"):
        read_all(Tensors(last=5))
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    with pytest.raises(DataError, match=r"AF_UNIX path too long; .*107 characters at most.*set TMPDIR=/tmp"):
        read_all(Tensors())
    assert time.monotonic() - began < 60  # torch alone waits for ever


def test_auto_shares_the_cpus_between_local_ranks_and_needs_none_for_whole_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "max 100000\n")
    chosen: dict[Any, int] = {n: resolve_workers("auto", range(10), local_ranks=n) for n in (1, 2, 4, 8)}
    assert chosen == {1: 8, 2: 7, 4: 3, 8: 0}
    assert resolve_workers("auto", Digits("val")) == 0
    assert resolve_workers("auto", Digits("val"), collate=list) == 8
    assert resolve_workers("auto", Endless()) == 1
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "250000 100000\n")
    assert usable_cpus() == 2


def test_a_fork_that_hangs_before_its_interpreter_runs_is_done_again(tmp_path: Path) -> None:
    """As on CPython before 3.11.8, now and then (its issue 112275); here the first two children of three do."""
    command = [sys.executable, str(PROGRAMS / "hanging_forks.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"batches": [[0, 1], [2, 3], [4, 5]], "forks": 3, "left": []}
