"""Processes of this machine, as others see them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import tempfile
from typing import NoReturn

AGAIN = "DIST_TRAIN_STARTED_AGAIN"  # how often this process has begun anew


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
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "running")
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return "gone"
    try:  # no /proc (macOS)
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass
    return "running"


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def start_again() -> NoReturn:
    """This process begins anew with the same command, under the same pid: no launcher sees it.

    The store of torchrun's agent still holds the keys of before: the count keeps the groups of processes apart.
    """
    env = {**os.environ, AGAIN: str(int(os.environ.get(AGAIN, "0")) + 1)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
