"""The report of a run: at its end, with the model in memory; and later, with the model that is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.config.errors import ConfigError
from dist_train.config.slots import require_components
from dist_train.pages.page import write_page
from dist_train.run.open import Restored, open_run, restore_in
from dist_train.runtime.launch import read_placement
from dist_train.runtime.rundir import RunDir
from dist_train.runtime.sidefiles import problems
from dist_train.views.model import make_report

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World
    from dist_train.training.trainer import Trainer


def report_at_end(trainer: Trainer) -> None:
    """Write the report of a completed run with the model in memory; all ranks call it. Never raises."""
    parts, loaders, console = trainer.parts, trainer.parts.eval_loaders, trainer.console
    loader = loaders.get("test") or loaders.get("val")
    make_report(trainer.run, parts.config, parts.evaluator, loader, trainer.step, trainer.outputs.record, console.warn)


def report_again(location: str, checkpoint: str | None, overrides: Sequence[str]) -> Path | None:
    """Write the report of a run as it is now; its path on rank 0. Where its model isn't available, without pictures.

    Raises:
        ConfigError: there is no run, or what was asked for by name can't be had.
    """
    run = RunDir(location)
    is_main = read_placement(os.environ).rank == 0

    def warn(text: str) -> None:
        if is_main:
            print(f"warning: {text}", file=sys.stderr)

    for name, wrong in problems(run.storage):
        warn(f"{name} can't be read: {wrong}")
    try:
        with open_run(location, checkpoint, overrides) as restored:
            return report_of(restored, warn)
    except (ConfigError, CheckpointError) as error:
        if checkpoint is not None or overrides or not run.storage.exists("config.yaml"):
            raise
        warn(f"the report has no pictures: {error}")
        return write_page(run) if is_main else None


def report_in(world: World, run: RunDir, config: Config, warn: Callable[[str], None]) -> None:
    """Write the report of a completed run whose last start was killed before it did; all ranks of `world` call it."""
    try:
        require_components(config)
        restored = restore_in(world, run, config)
        modes = [(module, module.training) for module in restored.evaluator.modules.modules()]
        report_of(restored, warn)
        for module, training in modes:
            module.training = training
    except (ConfigError, CheckpointError) as error:
        warn(f"the report has no pictures: {error}")
        if world.is_main:
            with run.best_effort():
                write_page(run)


def report_of(restored: Restored, warn: Callable[[str], None]) -> Path | None:
    """Write the report of an opened run, with pictures where it has data for them; all ranks call it."""
    data, found = restored.config.data, restored.found
    restored.evaluator.modules.eval()
    loader = None if data.test is None and data.val is None else restored.loader(restored.split(None))
    return make_report(restored.run, restored.config, restored.evaluator, loader, found.step, found.meta, warn)
