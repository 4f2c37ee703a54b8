"""The arguments of commands: which options they share, and how errors in them are reported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dist_train.config.errors import ConfigError
from dist_train.files import temporary_beside

Option = tuple[str, dict[str, Any]]  # what argparse's add_argument takes

CONFIG: tuple[Option, ...] = (
    ("--config", {"metavar": "FILE", "help": "a YAML config; without it the built-in example"}),
    ("overrides", {"nargs": "*", "metavar": "key.path=value", "help": "overrides take precedence over the file"}),
)
CHECKPOINT: Option = (
    "--checkpoint",
    {"metavar": "NAME", "help": "best, last or step-N; by default best if it is kept, else last"},
)
SPLIT: Option = (
    "--split",
    {"choices": ("val", "test", "train"), "help": "which data; by default test where the run has it, else val"},
)


def output(metavar: str, about: str) -> Option:
    """The option `--output`, which `parse_run` checks before anything starts."""
    return "--output", {"metavar": metavar, "help": about}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise command_error(self.prog.rpartition(" ")[2], message)


def command_error(command: str, message: str) -> ConfigError:
    """What to raise for wrong arguments: a `ConfigError`, so that rank 0 alone reports it."""
    return ConfigError.single("", f"{message}; see dist-train {command} --help", where="command line")


def parse(command: str, about: str | None, arguments: Sequence[str], *options: Option) -> argparse.Namespace:
    """Parse a command's arguments by a table of its options; `about` is its module's docstring.

    Raises:
        ConfigError: the arguments are wrong.
    """
    description = (about or "").partition(": ")[2]
    parser = _Parser(
        prog=f"dist-train {command}", description=description[:1].upper() + description[1:], allow_abbrev=False
    )
    for name, settings in options:
        parser.add_argument(name, **settings)
    return parser.parse_intermixed_args(list(arguments))


def parse_run(
    command: str,
    about: str | None,
    arguments: Sequence[str],
    *options: Option,
    several: bool = False,
    no_overrides: bool = False,
) -> argparse.Namespace:
    """The same for a command on a run: `run`, its directory (all of them in `runs`), and `overrides` of its config.

    A run is given by `--run DIR` or by DIR alone: torchrun takes `--run` for one of its own options (before Python 3.12).

    Args:
        several: more than one run may be given. no_overrides: the command takes no config overrides.
    """
    where = "the run's directory or URL (--run may be left out, and must be with torchrun)"
    where += "; give several to overlay their curves" if several else ""
    keys = {"nargs": "*", "metavar": "DIR | key.path=value", "help": "overrides take precedence over the run's config"}
    keys |= {"metavar": "DIR", "help": "the same"} if no_overrides else {}
    run: Option = ("--run", {"action": "append", "default": [], "metavar": "DIR", "help": where})
    found = parse(command, about, arguments, run, *options, ("rest", keys))
    found.overrides = [word for word in found.rest if "=" in word and not os.path.isdir(word)]
    found.runs = found.run + [word for word in found.rest if word not in found.overrides]
    wrong = "" if found.runs else "no run was given: --run DIR"
    if len(found.runs) > 1 and not several:
        wrong = f"expected one run, found {', '.join(found.runs)}"
    elif found.overrides and no_overrides:
        wrong = wrong or f"it takes no config overrides, found {', '.join(found.overrides)}"
    if wrong:
        raise command_error(command, wrong)
    found.run = found.runs[0]
    if getattr(found, "output", None) is not None:
        if _is_of_a_run(Path(found.output).resolve()):
            raise ConfigError.single("--output", f"{found.output} is a run's own file; give another name or directory")
        writable(found.output)
    return found


def _is_of_a_run(path: Path) -> bool:
    from dist_train.runtime.location import FILES, FOLDERS

    run = next((folder for folder in path.parents if (folder / "config.yaml").is_file()), None)
    if run is None or not (run / "checkpoints").is_dir():
        return False
    first, *more = path.relative_to(run).parts
    return first in FOLDERS or (first in FILES and not more)


def writable(path: str, option: str = "--output") -> Path:
    """The path of a local file that can be written; its directory is made.

    Raises:
        ConfigError: `path` can't be written. (`parse_run` finds that before anything starts.)
    """
    target = Path(path)
    try:
        if "://" in path:
            raise OSError("expected a path on this machine, found a URL")
        if target.is_symlink():
            raise OSError("it is a symbolic link; name the file itself")
        if target.exists() and not target.is_file():
            raise OSError("it is a directory, a device or a pipe; expected a file, or a name that isn't taken")
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(target) as part:
            part.touch()
    except OSError as error:
        raise ConfigError.single(option, f"{path} can't be written: {error}") from None
    return target
