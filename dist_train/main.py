"""The command line: `python -m dist_train.main [COMMAND] [--config FILE] [key.path=value ...]`, or `dist-train`."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from dist_train.commands.usage import COMMANDS, is_rank_zero, overview, version

TRAINS = ("train", "demo")  # signals stop these once they have saved
SLOW = (*TRAINS, "evaluate", "predict", "export", "report", "doctor")  # torch is imported, which takes seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (text := _information(*arguments)) is None:
        return _run(arguments)
    with contextlib.suppress(BrokenPipeError):  # `| head`
        if is_rank_zero():
            print(text)
    return 0


def _information(first: str = "", *more: str) -> str | None:
    """Help or the version, for which nothing else is imported; None if something else is asked for."""
    if first in ("--version", "-V"):
        return version()
    if first == "help" and more and more[0] in COMMANDS:
        first, more = more[0], ("--help",)
    if first in COMMANDS and {"-h", "--help"} & set(more):
        usage = importlib.import_module(f"dist_train.commands.{first}").USAGE
        return usage.parser().format_help().rstrip()
    return overview() if first in ("-h", "--help", "help") else None


def _run(arguments: list[str]) -> int:
    from dist_train.commands import mistakes
    from dist_train.config.errors import ConfigError, mask, visible
    from dist_train.files import StorageError
    from dist_train.runtime.launch import rank_of_environment
    from dist_train.runtime.local import run_processes, take_option
    from dist_train.tracking.terminal import close_bottom_line, show_status
    from dist_train.watch import failure, leave, signals
    from dist_train.watch.processes import owned_by_command

    name, rank = "", rank_of_environment()
    try:
        count, arguments = take_option(arguments)
        name = mistakes.command_of(arguments)
        if name not in COMMANDS:
            raise ConfigError.single("", mistakes.unknown_command(name), where=mistakes.COMMAND_LINE)
        given = arguments[1:] if arguments[:1] == [name] else arguments
        if count is not None and name not in SLOW:
            raise ConfigError.single("--nproc", f"{name} is a command of one process", where=mistakes.COMMAND_LINE)
        if count is not None:
            module = importlib.import_module(f"dist_train.commands.{name}")
            return 0 if name in TRAINS and module.is_answered(given) else run_processes(count, arguments)
        signals.install(stops=name in TRAINS, reports=rank == 0)
        if rank == 0 and name in SLOW:
            show_status(f"dist-train {name}" + (": loading torch" if name in TRAINS else " ..."))
        with owned_by_command():
            code: int = importlib.import_module(f"dist_train.commands.{name}").main(given)
        if code and rank == 0:
            failure.leave_code(code)
        return code
    except ConfigError as error:
        leave.report_config_error(error, rank)
        return 2
    except (BrokenPipeError, leave.ReportedError):
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, StorageError) and name not in TRAINS:  # no rank has crashed
            print(f"error: {visible(mask(str(error)))}", file=sys.stderr)
        else:
            failure.report(failure.describe(error, rank))
        return 1
    finally:  # somebody else's process may go on, and train in its own way
        close_bottom_line()
        signals.restore()


def console_main() -> None:
    """The console script `dist-train`: without an argument it prints help, where `python -m dist_train.main` trains."""
    leave_with(main(sys.argv[1:] or ["--help"]))


def leave_with(code: int) -> None:
    """Exit; a reader of the output that has left (`| head`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code == 2:  # nothing was started, so nothing is torn down: least of all a process group that other ranks are in
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave_with(main())
