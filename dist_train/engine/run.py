"""A whole run: find out what there is to do, build, train, finish, and leave a record of how it ended."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.config.errors import ConfigError
from dist_train.engine.assemble import assemble, build_pieces
from dist_train.engine.build import draw_blueprint
from dist_train.engine.finish import finish
from dist_train.engine.resume import Decision, decide
from dist_train.engine.rundir import RunDir, check_shared, run_location
from dist_train.engine.summary import end_lines, start_lines
from dist_train.engine.trainer import Trainer
from dist_train.runtime.lease import Lease, LeaseHeldError
from dist_train.runtime.world import World, open_world, read_placement
from dist_train.tracking.console import Console, setup_logging

if TYPE_CHECKING:
    from dist_train.config.schema import Config


def train_config(config: Config) -> dict[str, Any]:
    """Train, or go on with the run of that name; returns what result.json holds (or the same of a run that was stopped).

    Raises:
        ConfigError: the config can't be run; nothing was written.
    """
    with open_world(config.distributed, read_placement(os.environ)) as world:
        run = RunDir(world.on_main(lambda: run_location(config)))
        decision = Decision(**world.on_main(lambda: vars(decide(config, run))))
        console = Console(world.is_main)
        try:
            if decision.action == "completed":
                return _already_completed(run, console)
            return _train(config, world, run, console, decision)
        finally:
            console.close()


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
    blueprint = draw_blueprint(config, world, fresh=decision.action == "fresh")
    pieces = build_pieces(
        blueprint
    )  # whatever is wrong with the config has shown by now: from here on things are written
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
        trainer = assemble(pieces, run, console, checkpoints, decision, attempt)
        resumed = trainer.step
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

    attempt, decision = world.on_main(open_run)
    return lease, attempt, Decision(**decision)


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
