"""Processes of this machine: who owns this one, whether others are alive, how they end."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from typing import NoReturn

_PARENT = os.getppid()  # in a container the launcher may well be process 1
_RESTARTS = "DIST_TRAIN_RESTARTS"
_owned = False


@contextlib.contextmanager
def owned_by_command() -> Iterator[None]:
    """Inside, this process belongs to a command of dist_train, which may end it: it isn't a notebook."""
    global _owned
    _owned = True
    try:
        yield
    finally:
        _owned = False


def is_owned() -> bool:
    """Whether a command of dist_train owns this process, so that a crash or a hang may end it."""
    return _owned


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies, so that a killed torchrun leaves no orphans (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != _PARENT:  # it died before the call
            os._exit(1)


@functools.cache
def machine() -> str:
    """Equal for two processes that can look each other up by pid: host, boot and pid namespace."""
    name = socket.gethostname()
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        name += f" {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return name


def process_state(pid: int) -> str:
    """`running`, `stopped` (by a signal or a debugger) or `gone` (a zombie is gone)."""
    fields = _stat(pid)
    if fields:
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(fields[0], "running")
    try:
        os.kill(pid, 0)  # no /proc (macOS), or not readable
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass  # another user's, and alive
    return "running"


def started(pid: int) -> str:
    """Start time of a process (clock ticks since boot), which distinguishes it from a later one with its pid; "" if unknown."""
    return (_stat(pid) or [""] * 20)[19]


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process: `man proc_pid_stat` from its third field on."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def kill_later(pids: Iterable[int], seconds: float) -> None:
    """SIGKILL those that are still running then, even if this process has exited: a shell in a session of its own does it."""
    kills = [f"grep -qw {started(pid)} /proc/{pid}/stat && kill -KILL {pid}" for pid in pids if started(pid)]
    if kills:
        with contextlib.suppress(OSError):
            quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            subprocess.Popen(["sh", "-c", "; ".join([f"sleep {seconds}", *kills])], start_new_session=True, **quiet)  # type: ignore[call-overload]


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one: batches on their way from workers take one per tensor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS reports a hard limit that it refuses
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_fork(error: BaseException) -> NoReturn:
    """End a child that the user's code has forked, as Python would for what it raised, without reporting a failure of the run."""
    ends = error.__cause__ if isinstance(error.__cause__, SystemExit) else error
    if not isinstance(ends, SystemExit):
        traceback.print_exception(error)
        os._exit(1)
    os._exit(ends.code if isinstance(ends.code, int) else int(ends.code is not None))


def restarts() -> int:
    """How often this process has restarted itself."""
    return int(os.environ.get(_RESTARTS, "0"))


def restart() -> NoReturn:
    """Replace this process by the same command under the same pid: no launcher notices."""
    env = {**os.environ, _RESTARTS: str(restarts() + 1)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
