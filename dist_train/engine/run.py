"""A whole run: find out what there is to do, build, train, finish, and leave a record of how it ended."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.config.errors import ConfigError
from dist_train.data.plan import share
from dist_train.engine.finish import finish
from dist_train.engine.parts import Parts
from dist_train.engine.resume import Decision, decide, find_checkpoint
from dist_train.engine.rundir import RunDir, check_shared, run_location
from dist_train.engine.showing import report_at_end
from dist_train.engine.state import Progress, restore
from dist_train.engine.summary import end_lines, start_lines
from dist_train.engine.trainer import Trainer
from dist_train.runtime import failure, signals
from dist_train.runtime.lease import Lease, LeaseHeldError, LeaseLostError
from dist_train.runtime.peers import Peers
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
    try:
        with open_world(config.distributed, read_placement(os.environ)) as world:
            return train_in(world, config, Console(world.is_main))
    finally:
        if not Peers.may_exit:
            signals.restore()  # in somebody else's process Ctrl-C is theirs again


def train_in(world: World, config: Config, console: Console) -> dict[str, Any]:
    """The same among processes that have met already; closes the console."""
    try:
        run = RunDir(world.on_main(lambda: run_location(config)))
        decision = Decision(**world.on_main(lambda: vars(decide(config, run))))
        if decision.action == "completed":
            return _already_completed(world, run, console)
        known = world.on_main(lambda: run.read_json(MICRO_BATCHES)) or {}
        parts = Parts(config, world, fresh=decision.action == "fresh", fits=known.get("micro_batch_size"))
        parts.build()  # whatever is wrong with the config has shown by now: from here on things are written
        check_shared(run, world)
        return Start(parts, run, console).train()
    finally:
        console.close()


def _already_completed(world: World, run: RunDir, console: Console) -> dict[str, Any]:
    result = run.read_json("result.json")
    assert result is not None
    for figures in result["metrics"].values():
        figures.update({name: math.nan for name, value in figures.items() if value is None})
    if world.is_main and (run.read_json("status.json") or {}).get("state") != "completed":
        # Killed between its result and its status.
        run.write_status("completed", step=result["step"], epoch=result["epoch"], world_size=result["world_size"])
    console.note(
        f"{run.location} is completed; a longer trainer.duration goes on with it, another run.name begins anew"
    )
    console.end_block(end_lines(result, run))
    return result


class Start:
    """One start of a run: it owns the run while it trains, and leaves word of its beginning and its end."""

    def __init__(self, parts: Parts, run: RunDir, console: Console):
        self.parts, self.run, self.console = parts, run, console
        self.config, self.world = parts.config, parts.world
        self.lease: Lease | None = None  # rank 0's
        self.trainer: Trainer | None = None
        self.attempt = 0
        self.decision = Decision()

    def _own(self) -> tuple[int, dict[str, Any]]:
        """The first writes: rank 0 takes the lease, looks again at what there is, and claims this start's number."""
        storage = self.run.storage
        storage.makedirs()
        try:
            self.lease = Lease.acquire(storage, log=self.console.note)
        except LeaseHeldError as error:
            raise ConfigError.single("run.name", str(error)) from None
        if isinstance(storage, LocalStorage):
            storage.sweep_temporaries()
        decision = decide(self.config, self.run)  # the owner before may have gone on until now
        attempt = self.run.claim_attempt()
        storage.write_atomic("config.yaml", self.config.to_yaml().encode())
        return attempt, vars(decision)

    def train(self) -> dict[str, Any]:
        """From the checkpoint that there is, if any, to the end of this start.

        Raises:
            ConfigError: another job trains this run.
        """
        peers = self.world.peers
        try:
            self.attempt, decision = self.world.on_main(self._own)
            self.decision = Decision(**decision)
            self.run.begin(self.world)
            setup_logging(self.run.path(f"logs/rank-{self.world.rank}.log"), self.world.rank)
            peers.parting, peers.closing = self._part, self._record_failure
            self._inform_peers()
            return self._train()
        except BaseException as error:
            if isinstance(error.__cause__ or error, LeaseLostError):
                peers.closing = None  # the records are another's by now
            peers.raised(error)  # with several processes this one ends here
            if peers.closing is not None and self.world.is_main:
                peers.closing(getattr(error, "dist_train_record", None) or failure.describe(error))
            raise
        finally:
            if self.trainer is not None:
                self.trainer.close()
            self.run.close()
            if self.lease is not None:
                self.lease.release()

    def _train(self) -> dict[str, Any]:
        began = time.monotonic()
        config, world, run, console = self.config, self.world, self.run, self.console
        if world.is_main:
            self._tell_unfinished()
        checkpoints = CheckpointManager(
            run.storage.sub("checkpoints"),
            keep_last=config.checkpoint.keep_last,
            keep_best=self.parts.keep_best,
            asynchronous=config.checkpoint.asynchronous,
            log=console.note,
            lease=self.lease,
            on_error=config.checkpoint.on_error,
            before_publish=lambda step: trainer.bring_home(),
        )
        progress = Progress()
        if self.decision.action == "resume":
            found = find_checkpoint(world, self.decision, checkpoints)
            progress = restore(self.parts, found, self.decision.changed, console.note)
        self.trainer = trainer = Trainer(self.parts, run, console, checkpoints, progress, self.attempt)
        for line in self.decision.changes:
            console.note(f"changed since the last start: {line}")
        console.start_block(start_lines(self.parts, trainer, run, trainer.step))
        if world.is_main:
            trainer.write_status("running")
            self._record_start()
        world.barrier()  # whoever fails from here on finds the start recorded
        outcome = trainer.fit()
        if outcome == "completed":
            result = finish(trainer, checkpoints)
        else:
            result = {"state": outcome, "reason": trainer.reason, "step": trainer.step, "epoch": trainer.epoch}
        trainer.logger.close(outcome)
        run.upload()
        if world.is_main:
            trainer.write_status(outcome)
            run.record_attempt("end", attempt=self.attempt, state=outcome, step=trainer.step, cause=trainer.reason)
        if outcome == "completed" and config.tracking.report:
            report_at_end(trainer)  # of what stands by now in the records; it raises nothing
            run.upload()
        console.end_block(end_lines(result, run, time.monotonic() - began))
        return result

    def _record_start(self) -> None:
        assert self.trainer is not None
        placement = self.world.placement
        self.run.record_attempt(
            "start",
            attempt=self.attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            world_size=self.world.size,
            nodes=-(-self.world.size // placement.local_size),
            launcher=placement.launcher,
            resumed_from=self.trainer.step,
        )

    def _inform_peers(self) -> None:
        """What the summary of a failure needs to know of this run."""
        parts, world, peers = self.parts, self.world, self.world.peers

        def samples(step: int, rank: int) -> Sequence[int]:
            indices = parts.plan.batch(step - 1)
            return indices[share(len(indices), rank, world.size)].tolist()

        peers.samples, peers.micro_batch_size = samples, parts.micro_batch_size
        peers.logs = str(self.run.path("logs"))
        peers.may_halve = self.config.trainer.micro_batch_size == "auto"
        peers.changes = parts.what_splitting_changes
        if peers.may_exit:  # a crash inside C code leaves its Python stack in the log
            faulthandler.enable(open(self.run.path(f"logs/rank-{world.rank}.log"), "a"))  # noqa: SIM115

    def _tell_unfinished(self) -> None:
        """A process that was killed alone could not say so: its start has no end in attempts.jsonl."""
        if not self.attempt or not self.run.storage.exists("attempts.jsonl"):
            return
        lines = self.run.storage.read_bytes("attempts.jsonl").splitlines()
        last = next((json.loads(line) for line in reversed(lines) if line.endswith(b"}")), {"event": "end"})
        if last["event"] == "start":
            status = self.run.read_json("status.json") or {"step": 0}
            self.console.warn(
                f"attempt {last['attempt']} on {last['host']} (pid {last['pid']}) ended without a word, after step "
                f"{status['step']}: it was killed, or its host went down. Look for the kernel's out-of-memory killer (dmesg "
                "-T | grep -i kill) and the scheduler's limits"
            )

    def _part(self) -> None:
        """What a rank that leaves in the middle owes to others: the run for the next start, and the terminal."""
        if self.lease is not None:
            self.lease.release()
        self.console.close()

    def _record_failure(self, record: failure.Record) -> None:
        """Leave word of a failure, as far as disk and store let one: what they say now must not hide the failure itself."""
        run, trainer = self.run, self.trainer
        run.hurry()
        cause = failure.cause(record)

        def tell() -> None:
            if run.storage.exists(f"trace/.attempts/{self.attempt + 1}"):
                return  # cut off for a while, and succeeded by a start whose records these are by now
            stand = run.read_json("status.json") or {"step": 0, "epoch": 0}
            step, epoch = (stand["step"], stand["epoch"]) if trainer is None else (trainer.step, trainer.epoch)
            run.write_status("failed", step=step, epoch=epoch, world_size=self.world.size, error=cause)
            run.record_attempt("end", attempt=self.attempt, state="failed", step=step, cause=cause)
            if "halved" in record:
                run.write_json(MICRO_BATCHES, {"micro_batch_size": record["halved"], "because": cause})

        def close() -> None:
            if trainer is not None:
                trainer.logger.close("failed", timeout=15.0 if self.world.size == 1 else 2.0)

        for leave_word in (tell, close, run.upload):
            try:
                leave_word()
            except (StorageError, OSError) as error:
                logging.getLogger("dist_train").warning("%s", error)
