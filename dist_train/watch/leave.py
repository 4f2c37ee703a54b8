"""How a process ends when something is wrong: exactly one rank reports it, and all leave within seconds.

The first rank that increments `failures` in the store reports for all: the one that raised, or the first survivor to miss a
rank that was killed. The others write their logs and leave silently. All leave by `os._exit`: with peers lost, an ordinary
exit can hang, or end in SIGABRT.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dist_train.config.errors import ConfigError, Problem
from dist_train.tracking.terminal import columns, has_color, is_terminal, painted, wrapped
from dist_train.watch import failure, signals
from dist_train.watch.failure import Record
from dist_train.watch.processes import is_owned, kill_later, restart, stacks
from dist_train.watch.status import BACKWARD, CALLBACK, CONFIG, DATA, FORWARD, PHASES, status

LEAVE_SECONDS = 4.0
_LAUNCHER_SECONDS = 10.0  # for the launcher to end a rank, after another has reported a config error and left

log = logging.getLogger("dist_train")


class ReportedError(Exception):
    """The run has failed and that has been reported: nothing is left to do but to exit with 1."""


@dataclass(frozen=True)
class RunFacts:
    """What a failure's report needs of the run that this process trains, and what the run does about it."""

    logs: str = ""
    """Directory of the ranks' logs."""
    samples: Callable[[int, int], Sequence[int]] = lambda step, rank: ()
    """Gives the samples of optimizer step (from 1) on a rank."""
    less_memory: Callable[[], tuple[str, int | None]] | None = None
    """What to do when memory ran out, see `failure.less_memory`."""
    record_failure: Callable[[Record], object] = lambda record: None
    """Done by the rank that reports, before it does (status, ledger, lease); takes a few seconds at most."""
    on_exit: Callable[[], object] = lambda: None
    """Done by every rank as it leaves (the lease, the terminal's live bar)."""


def _log_only(text: str, *values: object) -> None:
    """Into the log file only, if it is open: the terminal gets the summary, once."""
    if log.hasHandlers():  # else Python prints it
        log.error(text, *values, extra={"shown": True})


class FailureExit:
    """Ends this rank, from any thread, once it or another one has failed.

    `neighbors` gives the pids of the job's other processes on this machine; `store` is None with one process.
    """

    def __init__(self, rank: int, size: int, store: Any | None, neighbors: Callable[[], Iterable[int]]):
        self.rank, self.size, self.store, self.run = rank, size, store, RunFacts()
        self._neighbors = neighbors
        self._leaving = threading.Lock()

    def attach(self, run: RunFacts) -> None:
        """Failures from here on are those of this run."""
        self.run = run

    def describe(self, error: BaseException) -> Record:
        """The record of what this rank's main thread has raised, which goes into the log as well."""
        samples = self._samples(failure.own_position(self.rank))
        try:  # torch raises for a killed loader worker out of SIGCHLD's handler, maybe later than what is seen of it here
            if isinstance(error, ConnectionError | EOFError):
                time.sleep(0.5)
            if is_owned():  # this error ends the process: no more of them
                with contextlib.suppress(ValueError):  # not the main thread
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError as late:
            error = late
        record = failure.describe(error, self.rank, samples, self.size) | {"logs": self._logs(self.rank)}
        if self.run.less_memory and status.phase in (FORWARD, BACKWARD) and failure.is_out_of_memory(record["error"]):
            record["try"], halved = self.run.less_memory()
            if halved is not None and is_owned():
                record["halved"] = halved
        if not self._leaving.locked():  # else the log is being closed
            _log_only("failed in step %d (%s)\n%s", status.step, PHASES[status.phase], record["details"].rstrip())
        return record

    def record(self, kind: str, position: Record) -> Record:
        """The record of a rank that was lost or hangs at that position."""
        found = failure.new_record(kind, position, self._samples(position), self.size)
        return {**found, "logs": self._logs(position["rank"])}

    def _samples(self, position: Record) -> Sequence[int]:
        with contextlib.suppress(Exception):
            if DATA <= position["phase"] <= CALLBACK:
                return self.run.samples(position["step"], position["rank"])
        return ()

    def _logs(self, rank: int) -> str:
        others = ", and the other ranks' beside it" if self.size > 1 else ""
        return self.run.logs and f"{self.run.logs}/rank-{rank}.log{others}"

    def conclude(self, record: Record) -> NoReturn:
        """What this rank has found is the cause, unless another rank was first."""
        mine = True
        if self.store is not None:
            with contextlib.suppress(Exception):
                mine = self.store.add("failures", 1) == 1
                if mine:
                    self.store.set("failure", json.dumps(record))
                else:
                    record = json.loads(self.store.get("failure"))
        self.leave(record, mine)

    def leave(self, record: Record, mine: bool) -> NoReturn:
        """Write the log, report the failure if it is `mine` or nobody else does, and exit."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(LEAVE_SECONDS)  # the other thread is leaving, and ends this process
            os._exit(1)
        deadline = time.monotonic() + LEAVE_SECONDS
        # A C thread: it ends this process even while other C code holds the GIL.
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        try:
            _log_only("leaving\n%s", failure.summary(record))
            if record["kind"] == "hang" or record["rank"] != self.rank:
                _log_only("stacks of all threads of this rank\n%s", stacks())
                self._dump_flight_recorder()
            _bounded(self.run.on_exit, 2.0)
            if mine or not self._wait_for_report(deadline - 1.5):
                self._report(record)
            if "halved" not in record:
                # One that is stopped, or in C code that holds the GIL, can't leave by itself, nor by SIGTERM, and torchrun
                # would wait 30 s and more for it.
                kill_later(self._neighbors(), LEAVE_SECONDS)
        finally:
            for handler in log.handlers:
                handler.flush()
            sys.stdout.flush()
            if "halved" in record:
                restart()
            os._exit(1)

    def _report(self, record: Record) -> None:
        _bounded(lambda: self.run.record_failure(record), LEAVE_SECONDS - 1)
        with contextlib.suppress(Exception):
            if self.store is not None and self.store.add("reports", 1) > 1:
                return  # a slow reporter and its stand-in: one of them is enough
        if self.rank and sys.stderr.isatty():
            time.sleep(0.5)  # rank 0 removes its live bar
        if "halved" in record:
            then = f"all ranks restart with micro-batches of {record['halved']}"
            print(f"warning: {failure.cause(record)}; {then}", file=sys.stderr, flush=True)
        else:
            failure.report(record, self.rank)
        with contextlib.suppress(Exception):
            if self.store is not None:
                self.store.set("reported", "")

    def _wait_for_report(self, deadline: float) -> bool:
        """Whether another rank has reported; it then leaves first, so that torchrun takes its exit for the cause."""
        assert self.store is not None
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                if self.store.check(["reported"]):
                    time.sleep(1.0)  # torchrun compares times in whole seconds
                    return True
                time.sleep(0.05)
        return False

    def _dump_flight_recorder(self) -> None:
        """NCCL's record of the last collectives, where there is one, beside the log."""
        with contextlib.suppress(Exception):
            import torch

            if self.run.logs and torch.distributed.is_nccl_available() and torch.cuda.is_initialized():
                content = torch._C._distributed_c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
                with open(os.path.join(self.run.logs, f"nccl-rank-{self.rank}.json"), "wb") as file:
                    file.write(content if isinstance(content, bytes) else str(content).encode())


def _bounded(action: Callable[[], object], seconds: float) -> None:
    """Call it, whatever it raises, and wait for it that long at most."""

    def run() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=seconds)


# Config errors: nothing has started, so no failure is recorded; but one rank only should report.

_elected = False


def elect_reporter(store: Any | None, rank: int) -> None:
    """Rank 0 reports a config error, or where rank 0 has found none, the first rank that has."""
    global _elected
    deadline = time.monotonic() + 1.5
    with contextlib.suppress(Exception):
        while store is not None and rank and time.monotonic() < deadline:
            if json.loads(store.get("beat/0"))["phase"] == CONFIG:
                return
            time.sleep(0.1)
        _elected = store is not None and store.add("reports", 1) == 1


def report_config_error(error: ConfigError, rank: int) -> None:
    """Report a config error on rank 0 only. The others wait: torchrun ends everybody as soon as one rank has left.

    A rank that nobody ends meanwhile has found an error that rank 0 hasn't (a module that only its node lacks, say): it reports.
    """
    where = ""
    if rank != 0:
        if not _elected:
            signals.hold()
            if signals.take(_LAUNCHER_SECONDS):
                return  # the launcher ends this rank, because rank 0 has reported and left
        where = f"rank {rank} on {socket.gethostname()}:\n"
    failure.write_error_file(f"{where}{error}")
    if failure.torchrun_shows():
        return
    failure.leave_code(2)
    lines = [str(problem) for problem in error.problems]
    if is_terminal(sys.stderr):
        lines = [_for_people(problem) for problem in error.problems]
    print(where + "\n".join(lines), file=sys.stderr, flush=True)


def _for_people(problem: Problem) -> str:
    """A mistake in color, wrapped at the terminal's width."""
    text, color = wrapped(str(problem), columns(sys.stderr)), has_color(sys.stderr)
    where, key = (f"{part}: " if part else "" for part in (problem.where, problem.key))
    if not text.startswith(where + key):
        return text
    return painted(where, "dim", color) + painted(key, "red", color) + text[len(where + key) :]
