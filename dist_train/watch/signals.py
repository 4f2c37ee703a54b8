"""The signals that request a stop, from the first line of a process on.

A Python signal handler runs only between bytecodes of the main thread, so it stays silent while that thread waits in a
collective. `signal.set_wakeup_fd` doesn't: the C-level handler writes the signal's number to a socket at once, and a thread
reads it there. Until the run has started a signal ends the process; from `hold()` on it waits for the control thread
(`watch.control`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from dist_train.tracking.terminal import close_bottom_line

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
_GRACE = 3.0  # seconds for a better way to end


class _Listener:
    """The socket of this process, the thread that reads it, and what was installed before."""

    def __init__(self, numbers: tuple[signal.Signals, ...], reports: bool):
        self.numbers, self.reports = numbers, reports
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.theirs = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)  # an event loop's
        self.previous: dict[int, object] = {}
        threading.Thread(target=self._run, name="dist_train-signals", daemon=True).start()

    def take_over(self) -> None:
        """Let the stop signals only write to the socket, also where user code has used the wakeup descriptor since."""
        self.numbers = STOP_SIGNALS
        for number in self.numbers:
            ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # by nohup
            if number not in self.previous and not ignored:
                self.previous[number] = signal.signal(number, self._python_handler)
        theirs = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        if theirs != self.writer.fileno():
            self.theirs = theirs  # of an event loop that is closed, say

    def _python_handler(self, number: int, frame: object) -> None:
        """The number is in the socket by now, unless an event loop has taken the wakeup descriptor."""
        mine = self.writer.fileno()
        theirs = signal.set_wakeup_fd(mine, warn_on_full_buffer=False)
        if theirs != mine:
            self.writer.send(bytes([number]))
            with contextlib.suppress(OSError, ValueError):
                signal.set_wakeup_fd(theirs if theirs >= 0 else mine, warn_on_full_buffer=False)

    def _run(self) -> None:
        # The C handler writes the number of every signal that has a Python handler: SIGCHLD's too, once torch has installed
        # its own for loader workers, and a user's SIGALRM.
        while numbers := self.reader.recv(64):
            others = bytes(number for number in numbers if number not in self.numbers)
            with contextlib.suppress(OSError):
                if others and self.theirs >= 0:
                    os.write(self.theirs, others)
            for number in numbers:
                if number in self.numbers:
                    _heard(number)
        self.reader.close()

    def restore(self, forked: bool = False) -> None:
        """Restore everything (main thread); in a fork, the descriptors belong to the parent."""
        now = signal.set_wakeup_fd(-1)
        back = -1 if forked else self.theirs if now == self.writer.fileno() else now
        with contextlib.suppress(OSError, ValueError):
            signal.set_wakeup_fd(back)
        for number, handler in self.previous.items():
            with contextlib.suppress(TypeError, ValueError):
                signal.signal(number, handler)  # type: ignore[arg-type]
        if not forked:
            self.writer.shutdown(socket.SHUT_RDWR)  # the thread ends
        self.writer.close()


_listener: _Listener | None = None
_arrived = threading.Condition()
_pending: list[int] = []
_held = False  # whether the run has started
_interrupted_at: float | None = None
_before_end: Callable[[], object] | None = None  # informs the other ranks


def install(stops: bool = True, reports: bool = True) -> None:
    """Listen from here on; does nothing outside the main thread (in a notebook's worker, say).

    With `stops` each of `STOP_SIGNALS` ends this process, with exit code 128 + its number, until somebody calls `hold()`, and
    is reported if `reports` (rank 0); else only Ctrl-C is heard, where the main thread can't take its KeyboardInterrupt.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        return
    _listener = _listener or _Listener(STOP_SIGNALS if stops else (signal.SIGINT,), reports)
    if stops:
        _listener.take_over()


def hold() -> None:
    """The run starts: from here on signals are held until they are taken."""
    global _held
    if threading.current_thread() is threading.main_thread():
        _held = True
        install()


def held() -> bool:
    """Whether the run has started, so that a KeyboardInterrupt of the main thread isn't Ctrl-C's."""
    return _held


def take(seconds: float, closing: threading.Event | None = None) -> list[int]:
    """The signals held so far; waits for one, at most that long, and no longer than until `end_take` sets `closing`."""
    with _arrived:
        _arrived.wait_for(lambda: bool(_pending) or (closing is not None and closing.is_set()), timeout=seconds)
        taken = _pending[:]
        _pending.clear()
    return taken


def end_take(closing: threading.Event) -> None:
    """Set an event that `take` waits for as well."""
    with _arrived:
        closing.set()
        _arrived.notify_all()


def before_end(inform: Callable[[], object] | None) -> None:
    """What to do, for some seconds at most, when a signal ends this process before the run has started."""
    global _before_end
    _before_end = inform


def restore() -> None:
    """Restore the previous signal handlers; for a `train()` that returns inside somebody else's process."""
    global _listener, _held, _interrupted_at, _before_end
    if threading.current_thread() is not threading.main_thread():
        return  # it has taken none
    listener, _listener, _held, _interrupted_at, _before_end = _listener, None, False, None, None
    _pending.clear()
    if listener is not None:
        listener.restore()


def _heard(number: int) -> None:
    global _interrupted_at
    now, before = time.monotonic(), _interrupted_at
    if number == signal.SIGINT:
        # Ctrl-C arrives twice where a shell signals the group and torchrun forwards it: only a later one is a second request.
        if before is not None and now - before > 1:
            close_bottom_line()  # the shell's prompt would be written into the bar
            os._exit(130)
        _interrupted_at = before or now
    if _held:
        with _arrived:
            _pending.append(number)
            _arrived.notify_all()
    elif _listener is not None:
        threading.Thread(target=_end, args=(number, _listener), name="dist_train-end", daemon=True).start()


def _end(number: int, listener: _Listener) -> None:
    if not listener.previous:
        time.sleep(_GRACE)  # the main thread has a KeyboardInterrupt
        os._exit(128 + number)
    informing = threading.Thread(target=_before_end or (lambda: None), daemon=True)
    informing.start()
    informing.join(timeout=_GRACE)
    close_bottom_line()
    if listener.reports:
        text = f"dist_train: {signal.Signals(number).name} before the run started: nothing was written\n"
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
    os._exit(128 + number)


def _in_a_fork() -> None:
    """A child of a fork (a user's Pool) has its parent's handlers and socket: its own signals aren't its parent's."""
    global _listener
    if _listener is not None:
        listener, _listener = _listener, None
        listener.restore(forked=True)
        listener.reader.close()


os.register_at_fork(after_in_child=_in_a_fork)
