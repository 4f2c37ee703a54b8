"""What Python code calls: `dist_train.train` and `dist_train.load`. torch is imported once a config has proved to be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from dist_train.pages.result import Result


def train(config: str | Mapping[str, Any] | None = None, *overrides: str) -> Result:
    """Train by a config file, a mapping (whose components may be live objects), or the built-in example.

    A run of that name that was stopped is resumed. One that is completed gives its result; but in a notebook, where a cell is run
    again in order to train again, the next free name is trained (NAME-2, say), and a line says so.

    Args:
        config: a path, a mapping, or None for the built-in example.
        overrides: `key.path=value`; they take precedence over the config.

    Returns:
        A dict, what result.json holds: state, step, metrics, weights_sha256, ...; a notebook shows it with curves.

    Raises:
        ConfigError: the config is wrong; nothing was started, nothing written.
    """
    from dist_train.config.errors import ConfigError, Problem
    from dist_train.config.load import load_config
    from dist_train.config.slots import require_components

    loaded = load_config(config, overrides)
    from dist_train.pages.notebook import shell
    from dist_train.run.completed import answer, fresh_name, seems_completed

    try:
        if shell() is not None:
            loaded = fresh_name(loaded, print)
        if (decision := seems_completed(loaded)) is None:
            require_components(loaded)
        elif (result := answer(loaded, decision)) is not None:
            return result
        from dist_train.run.start import train_config

        return train_config(loaded)
    except ConfigError as error:  # raised while a component was built: it knows the key, not where the key is written
        located = [Problem(p.where or (loaded.where(p.key) if p.key else ""), p.key, p.message) for p in error.problems]
        raise ConfigError(located) from error


def load(run: str | os.PathLike[str], checkpoint: str | None = None, model: nn.Module | None = None) -> nn.Module:
    """The model of a run, in eval mode on the CPU, with the weights of a checkpoint: the EMA weights where there are any.

    Args:
        run: the run's directory.
        checkpoint: `best`, `last` or `step-N`; None is best where the run keeps it, else last.
        model: a module of your own to load the weights into; nothing that the run's config names is called then.

    Raises:
        ConfigError: there is no such run or checkpoint, or it doesn't fit the model.
        CorruptedError: the checkpoint is corrupted.
    """
    from dist_train.run.open import load_model
    from dist_train.runtime.rundir import RunDir

    return load_model(RunDir(os.fspath(run)), checkpoint, model).eval()


def result(run: str | os.PathLike[str]) -> Result:
    """What `train` has returned for a run, read from its directory: of one that isn't completed its state, step and epoch.

    Raises:
        ConfigError: there is no such run.
    """
    from dist_train.config.errors import ConfigError
    from dist_train.pages.result import Result
    from dist_train.run.completed import with_nan
    from dist_train.runtime.rundir import RunDir

    opened = RunDir(os.fspath(run))
    found = opened.read_json("result.json")
    if found is None or found["state"] != "completed":
        found = opened.read_json("status.json")
    if found is None:
        raise ConfigError.single("run", f"{opened.location} holds no run: it has neither result.json nor status.json")
    return Result(with_nan(found) if "metrics" in found else found, opened.location)
