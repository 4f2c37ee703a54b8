"""The run that a command was given, found and read without torch: a wrong path, checkpoint or key is answered at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import CheckpointStore
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.runtime.rundir import RunDir
from dist_train.runtime.sidefiles import SideFileError, read_mapping

if TYPE_CHECKING:
    from dist_train.config.schema import Config


def check_given(location: str, checkpoint: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Raise ConfigError where there is no such run or checkpoint, or its config doesn't take these overrides."""
    run = RunDir(location)
    read_given(run, overrides)
    store, number = CheckpointStore(run.storage.sub("checkpoints")), re.fullmatch(r"(?:step-)?(\d+)", checkpoint or "")
    unknown = checkpoint not in (None, "best", "last") and (number is None or int(number[1]) not in store.steps())
    if store.steps() and unknown:  # whether it is intact is seen when it is read
        try:
            store.find(checkpoint)
        except CheckpointError as error:
            raise ConfigError.single("--checkpoint", str(error)) from None


def read_given(run: RunDir, overrides: Sequence[str] = ()) -> Config:
    """The run's config under `overrides`; none of its components is looked up."""
    if not run.storage.exists("config.yaml"):
        raise ConfigError.single("--run", f"{run.location} holds no run: config.yaml isn't there{runs_near(run)}")
    try:
        read_mapping(run.storage, "config.yaml")
    except SideFileError as error:
        raise ConfigError.single("--run", str(error)) from None
    return load_config(run.fetch("config.yaml"), overrides)


def runs_near(run: RunDir) -> str:
    """`; runs that are there: ...`: runs beside or inside a directory that isn't one."""
    for folder in (run.root, run.root.parent) if run.storage.is_local else ():
        names = sorted(str(path.parent) for path in folder.glob("*/config.yaml"))
        if names:
            return f"; runs that are there: {', '.join(names[:5])}"
    return ""
