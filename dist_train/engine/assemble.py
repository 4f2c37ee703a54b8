"""From the pieces of a config and the state of a checkpoint to a trainer that goes on from there."""

from __future__ import annotations

import platform
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import dist_train
from dist_train.checkpoint.store import find_at
from dist_train.engine.build import (
    Blueprint,
    Preparer,
    build_loaders,
    build_reducer,
    build_training,
    schedule_horizon,
)
from dist_train.engine.evaluate import Evaluator
from dist_train.engine.resume import Decision, check_fits, find_checkpoint, load_model, load_training
from dist_train.engine.step import Stepper
from dist_train.engine.stopping import StopWhen
from dist_train.engine.trace import Trace
from dist_train.engine.trainer import Parts, Progress, Trainer
from dist_train.runtime.control import SAVE, STOP, Control, watch_file
from dist_train.runtime.world import World
from dist_train.tracking.logger import Logger, open_logger

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.config.schema import Config
    from dist_train.data.loader import EvalLoader, TrainLoader
    from dist_train.engine.ema import EMA
    from dist_train.engine.optim import Schedule
    from dist_train.engine.rundir import RunDir
    from dist_train.tracking.console import Console


@dataclass
class Pieces:
    """Everything that a config alone decides; building it shows whatever is wrong with the config, and writes nothing."""

    blueprint: Blueprint
    preparer: Preparer
    train_loader: TrainLoader
    eval_loaders: dict[str, EvalLoader]
    horizon: int | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule | None
    ema: EMA | None


def build_pieces(blueprint: Blueprint) -> Pieces:
    """The pieces of a fresh run.

    Raises:
        ConfigError: one of them can't be built.
    """
    preparer = Preparer(blueprint)
    loaders = build_loaders(blueprint, preparer.neighbours)
    horizon = schedule_horizon(blueprint)
    optimizer, schedule, ema = build_training(blueprint, horizon)
    return Pieces(blueprint, preparer, *loaders, horizon, optimizer, schedule, ema)


def assemble(
    pieces: Pieces,
    run: RunDir,
    console: Console,
    checkpoints: CheckpointManager,
    decision: Decision,
    attempt: int,
) -> Trainer:
    """The trainer, with the state of the newest checkpoint put into it where there is one to go on from."""
    blueprint = pieces.blueprint
    config, world = blueprint.config, blueprint.world
    progress, state = _restore(pieces, console, checkpoints, decision)
    control = Control(world.rank, world.size, world.clone_store(), _file_sources(run, world))
    logger = Logger()
    if world.is_main:
        pending = ("val", "test") if progress.evaluation_due else ("test",)
        logger = open_logger(run.root, config, console, start_step=progress.step, pending=pending)
    parts = Parts(
        config=config,
        world=world,
        run=run,
        console=console,
        logger=logger,
        control=control,
        plan=blueprint.plan,
        model=blueprint.model,
        optimizer=pieces.optimizer,
        stepper=_stepper(pieces),
        evaluator=_evaluator(pieces, control),
        train_loader=pieces.train_loader,
        eval_loaders=pieces.eval_loaders,
        checkpoints=checkpoints if world.is_main else None,
        schedule=pieces.schedule,
        ema=pieces.ema,
        stop_when=StopWhen(config.trainer.stop_when, blueprint.steps_per_epoch) if config.trainer.stop_when else None,
        trace=Trace(run.path("trace"), attempt, world.rank) if config.debug.trace_samples else None,
        callbacks=blueprint.callbacks,
        keep_best=blueprint.keep_best,
        once_trained=[lambda: _tell_inexact(blueprint, console)],
        record={"horizon": pieces.horizon, **_provenance(config)},
    )
    trainer = Trainer(parts, progress)
    if state is not None:
        trainer.load(state)
    return trainer


def _restore(
    pieces: Pieces, console: Console, checkpoints: CheckpointManager, decision: Decision
) -> tuple[Progress, dict[str, Any] | None]:
    """Put the checkpoint that rank 0 proposes into the pieces, the same one on all ranks."""
    if decision.action != "resume":
        return Progress(), None
    blueprint = pieces.blueprint
    found = find_at(blueprint.world.on_main(lambda: find_checkpoint(decision, checkpoints).location))
    check_fits(found, blueprint)
    load_model(found, blueprint)
    if pieces.horizon != found.meta["horizon"]:  # the schedule keeps the one that the run was begun with
        pieces.horizon = found.meta["horizon"]
        pieces.optimizer, pieces.schedule, pieces.ema = build_training(blueprint, pieces.horizon)
    state, progress, notes = load_training(
        found, pieces.optimizer, pieces.schedule, pieces.ema, decision.changed, blueprint.steps_per_epoch
    )
    for note in notes:
        console.note(note)
    if any(line.startswith(("trainer.duration", "trainer.stop_when")) for line in decision.changes):
        progress.finished = None  # a run that had reached its end goes on where another end is asked for now
    return progress, state


def _stepper(pieces: Pieces) -> Stepper:
    blueprint = pieces.blueprint
    scaler = blueprint.precision.scaler()
    trainer = blueprint.config.trainer
    return Stepper(
        blueprint.model,
        pieces.optimizer,
        build_reducer(blueprint, scaler),
        scaler=scaler,
        device=blueprint.world.device,
        seed=blueprint.config.seed,
        summed=getattr(blueprint.task, "summed", False),
        prepare=pieces.preparer.train,
        clip_norm=trainer.clip_grad_norm,
        clip_value=trainer.clip_grad_value,
        skip=trainer.on_nonfinite == "skip",
        indices_of=blueprint.plan.batch,
    )


def _evaluator(pieces: Pieces, control: Control) -> Evaluator:
    blueprint = pieces.blueprint
    return Evaluator(
        blueprint.model,
        blueprint.task,
        blueprint.metrics,
        world=blueprint.world,
        precision=blueprint.precision,
        prepare=pieces.preparer.move,
        seed=blueprint.config.seed,
        ema=pieces.ema,
        control=control,
    )


def _tell_inexact(blueprint: Blueprint, console: Console) -> None:
    """A loss whose denominator isn't known makes the mean of means out of several micro-batches."""
    parts = -(-blueprint.plan.global_batch_size // blueprint.micro_batch_size)
    if blueprint.loss is not None and blueprint.loss.exact is False and parts > 1:
        console.warn(
            f"the loss {blueprint.loss.name} returns one number, taken for a mean over samples: over {parts} micro-batches a "
            "step the gradient is exact only if it is one. Return (sum, weight), or one value a sample, to be sure"
        )


def _file_sources(run: RunDir, world: World) -> list[Any]:
    if not world.is_main:
        return []
    take = run.wishes()
    return [watch_file(take, STOP, "STOP"), watch_file(take, SAVE, "SAVE")]


def _provenance(config: Config) -> dict[str, Any]:
    """What a checkpoint was made with."""
    versions = {"dist_train": dist_train.__version__, "torch": torch.__version__, "python": platform.python_version()}
    facts: dict[str, Any] = {"config": config.to_dict(), "versions": versions, "host": socket.gethostname()}
    for folder in config.run.code_paths[:1]:
        try:
            commit = subprocess.run(
                ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
            )
            facts["commit"] = commit.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # not a repository, or no git
    return facts
