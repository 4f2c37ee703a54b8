"""Reading a command's arguments, with the config errors' own way of saying what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from dist_train.config.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `ConfigError`s, so that only rank 0 tells them."""

    def __init__(self, name: str, description: str):
        super().__init__(prog=f"dist-train {name}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError.single("", f"{message}; see {self.prog} --help", where="command line")


def with_config(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse `--config FILE` and `key=value` overrides beside the parser's own arguments."""
    parser.add_argument("--config", metavar="FILE", help="a YAML config; without it the built-in example")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that go before the file's")
    return parser.parse_intermixed_args(list(arguments))


def with_run(
    parser: Parser, arguments: Sequence[str], *, several: bool = False, whole: bool = False
) -> argparse.Namespace:
    """Parse which run is meant (`run`, all of them in `runs`), with which weights (`checkpoint`), and `overrides` of its config.

    A run is given by `--run DIR` or by DIR alone: torchrun takes `--run` for one of its own options (before Python 3.12).
    `several` runs may be given; `whole`: neither one checkpoint nor keys are taken.
    """
    about = "the run's directory or URL (--run may be left out, and must be behind torchrun)"
    about += "; give several to lay their curves over each other" if several else ""
    parser.add_argument("--run", action="append", default=[], metavar="DIR", help=about)
    about, keys = (
        "best, last or step-N; by default best if it is kept, else last",
        "values that go before the run's config",
    )
    if whole:
        parser.set_defaults(checkpoint=None)
        parser.add_argument("rest", nargs="*", metavar="DIR", help="the run's directory or URL")
    else:
        parser.add_argument("--checkpoint", metavar="NAME", help=about)
        parser.add_argument("rest", nargs="*", metavar="DIR | key.path=value", help=keys)
    options = parser.parse_intermixed_args(list(arguments))
    options.overrides = [word for word in options.rest if "=" in word and not os.path.isdir(word)]
    options.runs = options.run + [word for word in options.rest if word not in options.overrides]
    if not options.runs:
        parser.error("which run? give its directory: --run DIR")
    if len(options.runs) > 1 and not several:
        parser.error(f"expected one run, found {', '.join(options.runs)}")
    options.run = options.runs[0]
    if getattr(options, "output", None) is not None:
        if _is_of_a_run(Path(options.output).resolve()):
            raise ConfigError.single("--output", f"{options.output} is a run's own file; give another name or place")
        _part_of(options.output).unlink()
    return options


def _is_of_a_run(path: Path) -> bool:
    from dist_train.runtime.rundir import FILES, FOLDERS

    place = next((folder for folder in path.parents if (folder / "config.yaml").is_file()), None)
    if place is None or not (place / "checkpoints").is_dir():
        return False
    first = path.relative_to(place).parts
    return first[0] in FOLDERS or (len(first) == 1 and first[0] in FILES)


def add_split(parser: Parser) -> None:
    """Add `--split`."""
    about = "which data; by default test where the run has it, else val"
    parser.add_argument("--split", choices=("val", "test", "train"), help=about)


@contextlib.contextmanager
def whole_file(path: str, option: str = "--output") -> Iterator[Path]:
    """A path to write to, which becomes `path` when all is written and vanishes after an error.

    Raises:
        ConfigError: `path` can't be written. (`with_run` finds that before anything starts.)
    """
    part = _part_of(path, option)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: str, option: str = "--output") -> Path:
    """An empty file beside `path`, which is there now."""
    target = Path(path)
    try:
        if "://" in path:
            raise OSError("expected a path on this machine, found a URL")
        if target.is_symlink():
            raise OSError("it is a symbolic link; name the file itself")
        if target.exists() and not target.is_file():
            raise OSError("it is a directory, a device or a pipe; expected a file, or a name that isn't taken")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        part.touch()
    except OSError as error:
        raise ConfigError.single(option, f"{path} can't be written: {error}") from None
    return part
