"""The control thread: turns signals, files and clocks into actions that all ranks take after the same step, at no cost to it.

No rank may sit in a collective that the others will never enter. The main thread counts *ticks*: one for each optimizer step
and each round of an evaluation; all ranks run the same sequence of ticks. When somebody requests something (a signal at any
rank, the file STOP or SAVE, a clock), every control thread posts the tick that its main thread has begun and pledges not to
begin the one after next. The action is due at the end of the largest posted tick plus one: every rank can reach it, and none
has passed it.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dist_train.watch import signals
from dist_train.watch.status import SYNC, status

STOP, FINISH, SAVE, EVALUATE, LOG = "stop", "finish", "save", "evaluate", "log"
POLL_SECONDS = 0.2

Source = Callable[[], "tuple[str, str] | None"]
log = logging.getLogger("dist_train")


class Control:
    """Agreement among the control threads of all ranks.

    Main thread: `begin()` before each tick, `due()` after it. `sources` are polled about five times a second on this rank's
    control thread; each returns None, or (action, reason) once per request. `on_stop` is called on that thread with the reason of
    a stop as soon as this rank hears of it, whatever its main thread is doing.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any | None,
        sources: Sequence[Source] = (),
        on_stop: Callable[[str], object] = lambda reason: None,
    ):
        if store is None:
            from torch.distributed import HashStore

            store = HashStore()
        self.rank, self.size, self.store = rank, size, store
        self.sources, self._on_stop = list(sources), on_stop
        self.reasons: dict[str, str] = {}
        self._lock = threading.Condition()
        self._tick = 0  # the latest tick that the main thread has begun
        self._hold: int | None = None  # while an agreement is open: the last tick that may begin
        self._actions: dict[int, set[str]] = {}
        self._handled = 0
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dist_train-control", daemon=True)

    def start(self) -> None:
        """Start listening."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening: nothing is agreed any more."""
        signals.end_take(self._closing)
        self._thread.join(timeout=5)

    # Main thread: two attribute reads a step while there is no request.

    def begin(self) -> None:
        """Begin the next tick; waits only while an agreement that could end before it is still open."""
        if self._hold is not None and self._tick + 1 > self._hold:
            status.phase = SYNC
            with self._lock:
                self._lock.wait_for(lambda: self._hold is None or self._tick + 1 <= self._hold)
        self._tick += 1

    def due(self) -> set[str]:
        """The actions that all ranks take at the end of this tick."""
        if self._failure is not None:
            raise RuntimeError("the control thread has failed") from self._failure
        if not self._actions and self._hold is None:
            return set()
        status.phase = SYNC
        with self._lock:
            # This tick may be the last one of an open agreement.
            self._lock.wait_for(lambda: self._hold is None or self._tick < self._hold)
            return self._actions.pop(self._tick, set())

    def stop_due(self) -> bool:
        """Whether a stop is due at the end of this tick; other actions are postponed to the next one."""
        actions = self.due()
        if rest := actions - {STOP}:
            with self._lock:
                self._actions.setdefault(self._tick + 1, set()).update(rest)
        return STOP in actions

    # Control thread.

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                for number in signals.take(POLL_SECONDS, self._closing):
                    name = signal.Signals(number).name
                    log.info("received %s", name)
                    self._propose(STOP, name)
                for source in self.sources:
                    if request := source():
                        self._propose(*request)
                self._answer()
        except BaseException as error:
            if not self._closing.is_set():
                log.error("control thread: %s: %s", type(error).__name__, error)
                self._failure = error
                with self._lock:
                    self._hold = None
                    self._lock.notify_all()

    def _propose(self, action: str, reason: str) -> None:
        if action != STOP or STOP not in self.reasons:  # a signal may come twice; one stop is enough
            self.store.set(f"request/{self.store.add('requests', 1)}", json.dumps([action, reason]))

    def _answer(self) -> None:
        while self._handled < self.store.add("requests", 0):
            number = self._handled + 1
            action, reason = json.loads(self.store.get(f"request/{number}"))
            if action == STOP and STOP not in self.reasons:
                self._on_stop(reason)
            with self._lock:
                self._hold = -1  # first the gate, then the reading: the main thread may be one tick past it, never two
                tick = self._tick
                self._hold = tick + 1
                self._lock.notify_all()
            self.store.set(f"vote/{number}/{self.rank}", str(tick))
            votes = [int(self.store.get(f"vote/{number}/{rank}")) for rank in range(self.size)]
            with self._lock:
                self.reasons.setdefault(action, reason)
                self._actions.setdefault(max(votes) + 1, set()).add(action)
                self._hold = None
                self._lock.notify_all()
            self._handled = number


def watch_file(take: Callable[[str], bool], action: str, name: str) -> Source:
    """A source that requests `action` when `take(name)` has found the file, and removed it."""
    return lambda: (action, f"file {name}") if take(name) else None


def next_multiple(seconds: float, every: float) -> float:
    """The first multiple of `every` after `seconds`: times count from the run's beginning, over all its starts."""
    return (seconds // every + 1) * every


def watch_clock(clock: Callable[[], float], due_at: float, every: float | None, action: str, reason: str) -> Source:
    """A source that requests `action` when `clock()` (seconds trained, over all attempts) passes `due_at`, then each `every`."""
    due = due_at

    def source() -> tuple[str, str] | None:
        nonlocal due
        now = clock()
        if now < due:
            return None
        due = float("inf") if every is None else next_multiple(now, every)
        return action, reason

    return source
