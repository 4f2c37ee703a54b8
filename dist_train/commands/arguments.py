"""Reading a command's arguments, with the config errors' own way of saying what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dist_train.config.errors import ConfigError, Problem


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `ConfigError`s, so that only rank 0 tells them."""

    def __init__(self, name: str, description: str):
        super().__init__(prog=f"dist-train {name}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError([Problem("command line", "", f"{message}; see {self.prog} --help")])


def with_config(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse `--config FILE` and `key=value` overrides beside the parser's own arguments."""
    parser.add_argument("--config", metavar="FILE", help="a YAML config; without it the built-in example")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that go before the file's")
    return parser.parse_intermixed_args(list(arguments))
