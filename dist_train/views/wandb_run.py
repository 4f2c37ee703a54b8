"""Weights & Biases, in a process of its own that reads JSON lines: `Wandb` starts it, `main` is it.

Why a process: a wandb that hangs can be killed (in the training process its exit hook would block the exit for ever), its
threads don't compete with the training loop for the GIL, and when the training is killed, what was logged is still written
(wandb inside a killed process loses all of it).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_train.tracking.records import FIELDS, Row, encode, read_rows

FINISH = 60.0  # seconds for wandb to finish once the training has ended


class Wandb:
    """The sink in the training process: writes lines to the child's stdin and raises with wandb's own message."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        (folder / "logs").mkdir(exist_ok=True)
        with open(folder / "logs" / "wandb.log", "ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "dist_train.views.wandb_run"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env=os.environ | {"WANDB_SILENT": "true", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._stdin, self._stdout, self._note = self._child.stdin, self._child.stdout, note
        os.set_blocking(self._stdout.fileno(), False)
        init = {"name": folder.name, "config": dict(config), **settings}
        self._send({"folder": str(folder), "trainer": os.getpid(), "init": init})

    def row(self, row: Row) -> None:
        """Sends a row; raises RuntimeError with wandb's message once it has failed."""
        self._send(("row", json.loads(encode(row))))

    def flush(self) -> None:
        """Only reads its answers: the process writes as it goes."""
        self._receive()

    def close(self, outcome: str) -> None:
        """Wait until wandb has written or uploaded everything."""
        self._send(("close", outcome))
        os.set_blocking(self._stdout.fileno(), True)
        self._receive()
        self._child.wait()

    def abandon(self) -> None:
        """Kill a process that hangs."""
        with contextlib.suppress(ProcessLookupError):  # its process group: it started a session
            os.killpg(self._child.pid, signal.SIGKILL)

    def _send(self, message: Any) -> None:
        self._receive()
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            code = self._child.wait()
            self._receive()
            raise RuntimeError(f"wandb's process ended with code {code}; see logs/wandb.log") from None

    def _receive(self) -> None:
        """Read the process's answers: the run's URL once, or an error."""
        for line in self._stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(answer["error"])
            if answer.get("url"):
                self._note(f"wandb: {answer['url']}")


def main() -> None:
    """Read messages until `close` or the end of stdin (the training was killed)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the training handles stops and sends `close`
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever wandb prints goes to the log

    def answer(**what: str | None) -> None:
        with contextlib.suppress(OSError):  # the training may be gone
            print(json.dumps(what), file=answers, flush=True)

    try:
        view = View(**json.loads(sys.stdin.readline()))
        answer(url=view.url)
        outcome = "killed"
        for line in sys.stdin:
            what, value = json.loads(line)
            if what == "close":
                outcome = value
                break
            view.row(value)
        threading.Timer(FINISH, os._exit, [1]).start()
        view.close(outcome)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)  # past wandb's own exit hook


class View:
    """One wandb run. Each row is logged once, over all restarts, with global_step as the x axis and never `step=`.

    wandb drops steps that it has seen, and loses what it hadn't written when it was killed. So what it has is read at the
    start; what it lacks comes from metrics.jsonl.
    """

    def __init__(self, folder: str, trainer: int, init: dict[str, Any]) -> None:
        import wandb

        root = Path(folder)
        (root / "wandb").mkdir(exist_ok=True)
        # The process of a killed start finishes first, so that what it writes is seen, not repeated.
        self._lock = open(root / "wandb" / "lock", "w")  # noqa: SIM115  (held as long as this process)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        kept = root / "wandb" / "run_id"  # in the run's directory: a restart resumes the same wandb run
        if not kept.exists() or not kept.read_text():
            kept.write_text(secrets.token_hex(4))
        run_id = kept.read_text()
        self._have = set(_offline(root / "wandb", run_id))
        settings = wandb.Settings(silent=True, console="off", init_timeout=60, x_stats_pid=trainer)
        # Offline, wandb refuses `resume` with a warning.
        again: Any = {"resume": "allow"} if init.get("mode") != "offline" else {}
        self._run = wandb.init(dir=folder, id=run_id, settings=settings, **again, **init)
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")
        self.url = self._run.url
        last = int(self._run.summary.get("global_step", -1)) if self._run.resumed else -1
        for row in read_rows(root / "metrics.jsonl"):
            if row["step"] > last:
                self.row(row)

    def row(self, row: Row) -> None:
        """Log a row unless wandb has it."""
        split, step = row["split"], row["step"]
        if (split, step) not in self._have:
            self._have.add((split, step))
            values = {f"{split}/{k}": float("nan") if v is None else v for k, v in row.items() if k not in FIELDS}
            self._run.log({"global_step": step, "epoch": row["epoch"], **values})

    def close(self, outcome: str) -> None:
        """Mark the wandb run as finished, preempted (to be resumed) or failed."""
        self._run.summary["outcome"] = outcome
        if outcome == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "completed" else 1)


def _offline(folder: Path, run_id: str) -> Iterator[tuple[str, int]]:
    """The (split, step) pairs written by earlier offline starts."""
    for path in sorted(folder.glob(f"offline-run-*/run-{run_id}*.wandb")):
        for values in read_offline(path):
            step = values.get("global_step")
            for name in values:
                if "/" in name and isinstance(step, int):
                    yield name.split("/")[0], step


def read_offline(path: Path) -> Iterator[dict[str, Any]]:
    """The history in wandb's offline file, a step at a time, up to where a crash truncated it.

    The file is a LevelDB log after 7 bytes of header: blocks of 32 KiB with fragments of (crc, length, kind).
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last fragment
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


if __name__ == "__main__":
    main()
