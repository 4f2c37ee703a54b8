"""A whole run: find out what there is to do, build, train, finish, and leave a record of how it ended."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dist_train.checkpoint.manager import CheckpointManager, SavePolicy
from dist_train.config.code import source_files
from dist_train.config.errors import ConfigError
from dist_train.config.slots import check_components
from dist_train.data.plan import share
from dist_train.files import StorageError
from dist_train.run.decide import Decision, decide, find_checkpoint
from dist_train.run.finish import finish, give_weights
from dist_train.run.objects import facts_of, sample_digests
from dist_train.run.report import report_at_end, report_in
from dist_train.run.summary import end_lines, run_facts, start_lines
from dist_train.runtime.launch import read_placement
from dist_train.runtime.lease import Lease, LeaseHeldError, LeaseLostError, look_at_owner
from dist_train.runtime.rundir import MICRO_BATCHES, RunDir, check_place, check_shared, run_location
from dist_train.runtime.sidefiles import read_lines
from dist_train.runtime.storage import LocalStorage
from dist_train.runtime.world import World, open_world
from dist_train.tracking.console import Console, setup_logging
from dist_train.training import parts as building
from dist_train.training.model import splitting_changes
from dist_train.training.parts import Parts
from dist_train.training.rows import Outputs, Trace
from dist_train.training.state import Progress, restore
from dist_train.training.trainer import Trainer
from dist_train.views.boundary import BoundaryFrames
from dist_train.views.model import write_curves
from dist_train.views.network import Pictures, image_modules
from dist_train.views.sinks import open_logger
from dist_train.watch import failure, signals
from dist_train.watch.leave import RunFacts
from dist_train.watch.processes import is_owned

if TYPE_CHECKING:
    from dist_train.config.schema import Config


def train_config(config: Config) -> dict[str, Any]:
    """Train, or go on with the run of that name; returns what result.json holds (or the same of a run that was stopped).

    Raises:
        ConfigError: the config can't be run; nothing was written.
    """
    try:
        with open_world(config.distributed, read_placement(os.environ)) as world:
            return train_in(world, config, Console(world.is_main))
    finally:
        if not is_owned():
            signals.restore()  # in somebody else's process Ctrl-C is theirs again


@torch.inference_mode(mode=False)
@torch.enable_grad()  # whatever the caller has switched off
def train_in(
    world: World, config: Config, console: Console, built: Callable[[Parts], object] | None = None
) -> dict[str, Any]:
    """The same among processes that have met already; closes the console. `built` gets the parts before they are trained."""
    try:
        run = RunDir(world.on_main(lambda: run_location(config)))
        decision = Decision(**world.on_main(lambda: _look(config, run)))
        if decision.action == "completed":
            return _already_completed(world, config, run, console, decision)
        if problems := check_components(config):  # `train` has left that out for a run that seemed to be completed
            raise ConfigError(problems)
        parts = build_parts(config, world, decision)  # whatever is wrong with the config has shown by now
        if decision.is_over(config, parts.plan.steps_per_epoch):
            return _already_completed(world, config, run, console, decision)
        for line in decision.warnings if world.is_main else ():
            console.warn(line)
        if built is not None:
            built(parts)
        world.barrier()
        if not world.is_main:  # rank 0 may have to wait for another job's lease; it begins for all
            signals.hold()
        check_shared(run, world)  # from here on things are written
        return Start(parts, run, console, decision).train()
    finally:
        console.close()


def _look(config: Config, run: RunDir) -> dict[str, Any]:
    check_place(run.location)
    return vars(decide(config, run))


def build_parts(config: Config, world: World, decision: Decision) -> Parts:
    """The parts for a start as it was decided.

    Raises:
        ConfigError: one of them can't be built.
    """
    fresh = decision.action == "fresh"
    parts = building.build_parts(config, world, fresh=fresh, fits=decision.fits, horizon=decision.horizon)
    if config.tracking.tensorboard:
        image_modules(config.tracking, parts.model)  # what it names must be there
    return parts


def seems_completed(config: Config) -> bool:
    """Whether a start will only be answered, so that nothing of the user's need be imported; `train_in` decides."""
    if "{time}" in str(config.run.name):  # found by its job only, whose name rank 0 reads
        return False
    try:
        run = RunDir(run_location(config))
        return run.storage.exists("result.json") and decide(config, run).action == "completed"
    except (ConfigError, StorageError, OSError):
        return False  # to be told among all processes


def _already_completed(
    world: World, config: Config, run: RunDir, console: Console, decision: Decision
) -> dict[str, Any]:
    """The result of a run that this config asks no more of; nothing is trained and nothing written.

    But for what a kill has kept from being written: status.json and the report.
    """
    result = world.on_main(lambda: run.read_json("result.json"))
    for figures in result["metrics"].values():
        figures.update({name: math.nan for name, value in figures.items() if value is None})
    status = run.read_json("status.json") or {}
    if world.is_main and status.get("state") != "completed" and not look_at_owner(run.storage)[0]:
        # Killed between its result and its status.
        run.write_status("completed", step=result["step"], epoch=result["epoch"], world_size=result["world_size"])
    console.note(
        f"{run.location} is completed, after {result['step']:,} steps; a longer trainer.duration goes on with it, another "
        "run.name begins anew"
    )
    for line in decision.warnings:
        if world.is_main:
            console.warn(line)
    if config.tracking.report and not world.on_main(lambda: run.storage.exists("report.html")):
        report_in(world, run, config, console.warn)
    give_weights(config, run)
    console.end_block(end_lines(result, run))
    return result


class Start:
    """One start of a run: it owns the run while it trains, and leaves word of its beginning and its end."""

    def __init__(self, parts: Parts, run: RunDir, console: Console, decision: Decision):
        self.parts, self.run, self.console = parts, run, console
        self.config, self.world = parts.config, parts.world
        self.trainer: Trainer | None = None
        self.attempt = 0
        self.decision = decision
        self._attached = False  # whether a failure is this run's, to be recorded

    def _own(self) -> tuple[tuple[int, str], int, dict[str, Any]]:
        """The first writes: rank 0 takes the lease, looks again at what there is, and claims this start's number.

        The owner before may have gone on, and even ended, until now: what is decided under the lease counts.
        """
        storage = self.run.storage
        try:
            lease = self.run.own(self.console.note)
        except LeaseHeldError as error:
            raise ConfigError.single("run.name", str(error)) from None
        signals.hold()
        owner = lease.number, lease.nonce
        decision = decide(self.config, self.run)
        if decision.is_over(self.config, self.parts.plan.steps_per_epoch):
            decision.action = "completed"
        if decision.action == "completed":
            return owner, 0, vars(decision)
        if isinstance(storage, LocalStorage):
            storage.sweep_temporaries()
        attempt = self.run.claim_attempt()
        storage.write_atomic("config.yaml", self.config.to_yaml().encode())
        return owner, attempt, vars(decision)

    def train(self) -> dict[str, Any]:
        """From the checkpoint that there is, if any, to the end of this start.

        Raises:
            ConfigError: another job trains this run.
            LeaseLostError: the run has got another owner, or was deleted: nothing more was written.
        """
        peers = self.world.peers
        try:
            owner, self.attempt, told = self.world.on_main(self._own)
            self.run.lease = self.run.lease or Lease.known(self.run.storage, *owner)
            decided, self.decision = self.decision, Decision(**told)
            if self.decision.action == "completed":
                return _already_completed(self.world, self.config, self.run, self.console, self.decision)
            if (self.decision.action, self.decision.fits) != (decided.action, decided.fits):
                self.parts = build_parts(self.config, self.world, self.decision)
            self.run.begin(self.world)
            setup_logging(self.run.path(f"logs/rank-{self.world.rank}.log"), self.world.rank)
            peers.attach(self._facts())
            self._attached = True
            return self._train()
        except BaseException as raised:
            peers.leave_a_fork(raised)
            error = self._lost() or raised  # what failed, failed for it
            record = peers.raised(error)  # with several processes this one ends here
            if self._attached and self.world.is_main:
                self._record_failure(record or failure.describe(error))
            if error is raised:
                raise
            raise error from raised
        finally:
            if self.trainer is not None:
                self.trainer.close()
            self.run.close()

    def _lost(self) -> LeaseLostError | None:
        """Why the run isn't this process's any more, if so."""
        self.run.hurry()
        try:
            self.run.assure_own()
        except LeaseLostError as error:
            return error
        except (StorageError, OSError):
            pass  # a store that is away: nobody knows
        return None

    def _train(self) -> dict[str, Any]:
        config, world, run, console = self.config, self.world, self.run, self.console
        if world.is_main:
            self._tell_unfinished()
        saving = config.checkpoint
        checkpoints = CheckpointManager(
            run.storage.sub("checkpoints"),
            SavePolicy(saving.keep_last, self.parts.keep_best, saving.asynchronous, saving.on_error),
            log=console.note,
            lease=run.lease,
        )
        progress, stepper_state = Progress(), None
        if self.decision.action == "resume":
            found = find_checkpoint(world, self.decision, checkpoints)
            if (horizon := found.value("horizon", int | None)) != self.decision.horizon:  # it isn't the newest one
                self.decision.horizon = horizon
                self.parts = build_parts(config, world, self.decision)
            progress, stepper_state = restore(self.parts, found, self.decision.changed, console.note)
        outputs = self._outputs(progress, checkpoints)
        self.trainer = trainer = Trainer(self.parts, progress, outputs, stepper_state)
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
            world.barrier()  # whoever has a live model reads the model.pt that rank 0 has written
        else:
            seconds = round(progress.seconds, 3)
            result = {"state": outcome, "reason": trainer.reason, "step": trainer.step, "epoch": trainer.epoch}
            result["seconds"] = seconds
        trainer.outputs.logger.close(outcome)
        run.upload()
        if world.is_main:
            trainer.write_status(outcome)
            told: dict[str, Any] = {
                "attempt": self.attempt,
                "state": outcome,
                "step": trainer.step,
                "cause": trainer.reason,
            }
            if outcome == "completed":
                told["samples"] = sample_digests(config)
            run.record_attempt("end", **told)
        if outcome != "completed" and config.tracking.report and world.is_main:
            write_curves(run)
        elif outcome == "completed" and config.tracking.report:
            report_at_end(trainer)  # of what stands by now in the records; it raises nothing
            run.upload()
        if outcome == "completed":
            give_weights(config, run)
        console.end_block(end_lines(result, run))
        return result

    def _outputs(self, progress: Progress, checkpoints: CheckpointManager) -> Outputs:
        """Where training writes: on rank 0 the records with their views, the checkpoints; on each rank its trace."""
        config, parts, run = self.config, self.parts, self.run
        outputs = Outputs(run, self.console, record=run_facts(config))
        if config.debug.trace_samples:
            outputs.trace = Trace(run.path("trace"), self.attempt, self.world.rank)
        if not self.world.is_main:
            return outputs
        pending = ("val", "test") if progress.evaluation_due else ("test",)
        outputs.checkpoints = checkpoints
        outputs.logger = open_logger(run.root, config, self.console, start_step=progress.step, pending=pending)
        if "val" in parts.eval_loaders:
            outputs.views.append(BoundaryFrames(run.root, parts.eval_loaders["val"].dataset, parts.evaluator))
        if config.tracking.tensorboard:
            pictures = Pictures(config.tracking, parts.evaluator, outputs.logger)
            outputs.views.append(pictures)
            outputs.watch_batch = pictures.on_batch
        return outputs

    def _record_start(self) -> None:
        assert self.trainer is not None
        placement = self.world.placement
        self.run.record_attempt(
            "start",
            attempt=self.attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            world_size=self.world.size,
            nodes=placement.nodes,
            launcher=placement.launcher,
            resumed_from=self.trainer.step,
            code=source_files(self.config),
            objects=facts_of(self.config),
        )

    def _facts(self) -> RunFacts:
        """What a failure's report needs of this run, and what the run does about it."""
        parts, world, logs = self.parts, self.world, self.run.path("logs")
        auto = self.config.trainer.micro_batch_size == "auto"

        def samples(step: int, rank: int) -> Sequence[int]:
            indices = parts.plan.batch(step - 1)
            return indices[share(len(indices), rank, world.size)].tolist()

        def less_memory() -> tuple[str, int | None]:
            return failure.less_memory(parts.micro_batch_size, splitting_changes(parts), auto=auto)

        if is_owned():  # a crash inside C code leaves its Python stack in the log
            faulthandler.enable(open(logs / f"rank-{world.rank}.log", "a"))  # noqa: SIM115
        return RunFacts(str(logs), samples, less_memory, self._record_failure, self._on_exit)

    def _tell_unfinished(self) -> None:
        """A process that was killed alone could not say so: its start has no end in attempts.jsonl."""
        lines, wrong = read_lines(self.run.storage, "attempts.jsonl")
        if wrong:
            self.console.warn(f"{wrong}: passed over")
        last = lines[-1] if self.attempt and lines else {"event": "end"}
        if last["event"] == "start":
            step = (self.run.read_json("status.json") or {"step": 0})["step"]
            self.console.warn(
                f"attempt {last.get('attempt')} on {last.get('host')} (pid {last.get('pid')}) ended without a word, after step "
                f"{step}: it was killed, or its host went down. Look for the kernel's out-of-memory killer (dmesg "
                "-T | grep -i kill) and the scheduler's limits"
            )

    def _on_exit(self) -> None:
        """What a rank that leaves in the middle owes to others: the run for the next start, and the terminal."""
        if self.run.lease is not None:
            self.run.lease.release()
        self.console.close()

    def _record_failure(self, record: failure.Record) -> None:
        """Leave word of a failure, as far as disk and store let one: what they say now must not hide the failure itself."""
        run, trainer = self.run, self.trainer
        if self._lost() is not None:
            return  # the records are another's by now
        cause = failure.cause(record)

        def tell() -> None:
            stand = run.read_json("status.json") or {"step": 0, "epoch": 0}
            step, epoch = (stand["step"], stand["epoch"]) if trainer is None else (trainer.step, trainer.epoch)
            run.write_status("failed", step=step, epoch=epoch, world_size=self.world.size, error=cause)
            run.record_attempt("end", attempt=self.attempt, state="failed", step=step, cause=cause)
            if "halved" in record:
                run.write_json(MICRO_BATCHES, {"micro_batch_size": record["halved"], "because": cause})

        def close() -> None:
            if trainer is not None:
                trainer.outputs.logger.close("failed", timeout=15.0 if self.world.size == 1 else 2.0)

        for leave_word in (tell, close, run.upload):
            try:
                leave_word()
            except (StorageError, LeaseLostError, OSError) as error:
                logging.getLogger("dist_train").warning("%s", error)
