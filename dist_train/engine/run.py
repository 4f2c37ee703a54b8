"""A whole run: find out what there is to do, build, train, finish, and leave a record of how it ended."""

from __future__ import annotations

import faulthandler
import functools
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.config.errors import ConfigError
from dist_train.data.plan import share
from dist_train.engine.assemble import assemble, build_pieces
from dist_train.engine.build import Blueprint, draw_blueprint, what_splitting_changes
from dist_train.engine.finish import finish
from dist_train.engine.resume import Decision, decide
from dist_train.engine.rundir import RunDir, check_shared, run_location
from dist_train.engine.showing import report_at_end
from dist_train.engine.summary import end_lines, start_lines
from dist_train.engine.trainer import Trainer
from dist_train.runtime import failure
from dist_train.runtime.lease import Lease, LeaseHeldError, LeaseLostError
from dist_train.runtime.storage import LocalStorage, StorageError
from dist_train.runtime.world import World, open_world, read_placement
from dist_train.tracking.console import Console, setup_logging

if TYPE_CHECKING:
    from dist_train.config.schema import Config

MICRO_BATCHES = "micro_batches.json"  # what fits, once memory has run out


def train_config(config: Config) -> dict[str, Any]:
    """Train, or go on with the run of that name; returns what result.json holds (or the same of a run that was stopped).

    Raises:
        ConfigError: the config can't be run; nothing was written.
    """
    with open_world(config.distributed, read_placement(os.environ)) as world:
        return train_in(world, config, Console(world.is_main))


def train_in(world: World, config: Config, console: Console) -> dict[str, Any]:
    """The same among processes that have met already; closes the console."""
    try:
        run = RunDir(world.on_main(lambda: run_location(config)))
        decision = Decision(**world.on_main(lambda: vars(decide(config, run))))
        if decision.action == "completed":
            return _already_completed(world, run, console)
        return _train(config, world, run, console, decision)
    finally:
        console.close()


def _already_completed(world: World, run: RunDir, console: Console) -> dict[str, Any]:
    result = run.read_json("result.json")
    assert result is not None
    if world.is_main and (run.read_json("status.json") or {}).get("state") != "completed":
        # Killed between its result and its status.
        run.write_status("completed", step=result["step"], epoch=result["epoch"], world_size=result["world_size"])
    console.note(
        f"{run.location} is completed; a longer trainer.duration goes on with it, another run.name begins anew"
    )
    console.end_block(end_lines(result, run))
    return result


def _train(config: Config, world: World, run: RunDir, console: Console, decision: Decision) -> dict[str, Any]:
    began = time.monotonic()
    known = world.on_main(lambda: run.read_json(MICRO_BATCHES)) or {}
    blueprint = draw_blueprint(config, world, fresh=decision.action == "fresh", fits=known.get("micro_batch_size"))
    pieces = build_pieces(
        blueprint
    )  # whatever is wrong with the config has shown by now: from here on things are written
    check_shared(run, world)
    lease, attempt, decision = _open_run(config, world, run, console)
    trainer: Trainer | None = None
    try:
        run.begin(world)
        setup_logging(run.path(f"logs/rank-{world.rank}.log"), world.rank)
        world.peers.parting = functools.partial(_part, lease, console)
        world.peers.closing = lambda record: _record_failure(trainer, world, run, attempt, record)
        _inform_peers(world, run, blueprint)
        if world.is_main:
            _tell_unfinished(run, attempt, console)
        checkpoints = CheckpointManager(
            run.storage.sub("checkpoints"),
            keep_last=config.checkpoint.keep_last,
            keep_best=blueprint.keep_best,
            asynchronous=config.checkpoint.asynchronous,
            log=console.note,
            lease=lease,
            on_error=config.checkpoint.on_error,
            before_publish=lambda step: trainer.bring_home() if trainer is not None else None,
        )
        trainer = assemble(pieces, run, console, checkpoints, decision, attempt)
        resumed = trainer.step
        for line in decision.changes:
            console.note(f"changed since the last start: {line}")
        console.start_block(start_lines(blueprint, trainer, run, resumed))
        if world.is_main:
            trainer.write_status("running")
            run.record_attempt("start", **_attempt_facts(world, attempt, resumed))
        world.barrier()  # whoever fails from here on finds the start recorded
        outcome = trainer.fit()
        if outcome == "completed":
            result = finish(trainer, checkpoints, trainer.progress.seconds)
        else:
            result = {"state": outcome, "reason": trainer.reason, "step": trainer.step, "epoch": trainer.epoch}
        trainer.parts.logger.close(outcome)
        run.upload()
        _record_end(trainer, world, run, attempt, outcome, trainer.reason)
        if outcome == "completed" and config.tracking.report:
            report_at_end(trainer)  # of what stands by now in the records; it raises nothing
            run.upload()
        console.end_block(end_lines(result, run, time.monotonic() - began))
        return result
    except BaseException as error:
        if isinstance(error.__cause__ or error, LeaseLostError):
            world.peers.closing = None  # the records are another's by now
        world.peers.raised(error)  # with several processes this one ends here
        if world.peers.closing is not None and world.is_main:
            world.peers.closing(getattr(error, "dist_train_record", None) or failure.describe(error))
        raise
    finally:
        if trainer is not None:
            trainer.close()
        run.close()
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
        if isinstance(run.storage, LocalStorage):
            run.storage.sweep_temporaries()
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


def _inform_peers(world: World, run: RunDir, blueprint: Blueprint) -> None:
    """What the summary of a failure needs to know of this run."""
    plan, peers = blueprint.plan, world.peers

    def samples(step: int, rank: int) -> Sequence[int]:
        indices = plan.batch(step - 1)
        return indices[share(len(indices), rank, world.size)].tolist()

    peers.samples, peers.micro_batch_size = samples, blueprint.micro_batch_size
    peers.logs = str(run.path("logs"))
    peers.may_halve = blueprint.config.trainer.micro_batch_size == "auto"
    peers.changes = functools.partial(what_splitting_changes, blueprint)
    if peers.may_exit:  # a crash inside C code leaves its Python stack in the log
        faulthandler.enable(open(run.path(f"logs/rank-{world.rank}.log"), "a"))  # noqa: SIM115


def _tell_unfinished(run: RunDir, attempt: int, console: Console) -> None:
    """A process that was killed alone could not say so: its start has no end in attempts.jsonl."""
    if not attempt or not run.storage.exists("attempts.jsonl"):
        return
    events = [json.loads(line) for line in run.storage.read_bytes("attempts.jsonl").splitlines() if line.endswith(b"}")]
    if events and events[-1]["event"] == "start":
        last, status = events[-1], run.read_json("status.json") or {"step": 0}
        console.warn(
            f"attempt {last['attempt']} on {last['host']} (pid {last['pid']}) ended without a word, after step "
            f"{status['step']}: it was killed, or its host went down. Look for the kernel's out-of-memory killer (dmesg -T | "
            "grep -i kill) and the scheduler's limits"
        )


def _part(lease: Lease | None, console: Console) -> None:
    """What a rank that leaves in the middle owes to others: the run for the next start, and the terminal."""
    if lease is not None:
        lease.release()
    console.close()


def _record_end(trainer: Trainer, world: World, run: RunDir, attempt: int, outcome: str, cause: str) -> None:
    if world.is_main:
        trainer.write_status(outcome)
        run.record_attempt("end", attempt=attempt, state=outcome, step=trainer.step, cause=cause)


def _record_failure(trainer: Trainer | None, world: World, run: RunDir, attempt: int, record: failure.Record) -> None:
    """Leave word of a failure, as far as disk and store let one: what they say now must not hide the failure itself."""
    run.hurry()
    cause = failure.cause(record)

    def tell() -> None:
        status = run.read_json("status.json") or {"step": 0, "epoch": 0}
        step, epoch = (trainer.step, trainer.epoch) if trainer is not None else (status["step"], status["epoch"])
        run.write_status("failed", step=step, epoch=epoch, world_size=world.size, error=cause)
        run.record_attempt("end", attempt=attempt, state="failed", step=step, cause=cause)
        if "halved" in record:
            run.write_json(MICRO_BATCHES, {"micro_batch_size": record["halved"], "because": cause})

    def close() -> None:
        if trainer is not None:
            trainer.parts.logger.close("failed", timeout=15.0 if world.size == 1 else 2.0)

    for leave_word in (tell, close, run.upload):
        try:
            leave_word()
        except (StorageError, OSError) as error:
            logging.getLogger("dist_train").warning("%s", error)
