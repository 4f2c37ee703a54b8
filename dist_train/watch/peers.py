"""Each rank watches the others, so that a crash or a hang anywhere is told once, by name, and ends all ranks in seconds.

A thread with a store client of its own posts where this rank's main thread stands (`runtime.here`), about once a second, and
looks for a failure record, for ranks that have gone and for a standstill of all. The first rank that adds to `failures`
speaks for all: the one that raised, or the first survivor to miss a rank that was killed. The others write their logs and
leave without a word. All leave by `os._exit`: with peers gone, an ordinary exit can hang, or end in SIGABRT.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dist_train.config.errors import ConfigError
from dist_train.watch import failure, signals
from dist_train.watch import status as place
from dist_train.watch.failure import Record
from dist_train.watch.heartbeat import Seat, heartbeat
from dist_train.watch.pace import Pace
from dist_train.watch.processes import stacks, start_again, started
from dist_train.watch.status import CONFIG, DONE, PHASES, STARTING, STOPPED, status

LOOK_SECONDS = 0.5
POST_SECONDS = 1.0
LOST_SECONDS = 6.0  # without a heartbeat, from another machine; where a process can be looked up, it is
SETTLE_SECONDS = 7.0  # for what a rank hears of a peer that has gone, until the watch knows which
LEAVE_SECONDS = 4.0
DEAF_SECONDS = 15.0  # beyond the hang timeout, for the watch of a rank that hasn't got the GIL since
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
        self._pid = os.getpid()
        self.logs = ""
        self.samples: Callable[[int, int], Sequence[int]] | None = None
        self.micro_batch_size: int | None = None
        self.may_halve = False
        self.changes: Callable[[], str] = str
        self.closing: Callable[[Record], object] | None = None
        self.parting: Callable[[], object] | None = None
        self._pace = Pace(size)
        self._me = Seat(heartbeat(self.rank))
        self._seats = {rank: self._me}
        self._posted_at = 0.0
        self._store_lost: float | None = None
        self._expects = False
        self._watches = size <= 2 * WATCHERS or rank % (size // WATCHERS) == 0
        self._stop = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="dist_train-peers", daemon=True)

    # The main thread's side.

    def start(self) -> None:
        """Begin to post and to look."""
        status.reset()
        self._post()
        self._thread.start()

    def close(self, phase: int = DONE) -> None:
        """The others no longer need this rank; it may end when it likes."""
        if not self._thread.is_alive():
            return
        status.phase = phase
        self._stop.set()
        self._thread.join(timeout=5)
        if self._expects:
            faulthandler.cancel_dump_traceback_later()
        if self.store is None or self._thread.is_alive():
            return
        with contextlib.suppress(Exception):
            self._post()
            deadline = time.monotonic() + 5  # the store may live in rank 0's own process
            while self.rank == 0 and phase == DONE and time.monotonic() < deadline:
                self._read()
                if all(seat.beat["phase"] in (DONE, CONFIG) for seat in self._others().values()):
                    return
                time.sleep(0.02)

    def stopped(self) -> None:
        """A signal ends this rank before the run has begun: the others end too, and nobody calls it a failure.

        Where a rank has failed, and the signal is only torchrun's answer to that, this rank ends as it would without it.
        """
        self._stop.set()
        self._thread.join(timeout=1)
        status.phase = STOPPED
        if self.store is not None:
            if self.store.check(["failure"]):
                self._leave(json.loads(self.store.get("failure")), mine=False)
            self._read()
            self._look_for_the_dead()
            self._post()

    def raised(self, error: BaseException) -> None:
        """This rank's main thread has raised. With peers it doesn't return, except for a config error, which the caller tells.

        Alone: puts what there is to say at the exception, for `failure.tell_crash`.
        """
        self.leave_a_fork(error)
        if isinstance(error, ConfigError) or (isinstance(error, KeyboardInterrupt) and not signals.held()):
            self.close(CONFIG if isinstance(error, ConfigError) else STOPPED)
            if isinstance(error, ConfigError):
                self._settle_who_tells()
            return
        if getattr(error, "dist_train_record", None) is not None:
            return
        samples = self._samples_of(failure.standing(self.rank))
        try:
            told = failure.or_of_a_worker(error, self.may_exit)
        except RuntimeError as late:  # out of SIGCHLD's handler, as the call began
            told = late
        record = failure.describe(told, self.rank, samples)
        record["logs"] = self._logs(self.rank)
        micro = self.micro_batch_size
        if micro and status.phase in (place.FORWARD, place.BACKWARD) and failure.is_out_of_memory(record["error"]):
            changes = self.changes()
            record["try"] = failure.less_memory(micro, changes)
            if self.may_halve and self.may_exit and not changes and micro > 1:
                record["halved"] = micro // 2
        if not self._leaving.locked():  # else the log is being closed
            _note("failed in step %d (%s)\n%s", status.step, PHASES[status.phase], record["details"].rstrip())
        if self.store is None and "halved" not in record:
            self._stop.set()
            error.dist_train_record = record  # type: ignore[attr-defined]
            return
        if failure.is_peer_failure(error):
            time.sleep(SETTLE_SECONDS)  # the watch finds who it was, and ends this process
        self._conclude(record)

    def leave_a_fork(self, error: BaseException) -> None:
        """A process that the user's code has forked ends by what it raises, and says nothing in the name of the run."""
        if os.getpid() == self._pid:
            return
        ends = error.__cause__ if isinstance(error.__cause__, SystemExit) else error
        code = ends.code if isinstance(ends, SystemExit) else 1
        if not isinstance(ends, SystemExit):
            traceback.print_exception(error)
        os._exit(code if isinstance(code, int) else int(code is not None))

    def _settle_who_tells(self) -> None:
        """A config error is told by rank 0, or where rank 0 hasn't found one, by the first that has."""
        deadline = time.monotonic() + 1.5
        with contextlib.suppress(Exception):
            while self.store is not None and self.rank and time.monotonic() < deadline:
                if json.loads(self.store.get("beat/0"))["phase"] == CONFIG:
                    return
                time.sleep(0.1)
            failure.tells_config_errors = self.store is not None and self.store.add("words", 1) == 1

    def pace(self) -> dict[str, float]:
        """The spread over ranks of a step's own time and of its wait for data, for the metrics (rank 0; from heartbeats)."""
        return self._pace.spread()

    def slow_rank(self) -> str | None:
        """Names a rank that has been slow at the last few calls, once (rank 0, at each log interval)."""
        rank, text = self._pace.slow()
        return None if rank is None else f"rank {rank} on {self._seats[rank].beat['host']} is slow: {text}"

    # The watching thread's side.

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._expect_the_next_look()
            try:
                self._look()
                self._store_lost = None
            except Exception as error:
                if self._stop.is_set():
                    return
                self._without_store(error)

    def _expect_the_next_look(self) -> None:
        """C code that holds the GIL silences this watch too: a thread in C then ends the process, with the stacks on stderr."""
        if self.hang_timeout is None or not (self.size > 1 or self.may_exit) or sys.__stderr__ is None:
            return
        if status.phase not in (STARTING, DONE):
            self._expects = True
            faulthandler.dump_traceback_later(self.hang_timeout + DEAF_SECONDS, exit=True, file=sys.__stderr__)
        elif self._expects:
            self._expects = False
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        self._hear(heartbeat(self.rank))
        if self.store is not None:
            if time.monotonic() - self._posted_at >= POST_SECONDS:
                self._post()
            if self.store.check(["failure"]):
                self._leave(json.loads(self.store.get("failure")), mine=False)
            if self._watches:
                self._read()
            self._look_for_the_dead()
        self._look_for_a_hang()

    def _post(self) -> None:
        if self.store is not None:
            self._posted_at = time.monotonic()
            self.store.set(f"beat/{self.rank}", json.dumps(heartbeat(self.rank)))

    def _read(self) -> None:
        assert self.store is not None
        keys = [f"beat/{rank}" for rank in range(self.size)]
        if len(self._seats) == self.size or self.store.check(keys):
            for value in self.store.multi_get(keys[: self.rank] + keys[self.rank + 1 :]):
                self._hear(json.loads(value))

    def _hear(self, beat: Record) -> None:
        rank = beat["rank"]
        if rank not in self._seats:
            self._seats[rank] = Seat(beat)
        self._pace.hear(rank, beat["sums"], self._seats[rank].beat["sums"])
        self._seats[rank].hear(beat)

    def _others(self) -> dict[int, Seat]:
        return {rank: seat for rank, seat in self._seats.items() if rank != self.rank}

    def _look_for_the_dead(self) -> None:
        assert self.store is not None
        for rank, seat in self._others().items():
            still = time.monotonic() - self._me.moved
            gone = seat.state() == "gone" or (not seat.near and min(seat.silence(), still) > LOST_SECONDS)
            if not gone or seat.beat["phase"] == DONE:
                continue
            seat.hear(json.loads(self.store.get(f"beat/{rank}")))
            phase = seat.stands()["phase"]
            if phase == STOPPED == status.phase:
                continue  # as this rank is
            if phase in (CONFIG, STOPPED):  # it has told what is wrong with its config, or that it was stopped
                os._exit(2 if phase == CONFIG else 143)
            if phase != DONE and not self.store.check(["failure"]):
                self._conclude(self._gone(seat))

    def _gone(self, seat: Seat) -> Record:
        how = "its process has ended" if seat.near else f"no sign of life for {LOST_SECONDS:.0f} s"
        return {
            **self._record("gone", seat.stands()),
            "error": f"{how} without a word: killed, or left by os._exit"
            + ("" if seat.near else ", or its host or network is down"),
            "try": "look for the kernel's out-of-memory killer on that host (dmesg -T | grep -i kill) and the scheduler's "
            "memory limit: fewer data.num_workers and a smaller trainer.micro_batch_size need less",
        }

    def _record(self, kind: str, stands: Record) -> Record:
        return failure.record_of(kind, stands, self._samples_of(stands))

    def _look_for_a_hang(self) -> None:
        limit, now = self.hang_timeout, time.monotonic()
        if limit is None or now - self._me.moved < limit or status.phase in (STARTING, DONE):
            return
        if any(now - seat.moved < limit - 2 and seat.beat["phase"] != DONE for seat in self._others().values()):
            return
        if len(self._seats) < self.size:
            return  # not one of those who watch
        stand = {rank: seat.stands() for rank, seat in sorted(self._seats.items()) if seat.beat["phase"] != DONE}
        behind = self._behind(stand)
        told = ", ".join(self._told(stand[rank]) for rank in behind[:4])
        told += f", and {len(behind) - 4} more" if len(behind) > 4 else ""
        rest = "" if len(behind) == len(stand) else "; the others wait for " + ("it" if len(behind) == 1 else "them")
        record = {
            **self._record("hang", stand[behind[0]]),
            "error": f"nothing has moved for {limit:g} s (distributed.hang_timeout)",
            "ranks": told + rest,
            "try": "the stacks of all threads are in the logs; a longer distributed.hang_timeout if this is only slow",
        }
        if self.size > 1 or self.may_exit:
            self._conclude(record)
        log.error("%s\n%s", failure.summary(record), stacks())
        self._me.moved = float("inf")  # said once

    def _behind(self, stand: dict[int, Record]) -> list[int]:
        """The ranks that the others wait for: those without a sign of life, else those that have come the least far."""
        silent = [rank for rank in stand if self._is_silent(rank)]
        least = min((stands["step"], stands["phase"]) for stands in stand.values())
        return silent or [rank for rank in stand if (stand[rank]["step"], stand[rank]["phase"]) == least]

    def _is_silent(self, rank: int) -> bool:
        return rank != self.rank and self._seats[rank].silence() > LOST_SECONDS / 2

    def _told(self, stands: Record) -> str:
        seat, state = self._seats[stands["rank"]], ""
        if self._is_silent(stands["rank"]):
            stopped = " (stopped by a signal)" if seat.state() == "stopped" else ""
            state = f", no sign of life for {seat.silence():.0f} s{stopped}"
        who = f"rank {stands['rank']} on {stands['host']} (pid {stands['pid']})"
        return f"{who}: {PHASES[stands['phase']]}, step {stands['step']}{state}"

    def _without_store(self, error: Exception) -> None:
        """The store has gone, and with it the process that held it: rank 0 (srun) or an agent of torchrun."""
        self._store_lost = self._store_lost or time.monotonic()
        others = self._others()
        dead = [rank for rank in others if others[rank].state() == "gone" and others[rank].beat["phase"] != DONE]
        if not dead and time.monotonic() - self._store_lost < LOST_SECONDS:
            return
        record = {
            **self._record("gone", heartbeat(self.rank)),
            "error": f"the store that connects the ranks has gone: {failure.one_line(error)}",
            "try": "the process that held it has ended: torchrun on the first host, or rank 0; look at its log",
        }
        if dead:
            record = self._gone(others[dead[0]])
        speaker = min(rank for rank in range(self.size) if rank not in dead)
        self._leave(record, mine=self.rank == speaker or not others)

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
        # A thread in C: it ends this process too while other C code holds the GIL.
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        try:
            _note("leaving\n%s", failure.summary(record, self.size))
            if record["kind"] == "hang" or record["rank"] != self.rank:
                _note("where the threads of this rank stand\n%s", stacks())
                self._flight_recorder()
            _bounded(self.parting, 2.0)
            if mine or not self._wait_until_told(deadline - 1.5):
                self._speak(record)
            if "halved" not in record:
                self._end_the_stuck()
        finally:
            for handler in log.handlers:
                handler.flush()
            sys.stdout.flush()
            if "halved" in record:
                start_again()
            os._exit(1)

    def _speak(self, record: Record) -> None:
        _bounded(self.closing, LEAVE_SECONDS - 1, record)
        with contextlib.suppress(Exception):
            if self.store is not None and self.store.add("words", 1) > 1:
                return  # a slow speaker and its stand-in: one of them is enough
        if self.rank and sys.stderr.isatty():
            time.sleep(LOOK_SECONDS)  # rank 0 takes its live bar away
        if "halved" in record:
            text = f"{failure.cause(record)}; all ranks start again with micro-batches of {record['halved']}"
            print(f"warning: {text}", file=sys.stderr, flush=True)
        else:
            failure.tell(record, self.size, self._logs(record["rank"]))
        with contextlib.suppress(Exception):
            if self.store is not None:
                self.store.set("told", "")

    def _wait_until_told(self, deadline: float) -> bool:
        """Whether the rank that speaks has spoken; it then leaves first, so that torchrun takes its word for the cause."""
        assert self.store is not None
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                if self.store.check(["told"]):
                    time.sleep(1.0)  # torchrun goes by the earliest time, in whole seconds
                    return True
                time.sleep(0.05)
        return False

    def _end_the_stuck(self) -> None:
        """A rank of this machine that is stopped, or in C code that holds the GIL, can't leave by itself, nor by SIGTERM, and
        torchrun would wait 30 s and more for it: a shell that outlives this process ends it.
        """
        pids = [seat.beat["pid"] for seat in self._others().values() if seat.near and seat.state() != "gone"]
        ends = [f"grep -qw {started(pid)} /proc/{pid}/stat && kill -KILL {pid}" for pid in pids if started(pid)]
        if ends:
            with contextlib.suppress(OSError):
                script = "; ".join([f"sleep {LEAVE_SECONDS}", *ends])
                nothing = subprocess.DEVNULL
                subprocess.Popen(
                    ["sh", "-c", script], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
                )

    def _flight_recorder(self) -> None:
        """NCCL's record of the last collectives, where there is one, beside the log."""
        with contextlib.suppress(Exception):
            import torch

            if self.logs and torch.distributed.is_nccl_available() and torch.cuda.is_initialized():
                content = torch._C._distributed_c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
                with open(os.path.join(self.logs, f"nccl-rank-{self.rank}.json"), "wb") as file:
                    file.write(content if isinstance(content, bytes) else str(content).encode())

    def _samples_of(self, stands: Record) -> Sequence[int]:
        """The samples of the step in which it stands."""
        with contextlib.suppress(Exception):
            if self.samples is not None and place.DATA <= stands["phase"] <= place.CALLBACK:
                return self.samples(stands["step"], stands["rank"])
        return ()

    def _logs(self, rank: int) -> str:
        return f"{self.logs}/rank-{rank}.log, and the other ranks' beside it" if self.logs else ""


def _bounded(action: Callable[..., object] | None, seconds: float, *arguments: object) -> None:
    """Do it, whatever it raises, and wait for it so long at most."""

    def run() -> None:
        with contextlib.suppress(Exception):
            if action is not None:
                action(*arguments)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=seconds)
