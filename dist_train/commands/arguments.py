"""The arguments of commands: how they are parsed, and how mistakes in them are answered."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dist_train.commands.mistakes import COMMAND_LINE, is_config, mistakes
from dist_train.commands.usage import Option, Usage
from dist_train.config.errors import ConfigError, Problem
from dist_train.files import temporary_beside

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


def command_error(command: str, message: str) -> ConfigError:
    """What to raise for wrong arguments: a `ConfigError`, so that rank 0 alone reports it."""
    return ConfigError.single("", f"{message}; see dist-train {command} --help", where=COMMAND_LINE)


def parse(usage: Usage, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command's arguments; of one that takes a config, `config` is its file and `overrides` its keys.

    Raises:
        ConfigError: the arguments are wrong.
    """
    parser = usage.parser()
    flags = {name: action.nargs == 0 for action in parser._actions for name in action.option_strings}
    if wrong := list(mistakes(usage, list(arguments), flags)):
        raise ConfigError([*(Problem(COMMAND_LINE, "", text) for text in wrong), *_of_keys(usage, arguments)])
    try:
        found = parser.parse_intermixed_args(list(arguments))
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise command_error(usage.name, str(error)) from None
    if usage.takes in ("config", "keys"):
        files = [word for word in found.rest if is_config(word)] if usage.takes == "config" else []
        found.overrides = [word for word in found.rest if word not in files]
        files = [*([found.config] if usage.takes == "config" and found.config is not None else []), *files]
        if len(files) > 1:
            raise command_error(usage.name, f"expected one config, found {', '.join(files)}")
        found.config = files[0] if files else None
    return found


def _of_keys(usage: Usage, arguments: Sequence[str]) -> list[Problem]:
    """What is wrong with the keys beside a mistake, so that all is reported at once."""
    if usage.takes not in ("config", "keys"):
        return []
    from dist_train.config.load import load_config

    files = [word for word in arguments if is_config(word)]
    try:
        load_config(files[0] if files else None, [word for word in arguments if "=" in word and word[0] != "-"])
    except ConfigError as error:
        return error.problems
    return []


def parse_run(usage: Usage, arguments: Sequence[str]) -> argparse.Namespace:
    """The same for a command on a run: `run`, its directory (all of them in `runs`), and `overrides` of its config.

    A run is given by `--run DIR` or by DIR alone: torchrun takes `--run` for one of its own options (before Python 3.12).
    """
    found = parse(usage, arguments)
    found.overrides = [word for word in found.rest if "=" in word and not os.path.isdir(word)]
    found.runs = found.run + [word for word in found.rest if word not in found.overrides]
    wrong = "" if found.runs else "no run was given: --run DIR"
    if len(found.runs) > 1 and usage.takes != "runs and keys":
        wrong = f"expected one run, found {', '.join(found.runs)}"
    elif found.overrides and usage.takes == "run":
        wrong = wrong or f"it takes no config overrides, found {', '.join(found.overrides)}"
    if wrong:
        raise command_error(usage.name, wrong)
    found.run = found.runs[0]
    if usage.takes == "run and keys":
        from dist_train.run.given import check_given

        check_given(found.run, found.checkpoint, found.overrides)
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
