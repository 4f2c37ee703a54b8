"""Signals, taken before torch is imported and read by the control thread.

A Python signal handler runs only between bytecodes of the main thread, so it stays silent while that thread waits in a
collective. `signal.set_wakeup_fd` doesn't: the C-level handler writes the signal's number to a socket at once, and
the control thread (`runtime.control`) reads it there.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)

_reader: socket.socket | None = None
_previous: dict[int, object] = {}
_previous_fd = -1  # an event loop's, in a notebook


def _keep_going(signum: int, frame: object) -> None:
    """The Python half of the handler: nothing to do, the number has been written already."""


def install() -> socket.socket | None:
    """Route `STOP_SIGNALS` to a socket and return its reading end; None outside the main thread (a notebook's worker, say).

    Called first thing, so that a signal that arrives while torch is still being imported isn't lost: it waits in the socket.
    Calling it again returns the same socket.
    """
    global _reader, _previous_fd
    if _reader is not None:
        return _reader
    if threading.current_thread() is not threading.main_thread():
        return None
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    _previous_fd = signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        _previous[number] = signal.signal(number, _keep_going)
    _reader = reader
    return reader


def wait(seconds: float) -> bool:
    """Wait for a signal, at most so long; whether one came (or has come before, and nobody has read it)."""
    reader = install()
    if reader is None:
        time.sleep(seconds)
        return False
    return bool(select.select([reader], [], [], seconds)[0])


def restore() -> None:
    """Give the signals back to whoever had them; used when `train()` returns inside somebody else's process."""
    global _reader
    if _reader is None:
        return
    os.close(signal.set_wakeup_fd(_previous_fd))
    for number, handler in _previous.items():
        with contextlib.suppress(TypeError, ValueError):
            signal.signal(number, handler)  # type: ignore[arg-type]
    _previous.clear()
    _reader.close()
    _reader = None
