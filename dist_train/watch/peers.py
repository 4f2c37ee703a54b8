"""Each rank watches the others, so that a crash or a hang anywhere is reported once, by name, and ends all ranks in seconds.

A thread with a store client of its own posts a heartbeat (`watch.status`) about once a second, and looks for a failure record,
for lost ranks and for a standstill of all; `watch.leave` then ends the process. It is apart from the control thread, which
blocks on the other ranks' votes: this one never blocks for long, so a hang of anything else is seen here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from typing import Any

from dist_train.config.errors import ConfigError
from dist_train.watch import failure, signals
from dist_train.watch.failure import Record
from dist_train.watch.leave import FailureExit, RunFacts, elect_reporter
from dist_train.watch.pace import Pace
from dist_train.watch.processes import end_fork, is_owned, machine, process_state, stacks
from dist_train.watch.status import CONFIG, DONE, PHASES, STARTING, STOPPED, status, status_fd, status_of

LOOK_SECONDS = 0.5
POST_SECONDS = 1.0
FIRST_LOOK_SECONDS = 0.05  # between polls until the first heartbeat of every rank has been read
SILENT_SECONDS = 3.0  # without a heartbeat, which a report mentions
LOST_SECONDS = 6.0  # the same on another machine; a process of this machine is looked up instead
SETTLE_SECONDS = 7.0  # from an error that a lost peer may have caused, until the watch knows whether it did
DEAF_SECONDS = 15.0  # beyond the hang timeout, for the watch of a rank that hasn't got the GIL since
WATCHERS = 8  # with more than twice as many ranks, only this many read all heartbeats

log = logging.getLogger("dist_train")


def heartbeat(rank: int) -> Record:
    """Who this rank is, its position, its progress, and how long its steps have taken."""
    return {
        **failure.own_position(rank),
        "time": time.monotonic(),
        "machine": machine(),
        "status_fd": status_fd,
        "progress": status.progress(),
        "sums": [status.steps, status.busy, status.waited],
    }


class PeerState:
    """What is known of a rank: `beat` is its last heartbeat."""

    def __init__(self, beat: Record):
        self.rank, self.beat = beat["rank"], beat
        self.heard = self.moved = time.monotonic()  # since when its heartbeat and its progress are what they are
        self.local = beat["machine"] == machine()  # so that its process can be looked up
        self._status = status_of(beat["pid"], beat["status_fd"]) if self.local else None

    def update(self, beat: Record) -> None:
        """Take its next heartbeat, or the same one again."""
        now = time.monotonic()
        self.heard = now if beat["time"] != self.beat["time"] else self.heard
        self.moved = now if beat["progress"] != self.beat["progress"] else self.moved
        self.beat = beat

    @property
    def active(self) -> bool:
        """Whether the others may still need it."""
        return bool(self.beat["phase"] != DONE)

    @property
    def silence(self) -> float:
        """Seconds without a new heartbeat."""
        return time.monotonic() - self.heard

    def process(self) -> str:
        """`running`, `stopped` or `gone`; `remote` on another machine."""
        return process_state(self.beat["pid"]) if self.local else "remote"

    def position(self) -> Record:
        """Its heartbeat, with the latest phase and step where its memory can be read, even after its death."""
        seen = self._status
        return self.beat if seen is None else {**self.beat, "phase": seen.phase, "step": seen.step}

    def describe(self) -> str:
        """Who it is, where it is, and whether it is silent."""
        at, text = self.position(), ""
        if self.silence > SILENT_SECONDS:
            stopped = " (stopped by a signal)" if self.process() == "stopped" else ""
            text = f", no heartbeat for {self.silence:.0f} s{stopped}"
        return f"rank {self.rank} on {at['host']} (pid {at['pid']}): {PHASES[at['phase']]}, step {at['step']}{text}"


class Peers:
    """This rank's view of all ranks of its job.

    Args:
        rank, size: this rank, out of how many.
        store: a client for this object alone; None with one process.
        hang_timeout: seconds without progress on any rank that are a hang; None: hangs aren't looked for.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any | None = None, hang_timeout: float | None = None):
        self.rank, self.size, self.store, self.hang_timeout = rank, size, store, hang_timeout
        self._exit = FailureExit(rank, size, store, self._neighbors)
        self._pid = os.getpid()
        self._failure: Record | None = None
        self._pace = Pace(size)
        self._me = PeerState(heartbeat(rank))
        self._states = {rank: self._me}
        self._posted_at = 0.0
        self._store_lost: float | None = None
        self._armed = False  # whether a C thread would end this process
        self._reads_all = size <= 2 * WATCHERS or rank % (size // WATCHERS) == 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dist_train-peers", daemon=True)

    # Main thread.

    def start(self) -> None:
        """Begin to post and to look."""
        status.reset()
        self._post()
        self._thread.start()

    def attach(self, run: RunFacts) -> None:
        """A run begins: failures from here on are its failures."""
        self._exit.attach(run)

    def close(self, phase: int = DONE) -> None:
        """The others no longer need this rank; it may end at any time."""
        if not self._thread.is_alive():
            return
        status.phase = phase
        self._stop.set()
        self._thread.join(timeout=5)
        if self._armed:
            faulthandler.cancel_dump_traceback_later()
        if self.store is None or self._thread.is_alive():
            return
        with contextlib.suppress(Exception):
            self._post()
            # The store may live in rank 0's own process, and others may still read in it what ends them as well.
            deadline = time.monotonic() + {DONE: 5, CONFIG: 2}.get(phase, 0)
            while self.rank == 0 and time.monotonic() < deadline:
                self._read()
                if all(peer.beat["phase"] in (DONE, CONFIG) for peer in self._others()):
                    return
                time.sleep(0.02)

    def stopped(self) -> None:
        """A signal ends this rank before the run has started: the others end too, and that is no failure.

        Where another rank has failed, and the signal is only torchrun's answer to that, this rank leaves as without it.
        """
        self._stop.set()
        self._thread.join(timeout=1)
        status.phase = STOPPED
        if self.store is not None:
            self._follow_failure()
            self._read()
            self._look_for_lost()
            self._post()

    def raised(self, error: BaseException) -> Record | None:
        """This rank's main thread has raised. With peers that ends the process; a config error or Ctrl-C is the caller's.

        Returns the record of the first failure with one process, and None for what is no failure.
        """
        self.leave_a_fork(error)
        if isinstance(error, ConfigError) or (isinstance(error, KeyboardInterrupt) and not signals.held()):
            self.close(CONFIG if isinstance(error, ConfigError) else STOPPED)
            if isinstance(error, ConfigError):
                elect_reporter(self.store, self.rank)
            return None
        if self._failure is None:
            self._failure = self._exit.describe(error)
            if self.store is not None or "halved" in self._failure:
                if failure.is_peer_failure(error):
                    time.sleep(SETTLE_SECONDS)  # the watch finds who was lost, and ends this process
                self._exit.conclude(self._failure)
            self._stop.set()
        return self._failure

    def leave_a_fork(self, error: BaseException) -> None:
        """In a process that the user's code has forked: end it, without reporting a failure of the run."""
        if os.getpid() != self._pid:
            end_fork(error)

    def pace(self) -> dict[str, float]:
        """The spread over ranks of a step's own time and of its wait for data, for the metrics (rank 0; from heartbeats)."""
        return self._pace.spread()

    def slow_rank(self) -> str | None:
        """Names a rank that has been slow at the last few calls, once (rank 0, at each log interval)."""
        rank, text = self._pace.slow()
        return None if rank is None else f"rank {rank} on {self._states[rank].beat['host']} is slow: {text}"

    # Watching thread.

    def _run(self) -> None:
        # A rank's memory must be open before it dies: after that its position can't be found any more.
        known = self.store is None or not self._reads_all
        while not self._stop.wait(LOOK_SECONDS if known else FIRST_LOOK_SECONDS):
            self._arm()
            try:
                self._look()
                self._store_lost = None
            except Exception as error:
                if self._stop.is_set():
                    return
                self._without_store(error)
            known = known or len(self._states) == self.size

    def _arm(self) -> None:
        """C code that holds the GIL silences this watch too: a C thread then ends the process, with the stacks on stderr."""
        if self.hang_timeout is None or not (self.size > 1 or is_owned()) or sys.__stderr__ is None:
            return
        if status.phase not in (STARTING, DONE):
            self._armed = True
            faulthandler.dump_traceback_later(self.hang_timeout + DEAF_SECONDS, exit=True, file=sys.__stderr__)
        elif self._armed:
            self._armed = False
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        self._hear(heartbeat(self.rank))
        if self.store is not None:
            if time.monotonic() - self._posted_at >= POST_SECONDS:
                self._post()
            self._follow_failure()
            if self._reads_all:
                self._read()
            self._look_for_lost()
        self._look_for_hang()

    def _post(self) -> None:
        if self.store is not None:
            self._posted_at = time.monotonic()
            self.store.set(f"beat/{self.rank}", json.dumps(heartbeat(self.rank)))

    def _read(self) -> None:
        assert self.store is not None
        keys = [f"beat/{rank}" for rank in range(self.size)]
        if len(self._states) == self.size or self.store.check(keys):
            for value in self.store.multi_get(keys[: self.rank] + keys[self.rank + 1 :]):
                self._hear(json.loads(value))

    def _hear(self, beat: Record) -> None:
        peer = self._states.get(beat["rank"]) or self._states.setdefault(beat["rank"], PeerState(beat))
        self._pace.update(peer.rank, beat["sums"], peer.beat["sums"])
        peer.update(beat)

    def _others(self) -> list[PeerState]:
        return [peer for peer in list(self._states.values()) if peer is not self._me]

    def _neighbors(self) -> list[int]:
        return [peer.beat["pid"] for peer in self._others() if peer.local and peer.process() != "gone"]

    def _follow_failure(self) -> None:
        assert self.store is not None
        if self.store.check(["failure"]):
            self._exit.leave(json.loads(self.store.get("failure")), mine=False)

    def _look_for_lost(self) -> None:
        assert self.store is not None
        for peer in self._others():
            still = time.monotonic() - self._me.moved
            lost = peer.process() == "gone" or (not peer.local and min(peer.silence, still) > LOST_SECONDS)
            if not lost or not peer.active:
                continue
            peer.update(json.loads(self.store.get(f"beat/{peer.rank}")))
            phase = peer.position()["phase"]
            if phase == STOPPED == status.phase:
                continue  # like this rank
            _follow_quietly(phase)
            if phase != DONE and not self.store.check(["failure"]):
                self._exit.conclude(self._lost(peer))

    def _lost(self, peer: PeerState) -> Record:
        how = "its process ended" if peer.local else f"no heartbeat for {LOST_SECONDS:.0f} s"
        why = "killed, or exited by os._exit" + ("" if peer.local else ", or its host or network is down")
        return {
            **self._exit.record("lost", peer.position()),
            "error": f"{how} without a message: {why}",
            "try": "look for the kernel's out-of-memory killer on that host (dmesg -T | grep -i kill) and the scheduler's "
            "memory limit: fewer data.num_workers and a smaller trainer.micro_batch_size need less",
        }

    def _look_for_hang(self) -> None:
        limit, now = self.hang_timeout, time.monotonic()
        if limit is None or now - self._me.moved < limit or status.phase in (STARTING, DONE):
            return
        active = [peer for _, peer in sorted(self._states.items()) if peer.active]
        moving = any(now - peer.moved < limit - 2 for peer in active if peer is not self._me)
        if moving or len(self._states) < self.size:  # or this rank doesn't read all heartbeats
            return
        places = {peer.rank: (peer.position()["step"], peer.position()["phase"]) for peer in active}
        silent = [peer for peer in active if peer.silence > SILENT_SECONDS]
        behind = silent or [peer for peer in active if places[peer.rank] == min(places.values())]
        ranks = ", ".join(peer.describe() for peer in behind[:4])
        ranks += f", and {len(behind) - 4} more" if len(behind) > 4 else ""
        if len(behind) < len(active):
            ranks += "; the others wait for " + ("it" if len(behind) == 1 else "them")
        record = {
            **self._exit.record("hang", behind[0].position()),
            "error": f"no progress for {limit:g} s (distributed.hang_timeout)",
            "ranks": ranks,
            "try": "the stacks of all threads are in the logs; a longer distributed.hang_timeout if this is only slow",
        }
        if self.size > 1 or is_owned():
            self._exit.conclude(record)
        log.error("%s\n%s", failure.summary(record), stacks())
        self._me.moved = float("inf")  # reported once

    def _without_store(self, error: Exception) -> None:
        """The store is lost, and with it the process that held it: rank 0 (srun) or an agent of torchrun."""
        self._store_lost = self._store_lost or time.monotonic()
        _follow_quietly(self._states[0].beat["phase"] if 0 in self._states else STARTING)
        dead = [peer for peer in self._others() if peer.active and peer.process() == "gone"]
        if dead:
            record = self._lost(dead[0])
        elif time.monotonic() - self._store_lost < LOST_SECONDS:
            return
        else:
            record = {
                **self._exit.record("lost", heartbeat(self.rank)),
                "error": f"lost the store that connects the ranks: {failure.one_line(error)}",
                "try": "the process that held it has ended: torchrun on the first host, or rank 0; look at its log",
            }
        reporter = min(set(range(self.size)) - {peer.rank for peer in dead})
        self._exit.leave(record, mine=self.rank == reporter or len(self._states) == 1)


def _follow_quietly(phase: int) -> None:
    """End this process as a rank that has left in that phase did, which has reported its config error, or its signal."""
    if phase in (CONFIG, STOPPED):
        os._exit(2 if phase == CONFIG else 143)
