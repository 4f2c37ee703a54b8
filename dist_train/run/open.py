"""Open a trained run: its config, the weights of one of its checkpoints, its data. Nothing is written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dist_train.building.model import build_model_parts, load_weights
from dist_train.building.prepare import build_dataset, build_model, check_pictures, eval_loader
from dist_train.checkpoint.manifest import CheckpointError, CorruptedError
from dist_train.checkpoint.store import CheckpointStore, Found
from dist_train.config.components import add_code_paths
from dist_train.config.errors import ConfigError
from dist_train.config.slots import require_components
from dist_train.data.loader import EvalLoader
from dist_train.evaluation.evaluate import Evaluator
from dist_train.objective.modules import Modules
from dist_train.run.given import read_given, runs_near
from dist_train.runtime.launch import Placement, read_placement
from dist_train.runtime.rundir import RunDir
from dist_train.runtime.seeding import undisturbed_generators
from dist_train.runtime.world import World, open_world

if TYPE_CHECKING:
    from dist_train.config.schema import Config


@dataclass
class Restored:
    """A run with the weights of one checkpoint in its model: the EMA weights where there are any.

    Attributes:
        found: the checkpoint.
        evaluator: the model in eval mode, on this rank's device, with the run's task, metrics and precision.
    """

    run: RunDir
    config: Config
    world: World
    found: Found
    evaluator: Evaluator

    def split(self, wanted: str | None) -> str:
        """The split asked for; by default test where the run has one, else val.

        Raises:
            ConfigError: the run has no data for it.
        """
        split = wanted or ("test" if self.config.data.test is not None else "val")
        if getattr(self.config.data, split) is None:
            fix = f"add data.{split}._target_=... to the command, or choose another --split"
            raise ConfigError.single(f"data.{split}", f"the run in {self.run.location} has none; {fix}")
        return split

    def loader(self, split: str) -> EvalLoader:
        """Every sample of a split once, over all ranks."""
        dataset = build_dataset(self.config, split, self.world)
        check_pictures(self.config, self.world, dataset, split, self.evaluator.prepare)
        return eval_loader(self.config, self.world, dataset, split)


@contextlib.contextmanager
def open_run(
    location: str, checkpoint: str | None, overrides: Sequence[str] = (), *, alone: bool = False
) -> Iterator[Restored]:
    """A run restored for evaluation, on however many processes there are.

    Args:
        location: the run's directory.
        checkpoint: `best`, `last` or `step-N`; None is best where the run keeps it, else last.
        overrides: `key.path=value`, applied to the run's config.
        alone: this process doesn't wait for others, whatever launched it.

    Raises:
        ConfigError: there is no such run or checkpoint, or it doesn't fit the config.
        CorruptedError: the checkpoint is corrupted.
    """
    run = RunDir(location)
    config = read_config(run, overrides)
    with open_world(config.distributed, Placement() if alone else read_placement(os.environ)) as world:
        restored = restore_in(world, run, config, checkpoint)
        restored.evaluator.modules.eval()
        yield restored


def restore_in(world: World, run: RunDir, config: Config, checkpoint: str | None = None) -> Restored:
    """As `open_run`, among processes that are connected already, by a checked config; modules keep their modes."""
    evaluator = Evaluator(build_model_parts(config, world))
    return Restored(run, config, world, _restore(evaluator.modules, run, checkpoint, world), evaluator)


def load_model(run: RunDir, checkpoint: str | None, model: nn.Module | None = None) -> nn.Module:
    """The model of a run (or `model`) on the CPU, with the weights of a checkpoint."""
    if model is None:
        config = read_config(run)
        with undisturbed_generators():
            model = build_model(config)
    _restore(Modules(model), run, checkpoint)
    return model


def _restore(modules: Modules, run: RunDir, checkpoint: str | None, world: World | None = None) -> Found:
    """Load the weights asked for into a model, the same on all ranks; returns their checkpoint.

    A run that is training deletes checkpoints, perhaps the one that is being read here: then it is looked up again.
    """
    store = _store(run)
    while True:
        step = (
            find_weights(run, checkpoint).step
            if world is None
            else world.on_main(lambda: find_weights(run, checkpoint).step)
        )
        try:
            found = store.open(step)
            if found is not None:
                load_with_ema(modules, found)
        except CorruptedError:
            found = None
            if step in store.steps():
                raise
        missed = [found is None] if world is None else world.all_gather(found is None)
        if found is not None and not any(missed):
            return found


def find_weights(run: RunDir, checkpoint: str | None) -> Found:
    """The checkpoint asked for, verified.

    Raises:
        ConfigError: there is no such one; names those that there are.
        CorruptedError: it is corrupted.
    """
    store = _store(run)
    if not store.steps():
        raise ConfigError.single("--run", f"{run.location} holds no checkpoint{runs_near(run)}")
    try:
        return store.find(checkpoint)
    except CorruptedError:
        raise
    except CheckpointError as error:
        raise ConfigError.single("--checkpoint", str(error)) from None


@torch.no_grad()
def load_with_ema(modules: Modules, found: Found) -> None:
    """Load a checkpoint's weights into a model (and its loss or task), then the EMA weights over them where it holds any.

    Raises:
        ConfigError: they don't fit.
        CorruptedError: the bytes aren't those that were saved.
    """
    load_weights(modules, found)
    if "ema" in found.parts:
        ema = found.load("ema")
        for name, parameter in modules.named_parameters():
            if name in ema:
                parameter.copy_(ema[name])


def _store(run: RunDir) -> CheckpointStore:
    return CheckpointStore(run.storage.sub("checkpoints"), lambda line: print(line, file=sys.stderr))


def read_config(run: RunDir, overrides: Sequence[str] = ()) -> Config:
    """The run's config under `overrides`, with its components looked up; without what only training needs."""
    config = read_given(run, overrides)
    add_code_paths(config.run.code_paths)
    require_components(config)
    # One process evaluates what many have trained, and a CPU what GPUs have. Kernels sum in another order with another
    # number of threads, and launchers set one: so it is one here too, unless config or environment say otherwise.
    plain = {"sync_batchnorm": False, "strategy": "auto"}
    threads = {"threads": 1} if config.distributed.threads == "auto" and "OMP_NUM_THREADS" not in os.environ else {}
    return config.model_copy(update={"distributed": config.distributed.model_copy(update=plain | threads)})
