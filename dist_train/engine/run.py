"""A whole run: find out what there is to do, build, train, finish, and leave a record of how it ended."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import torch

import dist_train
from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.store import find_at
from dist_train.config.errors import ConfigError
from dist_train.engine.build import (
    Blueprint,
    Preparer,
    build_loaders,
    build_reducer,
    build_training,
    draw_blueprint,
    schedule_horizon,
)
from dist_train.engine.evaluate import Evaluator
from dist_train.engine.finish import finish
from dist_train.engine.resume import Decision, check_fits, decide, find_checkpoint, load_model, load_training
from dist_train.engine.rundir import RunDir, check_shared, run_location
from dist_train.engine.step import Stepper
from dist_train.engine.stopping import StopWhen
from dist_train.engine.summary import end_lines, start_lines
from dist_train.engine.trace import Trace
from dist_train.engine.trainer import Parts, Progress, Trainer
from dist_train.runtime.control import SAVE, STOP, Control, watch_file
from dist_train.runtime.lease import Lease, LeaseHeldError
from dist_train.runtime.world import World, open_world, read_placement
from dist_train.tracking.console import Console, setup_logging
from dist_train.tracking.logger import Logger, NullLogger

if TYPE_CHECKING:
    from dist_train.config.schema import Config


def train_config(config: Config) -> dict[str, Any]:
    """Train, or go on with the run of that name; returns what result.json holds (or the same of a run that was stopped).

    Raises:
        ConfigError: the config can't be run; nothing was written.
    """
    with open_world(config.distributed, read_placement(os.environ)) as world:
        run = RunDir(_on_main(world, lambda: run_location(config)))
        decision = Decision(**_on_main(world, lambda: vars(decide(config, run))))
        console = Console(world.is_main)
        try:
            if decision.action == "completed":
                return _already_completed(run, console)
            return _train(config, world, run, console, decision)
        finally:
            console.close()


def _on_main(world: World, action: Any) -> Any:
    """Rank 0's answer on all ranks; its ConfigError as well."""
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            answer = {"value": action()}
        except ConfigError as error:
            answer = {"problems": [vars(problem) for problem in error.problems]}
    answer = world.share(answer)
    if "problems" in answer:
        from dist_train.config.errors import Problem

        raise ConfigError([Problem(**problem) for problem in answer["problems"]])
    return answer["value"]


def _already_completed(run: RunDir, console: Console) -> dict[str, Any]:
    result = run.read_json("result.json")
    assert result is not None
    console.note(
        f"{run.location} is completed; a longer trainer.duration goes on with it, another run.name begins anew"
    )
    console.end_block(end_lines(result, run))
    return result


def _train(config: Config, world: World, run: RunDir, console: Console, decision: Decision) -> dict[str, Any]:
    began = time.monotonic()
    blueprint = draw_blueprint(config, world)
    check_shared(run, world)
    lease, attempt, decision = _open_run(config, world, run, console)
    setup_logging(run.path(f"logs/rank-{world.rank}.log"), world.rank)
    trainer: Trainer | None = None
    try:
        checkpoints = CheckpointManager(
            run.storage.sub("checkpoints"),
            keep_last=config.checkpoint.keep_last,
            keep_best=blueprint.keep_best,
            asynchronous=config.checkpoint.asynchronous,
            log=console.note,
            lease=lease,
            before_publish=lambda step: trainer.parts.logger.flush() if trainer is not None else None,
        )
        trainer, resumed = _build_trainer(blueprint, run, console, checkpoints, decision, attempt)
        for line in decision.changes:
            console.note(f"changed since the last start: {line}")
        console.start_block(start_lines(blueprint, trainer, run, resumed))
        if world.is_main:
            trainer.write_status("running")
            run.record_attempt("start", **_attempt_facts(world, attempt, resumed))
        outcome = trainer.fit()
        if outcome == "completed":
            result = finish(trainer, checkpoints, trainer.progress.seconds)
        else:
            result = {"state": outcome, "reason": trainer.reason, "step": trainer.step, "epoch": trainer.epoch}
        _record_end(trainer, world, run, attempt, outcome, None)
        trainer.parts.logger.close(outcome)
        console.end_block(end_lines(result, run, time.monotonic() - began))
        return result
    except BaseException as error:
        if trainer is not None:
            _record_end(trainer, world, run, attempt, "failed", f"{type(error).__name__}: {error}")
            trainer.parts.logger.close("failed")
        raise
    finally:
        if trainer is not None:
            trainer.close()
        if lease is not None:
            lease.release()


def _open_run(config: Config, world: World, run: RunDir, console: Console) -> tuple[Lease | None, int, Decision]:
    """The first writes of a start: rank 0 takes the lease, looks again at what there is, and claims this start's number.

    Raises:
        ConfigError: another job trains this run.
    """
    lease: Lease | None = None

    def open_run() -> tuple[int, dict[str, Any]]:
        nonlocal lease
        run.storage.makedirs()
        try:
            lease = Lease.acquire(run.storage, log=console.note)
        except LeaseHeldError as error:
            raise ConfigError.single("run.name", str(error)) from None
        decision = decide(config, run)  # the owner before may have gone on until now
        attempt = run.claim_attempt()
        run.storage.write_atomic("config.yaml", config.to_yaml().encode())
        return attempt, vars(decision)

    attempt, decision = _on_main(world, open_run)
    return lease, attempt, Decision(**decision)


def _build_trainer(
    blueprint: Blueprint,
    run: RunDir,
    console: Console,
    checkpoints: CheckpointManager,
    decision: Decision,
    attempt: int,
) -> tuple[Trainer, int]:
    """Everything built, and the state of the newest checkpoint put into it; (the trainer, the step it goes on from)."""
    config, world = blueprint.config, blueprint.world
    found = None
    if decision.action == "resume":
        found = find_at(_on_main(world, lambda: find_checkpoint(decision, checkpoints).location))
        check_fits(found, blueprint)
        load_model(found, blueprint)
    horizon = found.meta["horizon"] if found is not None else schedule_horizon(blueprint)
    optimizer, schedule, ema = build_training(blueprint, horizon)
    progress, state = Progress(), None
    notes: list[str] = []
    if found is not None:
        state, progress, notes = load_training(
            found, optimizer, schedule, ema, decision.changed, blueprint.steps_per_epoch
        )
    for note in notes:
        console.note(note)
    scaler = blueprint.precision.scaler()
    preparer = Preparer(blueprint)
    control = Control(world.rank, world.size, world.clone_store(), _file_sources(run, world))
    stepper = Stepper(
        blueprint.model,
        optimizer,
        build_reducer(blueprint, scaler),
        scaler=scaler,
        device=world.device,
        seed=config.seed,
        summed=getattr(blueprint.task, "summed", False),
        prepare=preparer.train,
        clip_norm=config.trainer.clip_grad_norm,
        clip_value=config.trainer.clip_grad_value,
        on_nonfinite=config.trainer.on_nonfinite,
    )
    evaluator = Evaluator(
        blueprint.model,
        blueprint.task,
        blueprint.metrics,
        world=world,
        precision=blueprint.precision,
        prepare=preparer.move,
        seed=config.seed,
        ema=ema,
        control=control,
    )
    train_loader, eval_loaders = build_loaders(blueprint, preparer.neighbours)
    pending = ("val", "test") if progress.evaluation_due else ("test",)
    logger = (
        Logger(run, config, console=console, start_step=progress.step, attempt=attempt, pending=pending)
        if world.is_main
        else NullLogger()
    )
    parts = Parts(
        config, world, run, console, logger, control, blueprint.plan, blueprint.model, optimizer, stepper, evaluator,
        train_loader, eval_loaders, checkpoints if world.is_main else None, schedule, ema,
        StopWhen(config.trainer.stop_when, blueprint.steps_per_epoch) if config.trainer.stop_when is not None else None,
        Trace(run.path("trace"), attempt, world.rank) if config.debug.trace_samples else None,
        blueprint.callbacks, blueprint.keep_best, [lambda: _tell_inexact(blueprint, console)],
        {"horizon": horizon, **_provenance(config)},
    )  # fmt: skip
    trainer = Trainer(parts, _reopened(progress, decision))
    if state is not None:
        trainer.load(state)
    return trainer, progress.step


def _tell_inexact(blueprint: Blueprint, console: Console) -> None:
    """A loss whose denominator isn't known makes the mean of means out of several micro-batches."""
    parts = -(-blueprint.plan.global_batch_size // blueprint.micro_batch_size)
    if blueprint.loss is not None and blueprint.loss.exact is False and parts > 1:
        console.warn(
            f"the loss {blueprint.loss.name} returns one number, taken for a mean over samples: over {parts} micro-batches a "
            "step the gradient is exact only if it is one. Return (sum, weight), or one value a sample, to be sure"
        )


def _reopened(progress: Progress, decision: Decision) -> Progress:
    """A run that had reached its end goes on where another end is asked for now."""
    if any(line.startswith(("trainer.duration", "trainer.stop_when")) for line in decision.changes):
        progress.finished = None
    return progress


def _file_sources(run: RunDir, world: World) -> list[Any]:
    if not world.is_main:
        return []
    paths = {name: run.path(name) for name in ("STOP", "SAVE")}
    return [
        watch_file(paths["STOP"].exists, lambda: paths["STOP"].unlink(missing_ok=True), STOP, "STOP"),
        watch_file(paths["SAVE"].exists, lambda: paths["SAVE"].unlink(missing_ok=True), SAVE, "SAVE"),
    ]


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


def _attempt_facts(world: World, attempt: int, resumed: int) -> dict[str, Any]:
    placement = world.placement
    return {
        "attempt": attempt,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": world.size,
        "nodes": -(-world.size // placement.local_size),
        "launcher": placement.launcher,
        "resumed_from": resumed,
    }


def _record_end(trainer: Trainer, world: World, run: RunDir, attempt: int, outcome: str, error: str | None) -> None:
    if not world.is_main:
        return
    trainer.write_status(outcome, error)
    run.record_attempt("end", attempt=attempt, state=outcome, step=trainer.step, cause=error or trainer.reason)
