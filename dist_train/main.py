"""The command line: `python -m dist_train.main [COMMAND] [--config FILE] [key.path=value ...]`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from dist_train.config.errors import ConfigError, did_you_mean
from dist_train.runtime.launch import rank_of_environment
from dist_train.watch import failure, leave, signals
from dist_train.watch.processes import owned_by_command

# Each is a module of dist_train.commands, imported when it is called.
COMMANDS = {
    "train": "train, or resume the run of that name (the default command)",
    "evaluate": "metrics of a run's checkpoint: --run DIR [--checkpoint best|last|step-N] [--split val|test]",
    "predict": "predictions of each sample as a table: --run DIR [--checkpoint ...] [--split ...] [--output FILE.csv]",
    "export": "a run's weights: --run DIR [--format state_dict|module|safetensors|torch_export] [--output FILE]",
    "report": "rewrite a run's report.html: --run DIR; several --run overlay their curves",
    "runs": "the runs below a directory or URL, and where their configs differ: [DIR] [--watch] [--json]",
    "compare": "whether two runs are bitwise identical, else the first step and tensor at which they part: RUN RUN",
    "verify": "check every file of every checkpoint of a run: --run DIR",
    "doctor": "whether all hosts are ready for a job, with a dry run: [--config FILE] [--min-bandwidth GB/s] [--json FILE]",
    "new": "a folder with a model, a dataset, a config and a batch script to start from: DIR",
    "config": "print the resolved config; --get KEY one value, --schema its JSON Schema",
}
USAGE = """\
usage: python -m dist_train.main [COMMAND] [--config FILE] [key.path=value ...]
   or: torchrun --nproc_per_node=4 -m dist_train.main [COMMAND] [--config FILE] [key.path=value ...]

commands:
{commands}

A run is its directory: `--run DIR` or just DIR (torchrun takes --run for its own). Keys of its config can be overridden after it:
predict runs/digits data.test.path=new.csv.

Without --config the built-in example is trained (1,797 handwritten digits). Any key of the config can be overridden,
like optimizer.lr=0.05 trainer.duration=3ep; docs/config.md describes them all.

exit codes: 0 done, 1 failed (compare: the runs differ), 2 the config or the command is wrong (nothing was started), 75 stopped
on request and saved, run it again to resume (0 under torchrun, which would restart it), 130 or 143 ended by Ctrl-C or SIGTERM
before it started."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<9}  {text}" for name, text in COMMANDS.items())))
        return 0
    named = arguments and not arguments[0].startswith("-") and "=" not in arguments[0]
    name = arguments.pop(0) if named else "train"
    rank = rank_of_environment()
    signals.install(stops=name == "train", reports=rank == 0)
    try:
        if name not in COMMANDS:
            is_file = name.endswith((".yaml", ".yml"))
            guess = f"; did you mean --config {name}?" if is_file else did_you_mean(name, COMMANDS)
            message = f"unknown command {name!r}{guess}; commands: {', '.join(COMMANDS)}"
            raise ConfigError.single("", message, where="command line")
        with owned_by_command():
            return importlib.import_module(f"dist_train.commands.{name}").main(arguments)
    except ConfigError as error:
        leave.report_config_error(str(error), rank)
        return 2
    except (BrokenPipeError, leave.ReportedError):
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        failure.report(failure.describe(error, rank))
        return 1
    finally:  # somebody else's process may go on, and train in its own way
        signals.restore()


def console_main() -> None:
    """The console script `dist-train`."""
    code = main()
    if code == 2:  # nothing was started, so nothing is torn down: least of all a process group that other ranks are in
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console_main()
