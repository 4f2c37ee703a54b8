"""`train`: the command that everything is for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import Parser, with_config

if TYPE_CHECKING:
    from dist_train.config.schema import Config


def main(arguments: Sequence[str]) -> int:
    """Train by a config; the exit code says how it ended (75: stopped and saved, run again to go on; 0 under torchrun)."""
    from dist_train.runtime.launch import read_placement

    options = with_config(Parser("train", "Train, or go on with the run of that name."), arguments)
    result = train(options.config, *options.overrides)
    return 0 if result["state"] == "completed" or read_placement(os.environ).under_torchrun else 75


def train(config: str | Mapping[str, Any] | None = None, *overrides: str) -> dict[str, Any]:
    """Train by a config file, a mapping (whose components may be live objects), or the built-in example.

    Returns:
        What result.json holds: state, step, metrics, weights_sha256, ...

    Raises:
        ConfigError: the config is wrong; nothing was started, nothing written.
    """
    from dist_train.config.errors import ConfigError, Problem
    from dist_train.config.load import load_config

    whole = load_config(config, overrides)
    from dist_train.run.start import seems_completed, train_config

    try:
        if not seems_completed(whole):
            check(whole)
        return train_config(whole)
    except ConfigError as error:  # found when the pieces were put together: tell the place of the key
        told = [Problem(p.where or (whole.where(p.key) if p.key else ""), p.key, p.message) for p in error.problems]
        raise ConfigError(told) from error


def checked(source: str | Mapping[str, Any] | None, overrides: Sequence[str]) -> Config:
    """The config, with its components looked up and their arguments checked.

    Raises:
        ConfigError: with every mistake.
    """
    from dist_train.config.load import load_config

    config = load_config(source, overrides)
    check(config)
    return config


def check(config: Config) -> None:
    """Look the components of a config up and check their arguments.

    Raises:
        ConfigError: with every mistake.
    """
    from dist_train.config.errors import ConfigError
    from dist_train.config.slots import check_components

    if problems := check_components(config):  # it adds the code paths
        raise ConfigError(problems)
