"""`--nproc N`: this command as N processes of this machine, started by torchrun's own API."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dist_train.config.errors import ConfigError
from dist_train.tracking.terminal import close_bottom_line, show_status
from dist_train.watch.failure import EXIT_CODE_FILE

OPTION = "--nproc"


def take_option(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--nproc`, None without one, and the other arguments.

    Raises:
        ConfigError: it isn't a number of processes, or a launcher has started this process.
    """
    rest, value = list(arguments), None
    for at, word in enumerate(arguments):
        if word == OPTION or word.startswith(OPTION + "="):
            given = word.partition("=")[2] if "=" in word else " ".join(arguments[at + 1 : at + 2])
            value, rest = given, [*arguments[:at], *arguments[at + (1 if "=" in word else 2) :]]
            break
    wrong = ""
    if value is not None and value not in ("auto", "gpu", "cpu") and not (value.isdigit() and int(value) > 0):
        wrong = f"expected a number of processes, or auto, gpu or cpu as torchrun takes them, found {value!r}"
    elif value is not None and "RANK" in os.environ:
        wrong = "this process is one of several already (RANK is set): leave --nproc out under a launcher"
    if wrong:
        raise ConfigError.single(OPTION, wrong, where="command line")
    return (None if value == "1" else value), rest


def run_processes(count: str, arguments: Sequence[str]) -> int:
    """The exit code of the command with these arguments as that many processes, as torchrun --standalone would start them.

    torchrun's report of a failure is left out: rank 0, or the rank that has failed, has printed its own. Ctrl-C is passed on
    without torchrun's limit of 30 s, within which a slow step may not be saved.
    """
    show_status(f"dist-train: starting {count} processes")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    for name in (
        "torch.distributed.elastic",
        "torch.distributed.elastic.agent.server.api",
    ):  # this has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if count != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning
    given = ["--standalone", f"--nproc_per_node={count}", "--signals_to_handle=SIGTERM,SIGHUP,SIGQUIT", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "code")
        os.environ[EXIT_CODE_FILE] = str(file)
        before = signal.signal(signal.SIGINT, _pass_on)  # not SIG_IGN, which the processes would inherit
        close_bottom_line()
        try:
            run(get_args_parser().parse_args([*given, "dist_train.main", *arguments]))
        except ChildFailedError as error:
            _, first = error.get_first_failure()
            if first.exitcode == 130:  # ended by Ctrl-C, before the run began or by a second one
                return 130
            if not file.exists():
                print(f"dist-train: a process ended without a message: {first.message}", file=sys.stderr)
            return _left(file, 1)
        except SignalException as ended:
            return _left(file, 128 + ended.sigval)
        finally:
            signal.signal(signal.SIGINT, before)
            del os.environ[EXIT_CODE_FILE]
        return _left(file, 0)


def _pass_on(number: int, _: object) -> None:
    """To the processes, which aren't in the terminal's foreground group."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _left(file: Path, default: int) -> int:
    """What `failure.leave_code` has left."""
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return default
