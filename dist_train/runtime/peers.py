"""Each rank watches the others, so that a crash or a hang anywhere is told once, by name, and ends all ranks in seconds.

A thread with a store client of its own posts where this rank's main thread stands (`runtime.here`), about once a second, and
looks for a failure record, for ranks that have gone and for a standstill of all. The first rank that adds to `failures`
speaks for all: the one that raised, or the first survivor to miss a rank that was killed. The others write their logs and
leave without a word. All leave by `os._exit`: with peers gone, an ordinary exit can hang, or end in SIGABRT.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dist_train.config.errors import ConfigError
from dist_train.runtime import failure
from dist_train.runtime.failure import Record
from dist_train.runtime.here import (
    BACKWARD,
    CALLBACK,
    CONFIG,
    DATA,
    DONE,
    FORWARD,
    PHASES,
    STARTING,
    Here,
    descriptor,
    here,
    of_process,
)
from dist_train.runtime.pace import Pace
from dist_train.runtime.processes import machine, process_state, stacks, start_again

LOOK_SECONDS = 0.5
POST_SECONDS = 1.0
LOST_SECONDS = 6.0  # without a heartbeat, from another machine; where a process can be looked up, it is
SETTLE_SECONDS = 7.0  # for what a rank hears of a peer that has gone, until the watch knows which
LEAVE_SECONDS = 4.0
WATCHERS = 8  # more ranks than twice this don't read all heartbeats each

log = logging.getLogger("dist_train")


def _note(text: str, *values: object) -> None:
    """Into the log only: the terminal gets the summary, once."""
    log.error(text, *values, extra={"shown": True})


class Peers:
    """This rank's view of all ranks of its job.

    Args:
        rank, size: this rank, of how many.
        store: a client of its own; None with one process.
        hang_timeout: seconds without any movement anywhere that are a hang; None watches for no hang.

    Attributes:
        logs: the directory of the ranks' logs, once it is known.
        samples: gives the samples of optimizer step (from 1) on a rank, for the summary.
        micro_batch_size: of this run, for advice.
        may_halve: whether all ranks go on with half of it when memory runs out, by starting again in their own place, where
            that changes nothing. changes: says what it would change, "" for nothing.
        closing: what the rank that speaks does first (status, ledger, lease); a few seconds long.
        parting: what every rank does as it leaves (the lease, the terminal's live bar).
        may_exit: whether a hang may end this process, when it is alone: not in a notebook.
    """

    may_exit = False

    def __init__(self, rank: int = 0, size: int = 1, store: Any | None = None, hang_timeout: float | None = None):
        self.rank, self.size, self.store, self.hang_timeout = rank, size, store, hang_timeout
        self.logs = ""
        self.samples: Callable[[int, int], Sequence[int]] | None = None
        self.micro_batch_size: int | None = None
        self.may_halve = False
        self.changes: Callable[[], str] = str
        self.closing: Callable[[Record], None] | None = None
        self.parting: Callable[[], object] | None = None
        self.beats: dict[int, dict[str, Any]] = {}
        self._machine = machine()
        self._heard: dict[int, float] = {}  # when each rank's heartbeat last changed, by this rank's clock
        self._moved: dict[int, float] = {}  # when its position last changed
        self._near: dict[int, Here | None] = {}
        self._pace = Pace(size)
        self._posts = 0
        self._posted_at = 0.0
        self._stand: list[int] = []
        self._still_since = time.monotonic()
        self._store_lost: float | None = None
        self._watches = size <= 2 * WATCHERS or rank % (size // WATCHERS) == 0
        self._all_here = False
        self._stop = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="dist_train-peers", daemon=True)

    # The main thread's side.

    def start(self) -> None:
        """Begin to post and to look."""
        here.reset()
        if self.store is not None:
            self._post()
        self._thread.start()

    def close(self, phase: int = DONE) -> None:
        """The others no longer need this rank; it may end when it likes."""
        if not self._thread.is_alive():
            return
        here.phase = phase
        self._stop.set()
        self._thread.join(timeout=5)
        if self.store is None or self._thread.is_alive():
            return
        with contextlib.suppress(Exception):
            self._post()
            deadline = time.monotonic() + 5  # the store may live in rank 0's own process
            while self.rank == 0 and phase == DONE and time.monotonic() < deadline:
                self._read()
                if all(beat["phase"] in (DONE, CONFIG) for beat in self.beats.values()):
                    return
                time.sleep(0.02)

    def raised(self, error: BaseException) -> None:
        """This rank's main thread has raised. With peers it doesn't return, except for a config error, which the caller tells.

        Alone: puts what there is to say at the exception, for `failure.tell_crash`.
        """
        if isinstance(error, ConfigError):
            self.close(CONFIG)
            return
        if getattr(error, "dist_train_record", None) is not None:
            return
        record = failure.describe(error, self.rank, self._samples(here.step, here.phase, self.rank))
        record["logs"] = self._logs(self.rank)
        micro = self.micro_batch_size
        if micro is not None and here.phase in (FORWARD, BACKWARD) and failure.is_out_of_memory(record["error"]):
            changes = self.changes()
            record["try"] = failure.less_memory(micro, changes)
            if self.may_halve and self.may_exit and not changes and micro > 1:
                record["halved"] = micro // 2
        _note("failed in step %d (%s)\n%s", here.step, PHASES[here.phase], record["details"].rstrip())
        if self.store is None and "halved" not in record:
            self._stop.set()
            error.dist_train_record = record  # type: ignore[attr-defined]
            return
        if failure.is_peer_failure(error):
            time.sleep(SETTLE_SECONDS)  # the watch finds who it was, and ends this process
        self._conclude(record)

    def pace(self) -> dict[str, float]:
        """The spread over ranks of a step's own time and of its wait for data, for the metrics (rank 0; from heartbeats)."""
        return self._pace.spread()

    def slow_rank(self) -> str | None:
        """Names a rank that has been slow at the last few calls, once (rank 0, at each log interval)."""
        rank, text = self._pace.slow()
        return None if rank is None else f"rank {rank} on {self.beats[rank]['host']} is slow: {text}"

    # The watching thread's side.

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            try:
                self._look()
                self._store_lost = None
            except Exception as error:
                if self._stop.is_set():
                    return
                self._without_store(error)

    def _look(self) -> None:
        now = time.monotonic()
        stand = here.position()
        if stand != self._stand:
            self._stand, self._still_since = stand, now
        if self.store is not None:
            if now - self._posted_at >= POST_SECONDS:
                self._post()
            if self.store.check(["failure"]):
                self._leave(json.loads(self.store.get("failure")), mine=False)
            if self._watches:
                self._read()
            self._look_for_the_dead()
        self._look_for_a_hang(now)

    def _post(self) -> None:
        assert self.store is not None
        self._posts += 1
        self._posted_at = time.monotonic()
        self.store.set(f"beat/{self.rank}", json.dumps(self._mine()))

    def _mine(self) -> dict[str, Any]:
        return {
            "n": self._posts,
            "host": socket.gethostname(),
            "machine": self._machine,
            "pid": os.getpid(),
            "descriptor": descriptor,
            "phase": here.phase,
            "step": here.step,
            "at": here.position(),
            "sums": [here.steps, here.busy, here.waited],
        }

    def _read(self) -> None:
        assert self.store is not None
        keys = [f"beat/{rank}" for rank in range(self.size)]
        if not self._all_here:
            self._all_here = self.store.check(keys)
            if not self._all_here:
                return
        now = time.monotonic()
        for rank, value in enumerate(self.store.multi_get(keys)):
            beat, before = json.loads(value), self.beats.get(rank)
            if before is None or beat["n"] != before["n"]:
                self._heard[rank] = now
                self._pace.hear(rank, beat["sums"], None if before is None else before["sums"])
            if before is None or beat["at"] != before["at"]:
                self._moved[rank] = now
            self.beats[rank] = beat
            if before is None and rank != self.rank and beat["machine"] == self._machine:
                self._near[rank] = of_process(beat["pid"], beat["descriptor"])

    def _look_for_the_dead(self) -> None:
        now = time.monotonic()
        for rank, beat in list(self.beats.items()):
            if rank == self.rank or beat["phase"] == DONE:
                continue
            if beat["machine"] == self._machine:
                gone = process_state(beat["pid"]) == "gone"
            else:
                gone = min(now - self._heard[rank], now - self._still_since) > LOST_SECONDS
            if not gone:
                continue
            assert self.store is not None
            beat = self.beats[rank] = self._latest(rank, json.loads(self.store.get(f"beat/{rank}")))
            if beat["phase"] == CONFIG:
                os._exit(2)  # it has told what is wrong with its config
            if beat["phase"] != DONE and not self.store.check(["failure"]):
                self._conclude(self._gone(rank, beat))

    def _latest(self, rank: int, beat: dict[str, Any]) -> dict[str, Any]:
        """Where a rank stands: on this machine to the moment, else as of its last heartbeat."""
        near = self._near.get(rank)
        return beat if near is None else {**beat, "phase": near.phase, "step": near.step}

    def _gone(self, rank: int, beat: dict[str, Any]) -> Record:
        near = beat["machine"] == self._machine
        how = "its process has ended" if near else f"no sign of life for {LOST_SECONDS:.0f} s"
        return {
            **self._record("gone", rank, beat),
            "error": f"{how} without a word: killed, or left by os._exit"
            + ("" if near else ", or its host or network is down"),
            "try": "look for the kernel's out-of-memory killer on that host (dmesg -T | grep -i kill) and the scheduler's "
            "memory limit: fewer data.num_workers and a smaller trainer.micro_batch_size need less",
        }

    def _record(self, kind: str, rank: int, beat: dict[str, Any]) -> Record:
        samples = self._samples(beat["step"], beat["phase"], rank)
        return {
            "kind": kind,
            "rank": rank,
            "host": beat["host"],
            "pid": beat["pid"],
            "step": beat["step"],
            "phase": beat["phase"],
            "samples": [int(sample) for sample in samples[:16]],
            "count": len(samples),
        }

    def _look_for_a_hang(self, now: float) -> None:
        limit = self.hang_timeout
        if limit is None or now - self._still_since < limit or here.phase in (STARTING, DONE):
            return
        beats = {**self.beats, self.rank: self._mine()}
        alive = {rank: self._latest(rank, beat) for rank, beat in beats.items() if beat["phase"] != DONE}
        if any(now - self._moved.get(rank, now) < limit - 2 for rank in alive if rank != self.rank):
            return
        if len(beats) < self.size:
            return  # not one of those who watch
        behind = self._behind(alive, now)
        told = ", ".join(self._stands(rank, alive[rank], now) for rank in behind[:4])
        told += f", and {len(behind) - 4} more" if len(behind) > 4 else ""
        rest = "" if len(behind) == len(alive) else "; the others wait for " + ("it" if len(behind) == 1 else "them")
        record = {
            **self._record("hang", behind[0], alive[behind[0]]),
            "error": f"nothing has moved for {limit:g} s (distributed.hang_timeout)",
            "ranks": told + rest,
            "try": "the stacks of all threads are in the logs; a longer distributed.hang_timeout if this is only slow",
        }
        if self.size > 1 or self.may_exit:
            self._conclude(record)
        log.error("%s\n%s", failure.summary(record), stacks())
        self._still_since = float("inf")  # said once

    def _behind(self, alive: dict[int, dict[str, Any]], now: float) -> list[int]:
        """The ranks that the others wait for: those without a sign of life, else those that have come the least far."""
        silent = [rank for rank in alive if rank != self.rank and now - self._heard.get(rank, now) > LOST_SECONDS / 2]
        if silent:
            return sorted(silent)
        far = {rank: (beat["step"], beat["phase"]) for rank, beat in alive.items()}
        return sorted(rank for rank in far if far[rank] == min(far.values()))

    def _stands(self, rank: int, beat: dict[str, Any], now: float) -> str:
        silence = now - self._heard.get(rank, now)
        state = ""
        if rank != self.rank and silence > LOST_SECONDS / 2:
            stopped = beat.get("machine") == self._machine and process_state(beat["pid"]) == "stopped"
            state = f", no sign of life for {silence:.0f} s" + (" (stopped by a signal)" if stopped else "")
        return f"rank {rank} on {beat['host']} (pid {beat['pid']}): {PHASES[beat['phase']]}, step {beat['step']}{state}"

    def _without_store(self, error: Exception) -> None:
        """The store has gone, and with it the process that held it: rank 0 (srun) or an agent of torchrun."""
        now = time.monotonic()
        self._store_lost = self._store_lost or now
        dead = [rank for rank, beat in self.beats.items() if rank != self.rank and self._is_dead(beat)]
        if not dead and now - self._store_lost < LOST_SECONDS:
            return
        record = {
            **self._record("gone", self.rank, self._mine()),
            "error": f"the store that connects the ranks has gone: {failure.one_line(error, '')}",
            "try": "the process that held it has ended: torchrun on the first host, or rank 0; look at its log",
        }
        if dead:
            record = self._gone(dead[0], self._latest(dead[0], self.beats[dead[0]]))
        speaker = min((rank for rank in range(self.size) if rank not in dead), default=self.rank)
        self._leave(record, mine=self.rank == speaker or not self.beats)

    def _is_dead(self, beat: dict[str, Any]) -> bool:
        return beat["phase"] != DONE and beat["machine"] == self._machine and process_state(beat["pid"]) == "gone"

    # Leaving, from either thread.

    def _conclude(self, record: Record) -> NoReturn:
        """What this rank has found is the cause, unless another rank has found one before."""
        mine = True
        if self.store is not None:
            with contextlib.suppress(Exception):
                mine = self.store.add("failures", 1) == 1
                if mine:
                    self.store.set("failure", json.dumps(record))
                else:
                    record = json.loads(self.store.get("failure"))
        self._leave(record, mine)

    def _leave(self, record: Record, mine: bool) -> NoReturn:
        if not self._leaving.acquire(blocking=False):
            time.sleep(LEAVE_SECONDS)  # the other thread is at it, and ends this process
            os._exit(1)
        deadline = time.monotonic() + LEAVE_SECONDS
        threading.Thread(target=_exit_at, args=(deadline,), daemon=True).start()
        try:
            _note("leaving\n%s", failure.summary(record, self.size))
            if record["kind"] == "hang" or record["rank"] != self.rank:
                _note("where the threads of this rank stand\n%s", stacks())
                self._flight_recorder()
            _bounded(self.parting, 2.0)
            if mine or not self._wait_until_told(record, deadline - 1.5):
                self._speak(record)
            if mine and record["kind"] == "hang":
                self._end_stopped()
        finally:
            for handler in log.handlers:
                handler.flush()
            sys.stdout.flush()
            if "halved" in record:
                start_again()
            os._exit(1)

    def _speak(self, record: Record) -> None:
        _bounded(self.closing and functools.partial(self.closing, record), LEAVE_SECONDS - 1)
        if self.rank and sys.stderr.isatty():
            time.sleep(LOOK_SECONDS)  # rank 0 takes its live bar away
        if "halved" in record:
            text = f"{failure.cause(record)}; all ranks start again with micro-batches of {record['halved']}"
            print(f"warning: {text}", file=sys.stderr, flush=True)
        else:
            failure.tell(record, self.size, self._logs(record["rank"]))
        if self.store is not None:
            with contextlib.suppress(Exception):
                self.store.set("told", str(os.getpid()))

    def _wait_until_told(self, record: Record, deadline: float) -> bool:
        """Whether the rank that speaks has spoken; then it leaves first, so that torchrun takes its word for the cause."""
        assert self.store is not None
        try:
            while not self.store.check(["told"]):
                if time.monotonic() > deadline:
                    return self.store.add("stand-ins", 1) > 1
                time.sleep(0.05)
            speaker = int(self.store.get("told"))
        except Exception:
            return False
        near = any(beat["pid"] == speaker and beat["machine"] == self._machine for beat in self.beats.values())
        end = time.monotonic() + 1
        while time.monotonic() < end and (not near or process_state(speaker) != "gone"):
            time.sleep(0.05)
        return True

    def _end_stopped(self) -> None:
        """A stopped process would take SIGTERM only when it goes on: torchrun would wait 30 s for it."""
        for rank, beat in self.beats.items():
            if rank != self.rank and beat["machine"] == self._machine and process_state(beat["pid"]) == "stopped":
                with contextlib.suppress(OSError):
                    os.kill(beat["pid"], 9)

    def _flight_recorder(self) -> None:
        """NCCL's record of the last collectives, where there is one, beside the log."""
        if not self.logs:
            return
        with contextlib.suppress(Exception):
            import torch

            if torch.distributed.is_nccl_available() and torch.cuda.is_initialized():
                content = torch._C._distributed_c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
                path = os.path.join(self.logs, f"nccl-rank-{self.rank}.json")
                with open(path, "wb") as file:
                    file.write(content if isinstance(content, bytes) else str(content).encode())

    def _samples(self, step: int, phase: int, rank: int) -> Sequence[int]:
        if self.samples is None or not DATA <= phase <= CALLBACK:
            return ()
        try:
            return self.samples(step, rank)
        except Exception:
            return ()

    def _logs(self, rank: int) -> str:
        return f"{self.logs}/rank-{rank}.log, and the other ranks' beside it" if self.logs else ""


def _bounded(action: Callable[[], object] | None, seconds: float) -> None:
    """Do it, whatever it raises, and wait for it so long at most."""

    def run() -> None:
        with contextlib.suppress(Exception):
            assert action is not None
            action()

    if action is not None:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(timeout=seconds)


def _exit_at(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))
    os._exit(1)
