"""One rank fails or hangs: all exit within seconds, and the last lines of the terminal say once who, where and why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failing import CONFIG
from runs import environment, rows, run, start

from dist_train.watch.processes import process_state

LOST = "its process ended without a message"
# kind: phase, what the line `error` says, what the user's line says, what to try
KINDS = {
    "model": ("step 13 (forward)", "RuntimeError: a model that fails", "raise RuntimeError", "one process"),
    "loss": ("step 13 (forward)", "KeyError: 'a loss that fails'", "raise KeyError", "one process"),
    "dataset": ("(waiting for data)", "OSError: a file that is torn", "raise OSError", "that sample"),
    "worker": ("", "oader worker", "", "/dev/shm"),  # torch raises wherever the main thread is
    "optimizer": ("step 13 (update)", "ArithmeticError: an optimizer", "raise ArithmeticError", "one process"),
    "callback": ("step 13 (callback)", "LookupError: a callback", "raise LookupError", "one process"),
    "kill": ("step 13 (forward)", LOST, "", "out-of-memory killer"),
    "exit": ("step 13 (forward)", LOST, "", "out-of-memory killer"),
    "segfault": ("step 13 (forward)", LOST, "", "out-of-memory killer"),
    "memory": ("step 13 (forward)", "MemoryError", "raise MemoryError", "trainer.micro_batch_size="),
    "allocation": ("step 13 (forward)", "allocate", "torch.empty", "trainer.micro_batch_size="),
    "nan": ("step 13 (update)", "NonFiniteError: step 13: the loss or a gradient is inf or nan", "", "optimizer.lr"),
    "evaluation": ("step 19 (evaluation)", "ValueError: an evaluation", "raise ValueError", "one process"),
    "save": ("", "No space left on device", "raise OSError", "free disk space"),
}
KILLED = ("kill", "exit", "segfault")
ONLY_RANK_ZERO = ("save",)
FULL = [
    (kind, rank, processes)
    for kind in KINDS
    for rank, processes in ((0, 1), (0, 2), (1, 2))
    if not (rank and kind in ONLY_RANK_ZERO) and not (processes == 1 and kind in KILLED)
]
QUICK = [("model", 1, 2), ("kill", 0, 2), ("worker", 0, 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's project."""
    shutil.copy(Path(__file__).parent / "faulty.py", tmp_path)
    (tmp_path / "faulty.yaml").write_text(CONFIG)
    return tmp_path


def fail(
    folder: Path, kind: str, rank: int, processes: int, *overrides: str
) -> tuple[float, int, list[str], list[str]]:
    """Run it; seconds from the failure until all have exited, exit code, the last lines of the ranks, torchrun's report."""
    workers = "data.num_workers=1" if kind == "worker" else "data.num_workers=0"
    process = start(folder, processes, "--config", "faulty.yaml", workers, *overrides, env={"FAIL": f"{kind}@{rank}"})
    # What torchrun says on stderr follows what its workers say.
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("it never ended\n" + "\n".join(process.communicate())) from None
    ended = time.time()
    print(out, err, sep="\n")
    seconds = ended - float((folder / "happened").read_text())
    print(f"{kind} on rank {rank} of {processes}: all exited after {seconds:.1f} s")
    lines = [line for line in err.splitlines() if not line.startswith(("W1", "E1", "W0", "E0", "[rank"))]
    report = next((k for k, line in enumerate(lines) if "torch/distributed/run.py" in line), len(lines) + 4) - 4
    return seconds, process.returncode, lines[:report] if processes > 1 else lines, lines[report:]


def assert_failure_is_reported(folder: Path, kind: str, rank: int, processes: int) -> None:
    phase, error, code, hint = KINDS[kind]
    seconds, exit_code, lines, report = fail(folder, kind, rank, processes)
    assert exit_code == 1
    assert seconds < 10
    lines = lines if kind in KILLED else lines + report  # torchrun shows what the rank that has left first has said
    summaries = [k for k, line in enumerate(lines) if "dist_train: rank" in line]
    assert len(summaries) == 1, "reported once"
    assert len(lines) - summaries[0] <= 15
    summary = "\n".join(lines[summaries[0] :])
    assert kind in KILLED or "most recent call" not in summary, "the log has it"
    name = f"rank {rank} of 2" if processes == 2 else "rank 0"
    if kind != "nan":  # the sum over ranks has it, so all find it at once
        assert f"dist_train: {name} on {os.uname().nodename}" in summary
    for part in (phase, error, code, hint):
        assert part in summary
    if phase.startswith("step 13"):
        assert "samples" in summary
    if code:
        assert "faulty.py:" in summary
    status = json.loads((folder / "runs/run/status.json").read_text())
    assert status["state"] == "failed"
    assert error in status["error"]
    end = json.loads((folder / "runs/run/attempts.jsonl").read_text().splitlines()[-1])
    assert end["event"] == "end"
    assert end["state"] == "failed"
    for survivor in range(processes):
        if kind not in KILLED or survivor != rank:
            assert "most recent call" in (folder / f"runs/run/logs/rank-{survivor}.log").read_text()


@pytest.mark.parametrize(("kind", "rank", "processes"), QUICK)
def test_a_crash_of_one_ends_all_and_is_reported_once(folder: Path, kind: str, rank: int, processes: int) -> None:
    assert_failure_is_reported(folder, kind, rank, processes)


@pytest.mark.chaos
@pytest.mark.parametrize(("kind", "rank", "processes"), [case for case in FULL if case not in QUICK])
def test_a_crash_of_any_kind_anywhere_ends_all(folder: Path, kind: str, rank: int, processes: int) -> None:
    assert_failure_is_reported(folder, kind, rank, processes)


@pytest.mark.parametrize(("rank", "processes"), [pytest.param(0, 1, marks=pytest.mark.chaos), (1, 2)])
def test_out_of_memory_halves_the_micro_batches_of_all_and_continues_and_a_slow_rank_is_named_once(
    folder: Path, rank: int, processes: int
) -> None:
    options = ("loss._target_=torch.nn.CrossEntropyLoss", "trainer.log_every=4step", "checkpoint.every=1000step")
    duration, fails = "trainer.duration=60step", {"FAIL": f"large+slow@{rank}"}
    done = run(folder, processes, "--config", "faulty.yaml", *options, duration, env=fails)
    assert done.stderr.count("MemoryError; all ranks restart with micro-batches of 16") == 1
    assert "without a message" not in done.stderr
    place = folder / "runs/run"
    assert json.loads((place / "micro_batches.json").read_text())["micro_batch_size"] == 16
    assert json.loads((place / "status.json").read_text())["state"] == "completed"
    again = run(folder, 1, "--config", "faulty.yaml", *options, "trainer.duration=61step", env=fails)
    assert "restart" not in again.stderr, "it is kept on resume"
    if processes > 1:
        reported = [line for line in done.stderr.splitlines() if " is slow: " in line]
        assert len(reported) == 1
        assert reported[0].startswith(f"warning: rank {rank} on {os.uname().nodename} is slow: ")
        spread = [row for row in rows(place, "train", clock=True) if "step_s_max" in row]
        assert spread
        assert all(row["step_s_max"] > 0.06 for row in spread[2:])
        assert all(row["step_s_max"] > row["step_s_min"] >= row["data_wait_s_min"] for row in spread[2:])


def test_a_single_rank_dies_with_its_torchrun_and_the_next_start_says_what_it_could_not(folder: Path) -> None:
    process = start(folder, 0, "--config", "faulty.yaml", env={"FAIL": "hang-model@0"}, real=True)
    while not (folder / "happened").exists():
        assert process.poll() is None
        time.sleep(0.05)
    [worker] = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    out, _ = process.communicate(timeout=10)  # its worker had these pipes too
    deadline = time.monotonic() + 5  # its pipes are closed a moment before it is a zombie
    while process_state(int(worker)) != "gone":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "dist_train: " not in out
    done = run(folder, 1, "--config", "faulty.yaml", "trainer.duration=5step")
    assert "attempt 0" in done.stderr
    assert "ended without a message" in done.stderr
    assert "out-of-memory killer" in done.stderr


HANGS = {
    "hang-model": "forward, step 13",
    "hang-dataset": "waiting for data, step ",
    "hang-save": "saving, step ",
    "stop": "forward, step 13, no heartbeat for ",
    "deaf": "forward, step 13, no heartbeat for ",
    "hang-evaluation": "evaluation, step 19",
}


def check_hang(folder: Path, kind: str, rank: int, processes: int) -> None:
    seconds, exit_code, lines, _ = fail(folder, kind, rank, processes, "distributed.hang_timeout=5s")
    text = "\n".join(lines)
    assert exit_code == 1
    assert text.count("dist_train: rank") == 1
    # A save is waited for by the next one only, a few steps later.
    assert seconds < 5 + 5 + 5, "hang_timeout + 5 s, and torchrun's own end"
    assert f"rank {rank} on {os.uname().nodename}" in text
    assert HANGS[kind] in text
    assert "no progress for 5 s" in text
    assert ("; the others wait for it" in text) == (processes > 1)
    for other in range(processes):
        if kind not in ("stop", "deaf") or other != rank:
            log = (folder / f"runs/run/logs/rank-{other}.log").read_text()
            assert "most recent call first" in log, "the stacks of all threads"
    status = json.loads((folder / "runs/run/status.json").read_text())
    assert status["state"] == "failed"
    assert "no progress" in status["error"]


@pytest.mark.parametrize(("kind", "rank", "processes"), [("hang-dataset", 0, 1), ("deaf", 0, 2)])
def test_a_hang_names_the_rank_that_the_others_wait_for(folder: Path, kind: str, rank: int, processes: int) -> None:
    check_hang(folder, kind, rank, processes)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("kind", "rank", "processes"),
    [
        *(("hang-model", 1, 2), ("hang-dataset", 1, 2), ("hang-save", 0, 2), ("stop", 1, 2), ("stop", 0, 2)),
        *(("hang-evaluation", 0, 2), ("hang-evaluation", 1, 2), ("hang-model", 0, 1), ("hang-model", 0, 2)),
    ],
)
def test_a_hang_anywhere_is_named(folder: Path, kind: str, rank: int, processes: int) -> None:
    check_hang(folder, kind, rank, processes)


def test_a_rank_alone_in_c_code_that_holds_the_gil_ends_with_its_stacks() -> None:
    program = Path(__file__).parent / "programs" / "holds_the_gil.py"
    line = 1 + program.read_text().splitlines().index("    ctypes.PyDLL(None).sleep(60)")
    began = time.monotonic()
    command = [sys.executable, str(program)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    assert f"line {line} in <module>" in done.stderr
    assert time.monotonic() - began < 10
