"""What Python code calls: `dist_train.train` and `dist_train.load`. torch is imported once a config has proved to be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from dist_train.config.schema import Config


def train(config: str | Mapping[str, Any] | None = None, *overrides: str) -> dict[str, Any]:
    """Train by a config file, a mapping (whose components may be live objects), or the built-in example.

    Args:
        config: a path, a mapping, or None for the built-in example.
        overrides: `key.path=value`; they take precedence over the config.

    Returns:
        What result.json holds: state, step, metrics, weights_sha256, ...

    Raises:
        ConfigError: the config is wrong; nothing was started, nothing written.
    """
    from dist_train.config.errors import ConfigError, Problem
    from dist_train.config.load import load_config
    from dist_train.config.slots import require_components

    loaded = load_config(config, overrides)
    from dist_train.run.start import seems_completed, train_config

    try:
        if not seems_completed(loaded):
            require_components(loaded)
        return train_config(loaded)
    except ConfigError as error:  # raised while a component was built: it knows the key, not where the key is written
        located = [Problem(p.where or (loaded.where(p.key) if p.key else ""), p.key, p.message) for p in error.problems]
        raise ConfigError(located) from error


def load(run: str | os.PathLike[str], checkpoint: str | None = None, model: nn.Module | None = None) -> nn.Module:
    """The model of a run, in eval mode on the CPU, with the weights of a checkpoint: the EMA weights where there are any.

    Its attribute `dist_train_run` is a `LoadedRun`: where it came from, its config, and `transform`, what to do to an
    input before the model sees it.

    Args:
        run: the run's directory.
        checkpoint: `best`, `last` or `step-N`; None is best where the run keeps it, else last.
        model: a module of your own to load the weights into; nothing that the run's config names is called then.

    Raises:
        ConfigError: there is no such run or checkpoint, or it doesn't fit the model.
        CorruptedError: the checkpoint is corrupted.
    """
    from dist_train.run import open as opening
    from dist_train.runtime.rundir import RunDir

    directory = RunDir(os.fspath(run))
    model, step = opening.load_model(directory, checkpoint, model)
    model.dist_train_run = LoadedRun(directory.location, step)  # type: ignore[assignment]
    return model.eval()


@dataclass
class LoadedRun:
    """Where a module of `load` came from.

    Attributes:
        location: the run's directory. step: that of the checkpoint.
    """

    location: str
    step: int

    @cached_property
    def config(self) -> Config:
        """The run's resolved config."""
        from dist_train.run.open import read_config
        from dist_train.runtime.rundir import RunDir

        return read_config(RunDir(self.location))

    @cached_property
    def transform(self) -> Any:
        """What the run applies to an input of val (else test, else train); None if its data are used as they are.

        The config's own `transform` argument where there is one, so that no data have to be there; else the attribute
        `transform` of the dataset.
        """
        from dist_train.config.components import build
        from dist_train.data.reading import attribute_of
        from dist_train.training.prepare import build_dataset

        data = self.config.data
        split = "val" if data.val is not None else "test" if data.test is not None else "train"
        spec = getattr(data, split)
        while isinstance(spec, dict):
            if "transform" in spec:
                return build(spec["transform"])
            spec = spec.get("dataset")
        return attribute_of(build_dataset(self.config, split), "transform")
