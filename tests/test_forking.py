"""A forked process can't tell, and its parent can't, that no Python was started for it (tests/forking.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forking import Popen, RealPopen
from runs import command, environment, forks_workers, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


PROGRAMS = Path(__file__).parent / "programs"
PROBE = (PROGRAMS / "probe.py").read_text()


def told(popen: Any, *args: str, **options: Any) -> tuple[dict[str, Any], bool]:
    """What a Python process with the probe says of itself; whether it was forked."""
    options = {"env": environment(), "stdin": subprocess.DEVNULL, **options}
    process = popen([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    facts, forked = out.splitlines()
    return json.loads(facts), forked == "True"


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize(
    "how", [["-c", PROBE], ["probe.py"], ["-m", "probe"], ["-u", "-m", "probe"]], ids=lambda how: how[0]
)
def test_a_forked_process_finds_itself_as_a_real_one_does(tmp_path: Path, how: list[str], session: bool) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    options = {"cwd": tmp_path, "env": environment(SOMETHING="here"), "start_new_session": session}
    real, forked = told(RealPopen, *how, "an argument", "--and=one", **options)
    assert not forked
    ours, forked = told(Popen, *how, "an argument", "--and=one", **options)
    assert forked
    assert ours == real
    assert ours["ours"] == []
    assert ours["tasks"] == 1


def test_a_sitecustomize_is_executed_first(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nprint('torch' in sys.modules, sys.path[0], len(sys.argv))")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    command = [sys.executable, "-c", "print(2)"]
    done = subprocess.run(command, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=180)
    assert done.stdout.startswith(f"True {tmp_path} ")
    assert done.stdout.endswith("\n2\n")


def test_what_is_read_at_the_start_of_a_process_makes_a_real_one(tmp_path: Path) -> None:
    for extra in ({"OMP_NUM_THREADS": "2"}, {"PYTHONWARNINGS": "ignore"}, {"LD_BIND_NOW": "1"}):
        assert told(Popen, "-c", PROBE, env=environment(**extra))[1] is False
    assert told(Popen, "-P", "-c", PROBE)[1] is False
    assert told(Popen, "-c", PROBE, preexec_fn=lambda: None)[1] is False
    late = {"PYTHONPATH": str(tmp_path.parent), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "RANK": "0"}
    assert told(Popen, "-c", PROBE, env=environment(**late))[1] is True


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("threading", ""),
        ("starts_a_thread", "a fork has none of its parent's threads"),
        ("dist_train", "AssertionError"),
    ],
)
def test_a_template_with_a_thread_or_with_something_of_ours_ends_at_once(tmp_path: Path, module: str, why: str) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1,)).start()"
    )
    code = f"import forking, socket\nforking.PRELOADED = ({module!r},)\nforking._main(socket.socketpair()[0].detach())"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), environment()["PYTHONPATH"]])
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=180)
    assert (done.returncode, why in done.stderr) == (int(bool(why)), True), done.stderr


@pytest.mark.parametrize(
    ("code", "left_with"),
    [
        ("", 0), ("sys.exit()", 0), ("sys.exit(75)", 75), ("sys.exit('a reason')", 1), ("raise ValueError('one')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT), ("os.kill(os.getpid(), 9)", -9), ("os.abort()", -signal.SIGABRT),
        ("os._exit(3)", 3), ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM), ("os.close(1)", 0),
        ("atexit.register(print, 'at the end')", 0), ("threading.Timer(0.2, print, ['late']).start()", 0),
    ],
)  # fmt: skip
def test_it_ends_as_a_real_one_does(tmp_path: Path, code: str, left_with: int) -> None:
    (tmp_path / "ends.py").write_text(
        f"import atexit, os, signal, sys, threading\nprint('begun', flush=True)\n{code}\n"
    )
    ends = []
    for popen in (RealPopen, Popen):
        process = popen(
            [sys.executable, "ends.py"],
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        out, err = process.communicate(timeout=180)
        ends.append((process.returncode, out, err.splitlines()[-1:]))
        assert not Path(f"/proc/{process.pid}").exists()
    assert ends[0] == ends[1]
    assert ends[0][0] == left_with


def test_signals_reach_it_from_its_first_moment_on() -> None:
    for _ in range(20):
        process = Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("popen", "launcher"),
    [(Popen, command(2)[:-2]), (RealPopen, command(2)[:-2]), (RealPopen, ["torchrun", *command(2)[3:-2]])],
    ids=["forked", "real module", "real script"],
)
def test_torchrun_forks_its_workers(tmp_path: Path, popen: Any, launcher: list[str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, **({} if popen is Popen else forks_workers()))
    args = [*launcher, str(PROGRAMS / "torchrun_worker.py")]
    process = popen(args, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    told = process.communicate(timeout=180)[1]
    assert process.returncode == 1, told
    assert "exitcode  : 7" in told
    for rank in "01":
        assert (tmp_path / f"{rank}.txt").read_text() == f"True {process.pid} 2"


def test_workers_of_a_forked_torchrun_end_when_it_is_killed(tmp_path: Path) -> None:
    process = Popen(
        [*command(2), "trainer.duration=10000ep", "run.dir=runs"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 3  # its copy, which forks, and the workers
    process.kill()
    assert process.wait() == -signal.SIGKILL
    while any(running(int(child)) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(int(child)) for child in children)


def running(pid: int) -> bool:
    """Whether a process is there, and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_forked_run_has_the_weights_of_a_real_one(tmp_path: Path) -> None:
    for real in (False, True):
        run(tmp_path, 1, "trainer.duration=5step", f"run.name=real-{real}", "tracking.report=false", real=real)
    one, other = (json.loads((tmp_path / f"runs/real-{real}/result.json").read_text()) for real in (False, True))
    assert one["weights_sha256"] == other["weights_sha256"]


def test_threads_that_start_their_first_processes_at_once_get_their_exit_codes() -> None:
    """Two templates at a time would take each other's children away: exit code 0 for whatever they did."""
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(PROGRAMS.parent), env["PYTHONPATH"]])
    done = RealPopen([sys.executable, str(PROGRAMS / "many_at_once.py")], env=env, stdout=subprocess.PIPE, text=True)
    out, _ = done.communicate(timeout=180)
    assert out == f"{[(code, code) for code in range(1, 7)]}\n"
