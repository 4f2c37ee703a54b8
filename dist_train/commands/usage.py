"""What each command takes, as a table that its help, its parsing and the shells' completion read. Imports next to nothing.

A command's help must appear at once, so nothing here (and nothing at the top of a module of this room) imports pydantic,
yaml or torch.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import argparse

Option = tuple[str, dict[str, Any]]  # what argparse's add_argument takes
WIDTH = 80

# Each is a module of dist_train.commands, imported when it is called.
GROUPS = {
    "begin": {
        "demo": "train the built-in example: 1,797 handwritten digits",
        "new": "a folder with a model, a dataset and a config to begin from",
        "train": "train a config, or resume its run (the default command)",
        "doctor": "whether all hosts are ready for a job, with a dry run of it",
        "config": "a config with every default, one value, or the JSON Schema",
    },
    "look": {
        "runs": "a table of all runs, or a page with their curves",
        "report": "rewrite a run's report.html, or compare several runs",
        "evaluate": "metrics of a run's checkpoint, on its data or other data",
        "compare": "whether two runs are bitwise identical, else where they part",
        "verify": "check every file of every checkpoint of a run",
    },
    "use": {
        "predict": "predictions for each sample of a dataset, as a table",
        "export": "a run's weights for other programs",
        "completion": "complete commands, keys and runs in bash, zsh or fish",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}
NOTES = (
    "Any key of a config can be given as key=value: optimizer.lr=0.05 trainer.duration=3ep. A run is its directory, such as "
    "runs/digits. For several processes: --nproc 4, or torchrun --nproc_per_node=4 -m dist_train.main [COMMAND] ...",
    "exit codes: 0 done; 1 failed (compare: the runs differ); 2 the config or the command is wrong, and nothing was started; "
    "75 stopped on request and saved, run it again to resume (0 under torchrun, which would restart it); 130 or 143 ended by "
    "Ctrl-C or SIGTERM before it started.",
)


class Usage(NamedTuple):
    """What a command takes.

    Attributes:
        about: sentences for its help. example: command lines, with a remark behind `#`.
        takes: `config` (a config and keys), `keys`, `run` (one run), `run and keys`, `runs and keys`, or nothing more
            than its options.
    """

    name: str
    about: str
    example: str
    options: tuple[Option, ...] = ()
    takes: str = ""

    def table(self) -> tuple[Option, ...]:
        """All that it takes."""
        shared = (option for option in _SHARED[self.takes] if option is not _PROCESSES or self.name != "config")
        return (*shared, *self.options)

    def parser(self) -> argparse.ArgumentParser:
        """Its parser; wrong arguments raise ArgumentTypeError."""
        import argparse

        class Parser(argparse.ArgumentParser):
            def error(self, message: str) -> NoReturn:
                raise argparse.ArgumentTypeError(message)

        width = help_width()
        named = " ".join(settings["metavar"] for name, settings in self.table() if name[0] != "-")
        parser = Parser(
            prog=f"dist-train {self.name}",
            usage=f"dist-train {self.name} {_PLACES.get(self.takes, named)} [options]",
            description=textwrap.fill(self.about, width),
            epilog=f"example:\n{textwrap.indent(self.example, '  ')}",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=22, width=width),
            allow_abbrev=False,
        )
        for name, settings in self.table():
            parser.add_argument(name, **settings)
        return parser


def _rest(metavar: str, about: str) -> Option:
    return "rest", {"nargs": "*", "metavar": metavar, "help": about}


_RUN: Option = (
    "--run",
    {"action": "append", "default": [], "metavar": "DIR", "help": "the same as DIR; torchrun takes --run for its own"},
)
_CONFIG: Option = ("--config", {"metavar": "FILE", "help": "the same as FILE.yaml alone"})
_PROCESSES: Option = (
    "--nproc",
    {"metavar": "N", "help": "N processes here, started as torchrun does; auto: one a GPU"},
)
_SHARED: dict[str, tuple[Option, ...]] = {
    "": (),
    "keys": (_rest("key=value", "keys of the config"), _PROCESSES),
    "config": (_rest("FILE.yaml, key=value", "a config, and keys that take precedence over it"), _CONFIG, _PROCESSES),
    "run": (_rest("DIR", "a run's directory or URL"), _RUN),
    "run and keys": (_rest("DIR, key=value", "a run's directory or URL, and keys of its config"), _RUN),
    "runs and keys": (_rest("DIR, key=value", "a run's directory or URL, and keys of its config"), _RUN),
}
_PLACES = {
    "keys": "[key=value ...]",
    "config": "[FILE.yaml] [key=value ...]",
    "run": "DIR",
    "run and keys": "DIR [key=value ...]",
    "runs and keys": "DIR [DIR ...] [key=value ...]",
}


def help_width() -> int:
    """Columns of help: those of the terminal, 80 at most."""
    return max(30, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def overview() -> str:
    """The help of `dist-train` itself."""
    width = help_width()
    lines = ["usage: dist-train COMMAND [options]", "       dist-train FILE.yaml [key=value ...]"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, text in commands.items():
            lines += textwrap.wrap(text, width, initial_indent=f"  {name:<11} ", subsequent_indent=" " * 14)
    lines += ["", "options of a command: dist-train COMMAND --help", "the version: dist-train --version"]
    return "\n".join([*lines, *(f"\n{textwrap.fill(note, width)}" for note in NOTES)])


def version() -> str:
    """`dist-train 0.1.0`."""
    from dist_train import __version__

    return f"dist-train {__version__}"


def is_rank_zero() -> bool:
    """Whether no launcher says that this is one of the other ranks: help is printed once."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID"))
