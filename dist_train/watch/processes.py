"""Processes of this machine, as others see them."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import resource
import signal
import socket
import sys
import tempfile
from typing import NoReturn

_PARENT = os.getppid()  # in a container the launcher may well be process 1
AGAIN = "DIST_TRAIN_STARTED_AGAIN"  # how often this process has begun anew


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies, so that a killed torchrun leaves no orphans (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != _PARENT:  # it was gone before the call
            os._exit(1)


@functools.cache
def machine() -> str:
    """What two processes share that can look each other up by pid: host, boot and pid namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            parts.append(file.read().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_state(pid: int) -> str:
    """`running`, `stopped` (by a signal or a debugger) or `gone` (a zombie has gone)."""
    fields = _stat(pid)
    if fields:
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(fields[0], "running")
    try:
        os.kill(pid, 0)  # no /proc (macOS), or not to be read
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass  # another user's, and there
    return "running"


def started(pid: int) -> str:
    """When that process began (in clock ticks after the boot), which tells it from a later one with its pid; "" if unknown."""
    return (_stat(pid) or [""] * 20)[19]


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process: `man proc_pid_stat` from its third field on."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def raise_file_limit() -> None:
    """As many open files as the system lets this process have: batches on their way from workers take one a tensor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS has a hard limit that can't be had
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start_again() -> NoReturn:
    """This process begins anew with the same command, under the same pid: no launcher sees it.

    The store of torchrun's agent still holds the keys of before: the count keeps the groups of processes apart.
    """
    env = {**os.environ, AGAIN: str(int(os.environ.get(AGAIN, "0")) + 1)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
