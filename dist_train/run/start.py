"""One start of a run: decide what there is to do, build, train, finish, and record how it ended."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dist_train.building.model import splitting_changes
from dist_train.building.prepare import check_pictures
from dist_train.checkpoint.manager import CheckpointManager, SavePolicy
from dist_train.checkpoint.store import CheckpointStore
from dist_train.config.code import source_files
from dist_train.config.errors import ConfigError
from dist_train.config.slots import require_components
from dist_train.files import StorageError
from dist_train.pages.notebook import notebook_live
from dist_train.pages.page import write_records
from dist_train.pages.result import Result
from dist_train.run.completed import end_lines
from dist_train.run.decide import Decision, compare_frozen, decide, find_checkpoint
from dist_train.run.finish import finish, finish_completed, load_into_live_model
from dist_train.run.objects import facts_of, sample_digests
from dist_train.run.report import report_at_end
from dist_train.run.summary import run_facts, start_lines
from dist_train.runtime.launch import read_placement
from dist_train.runtime.lease import LeaseHeldError, LeaseLostError
from dist_train.runtime.location import MICRO_BATCHES, check_place, run_location
from dist_train.runtime.numerics import numerics_of
from dist_train.runtime.rundir import RunDir, check_shared
from dist_train.runtime.sidefiles import read_lines
from dist_train.runtime.storage import LocalStorage
from dist_train.runtime.world import World, open_world
from dist_train.tracking.console import Console
from dist_train.tracking.logs import setup_logging
from dist_train.training.digests import open_digests, resume_digests
from dist_train.training.eval_check import check_evaluation
from dist_train.training.leaf_check import check_leaves
from dist_train.training.parts import Parts, build_parts, losses_of
from dist_train.training.rows import Outputs, Trace
from dist_train.training.state import Progress, restore
from dist_train.training.trainer import Trainer
from dist_train.views.boundary import BoundaryFrames
from dist_train.views.grids import GridFrames
from dist_train.views.network import Pictures, image_modules
from dist_train.views.profiling import Profile
from dist_train.views.sinks import open_logger
from dist_train.watch import failure, signals
from dist_train.watch.leave import RunFacts
from dist_train.watch.processes import is_owned

if TYPE_CHECKING:
    from dist_train.config.schema import Config


def train_config(config: Config) -> Result:
    """Train, or resume the run of that name; returns what result.json holds (or the same of a run that was stopped).

    Raises:
        ConfigError: the config can't be run; nothing was written.
    """
    try:
        with open_world(config.distributed, read_placement(os.environ)) as world:
            return train_in(world, config, Console(world.is_main, live=notebook_live))
    finally:
        if not is_owned():
            signals.restore()  # in somebody else's process Ctrl-C is theirs again


@torch.inference_mode(mode=False)
@torch.enable_grad()  # whatever the caller has switched off
def train_in(world: World, config: Config, console: Console, built: Callable[[Parts], object] | None = None) -> Result:
    """As `train_config`, among processes that are connected already; closes the console.

    Args:
        built: called with the parts before they are trained.
    """

    def look() -> dict[str, Any]:
        check_place(run.location)
        return vars(decide(config, run))

    try:
        console.working("building the model, reading the data")
        run = RunDir(world.on_main(lambda: run_location(config)))
        decision = Decision(**world.on_main(look))
        if decision.action == "completed":
            return finish_completed(world, config, run, console, decision)
        require_components(config)  # `train` skips that for a run that seems to be completed
        parts = _build(config, world, decision)  # whatever is wrong with the config shows here
        if decision.is_over(config, parts.plan.steps_per_epoch):
            return finish_completed(world, config, run, console, decision)
        unsure: list[str] = []
        if decision.action == "fresh":
            twice = check_pictures(config, world, parts.datasets["train"], "train", parts.move)
            unsure = [*filter(None, [twice]), *check_evaluation(parts)]
        if parts.plan.leaf_size is not None:
            check_leaves(parts)
        if decision.action == "resume" and (frozen := parts.frozen) is not None:
            world.on_main(lambda: compare_frozen(frozen, decision, run))
        for line in (*decision.warnings, *unsure) if world.is_main else ():
            console.warn(line)
        if built is not None:
            built(parts)
        world.barrier()
        if not world.is_main:  # rank 0 may have to wait for another job's lease; its signals are held once it has it
            signals.hold()
        check_shared(run, world)  # from here on things are written
        return Start(parts, run, console, decision).train()
    finally:
        console.close()


def _build(config: Config, world: World, decision: Decision) -> Parts:
    fresh = decision.action == "fresh"
    parts = build_parts(config, world, fresh=fresh, fits=decision.fits, horizon=decision.horizon)
    if config.tracking.tensorboard:
        image_modules(config.tracking, parts.model)  # raises for names that the model doesn't have
    return parts


class Start:
    """One start of a run: it owns the run while it trains, and records how it began and ended."""

    def __init__(self, parts: Parts, run: RunDir, console: Console, decision: Decision):
        self.parts, self.run, self.console = parts, run, console
        self.config, self.world = parts.config, parts.world
        self.trainer: Trainer | None = None
        self.attempt = 0
        self.decision = decision
        self._attached = False  # whether a failure is this run's, to be recorded

    def train(self) -> Result:
        """Train from the checkpoint that there is, if any, to the end of this start.

        Raises:
            ConfigError: another job trains this run.
            LeaseLostError: the run has got another owner, or was deleted: nothing more was written.
        """
        peers = self.world.peers
        try:
            owner, self.attempt, decided = self.world.on_main(self._own)
            self.run.join(*owner)
            before, self.decision = self.decision, Decision(**decided)
            if self.decision.action == "completed":
                return finish_completed(self.world, self.config, self.run, self.console, self.decision)
            if (self.decision.action, self.decision.fits) != (before.action, before.fits):
                self.parts = _build(self.config, self.world, self.decision)
            self.run.open_files(self.world)
            setup_logging(self.run.path(f"logs/rank-{self.world.rank}.log"), self.world.rank)
            peers.attach(self._facts())
            self._attached = True
            return self._train()
        except BaseException as raised:
            peers.leave_a_fork(raised)
            error = self._lost() or raised  # what failed, failed because of that
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

    def _own(self) -> tuple[tuple[int, str], int, dict[str, Any]]:
        """The first writes: rank 0 takes the lease, decides once more, and claims this start's number.

        The owner before may have trained on, and even finished, until now: what is decided under the lease counts.
        """
        storage = self.run.storage
        try:
            lease = self.run.acquire(self.console.note)
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

    def _lost(self) -> LeaseLostError | None:
        """The reason why the run isn't this process's any more, if so."""
        self.run.shorten_timeouts()
        try:
            self.run.check_owner()
        except LeaseLostError as error:
            return error
        except (StorageError, OSError):
            pass  # a store that can't be reached: it isn't known
        return None

    def _train(self) -> Result:
        config, world, run, console = self.config, self.world, self.run, self.console
        if world.is_main:
            self._warn_of_unfinished()
        saving = config.checkpoint
        checkpoints = CheckpointManager(
            run.storage.sub("checkpoints"),
            SavePolicy(saving.keep_last, self.parts.keep_best, saving.asynchronous, saving.on_error),
            log=console.note,
            lease=run.lease,
        )
        progress, stepper_state = self._restore(checkpoints)
        outputs = self._outputs(progress, checkpoints)
        self.trainer = trainer = Trainer(self.parts, progress, outputs, stepper_state)
        for line in self.decision.changes:
            console.note(f"changed since the last start: {line}")
        console.start_block(start_lines(trainer))
        numerics = world.all_gather(numerics_of(config, world.device))
        if world.is_main:
            trainer.write_status("running")
            self._record_start(trainer.step, numerics, outputs.record)
        world.barrier()  # the start is recorded before any rank can fail
        outcome = trainer.fit()
        console.working("writing the model")
        if outcome == "completed":
            result = finish(trainer, checkpoints)
            world.barrier()  # ranks with a live model read the model.pt that rank 0 has written
        else:
            result = {"state": outcome, "reason": trainer.reason, "step": trainer.step, "epoch": trainer.epoch}
            result["seconds"] = round(progress.seconds, 3)
        outputs.logger.close(outcome)
        run.upload()
        if world.is_main:
            trainer.write_status(outcome)
            samples = {"samples": sample_digests(config)} if outcome == "completed" else {}
            run.record_attempt(
                "end", attempt=self.attempt, state=outcome, step=trainer.step, cause=trainer.reason, **samples
            )
        console.working("writing the report" if config.tracking.report else "")
        if config.tracking.report and outcome == "completed":
            report_at_end(trainer)
            run.upload()
        elif config.tracking.report and world.is_main:
            write_records(run, console.warn)
        if outcome == "completed":
            load_into_live_model(config, run)
        console.end_block([*end_lines(result, run), *self._memory()])
        return Result(result, run.location)

    def _memory(self) -> list[tuple[str, str]]:
        """The GPU that has needed most memory; all ranks call it."""
        device = self.world.device
        if device.type != "cuda":
            return []
        peak = (
            torch.cuda.max_memory_allocated(device) / 2**30,
            torch.cuda.get_device_properties(device).total_memory / 2**30,
        )
        most, total = max(self.world.all_gather(peak))
        return [("memory", f"at most {most:.1f} of {total:.0f} GiB of a GPU")]

    def _restore(self, checkpoints: CheckpointManager) -> tuple[Progress, dict[str, Any] | None]:
        if self.decision.action == "fresh":
            return Progress(), None
        found = find_checkpoint(self.world, self.decision, checkpoints)
        if (horizon := found.value("horizon", int | None)) != self.decision.horizon:  # it isn't the newest one
            self.decision.horizon = horizon
            self.parts = _build(self.config, self.world, self.decision)
        return restore(self.parts, found, self.decision.changed, self.console.note)

    def _outputs(self, progress: Progress, checkpoints: CheckpointManager) -> Outputs:
        """Where training writes: on rank 0 the records with their views, and checkpoints; on each rank its trace and digests."""
        config, parts, run = self.config, self.parts, self.run
        outputs = Outputs(run, self.console, record=run_facts(config, parts.metrics) if self.world.is_main else {})
        if config.debug.trace_samples:
            outputs.trace = Trace(run.path("trace"), self.attempt, self.world.rank)
        resume_digests(run, self.world, progress.step, writes=config.debug.digest)
        if config.debug.digest:
            outputs.digests = open_digests(run, self.world, progress.step, parts.modules, losses_of(parts))
        if not self.world.is_main:
            return outputs
        if config.trainer.profile is not None:
            outputs.views.append(Profile(config.trainer.profile, run.root, self.console.note, self.console.warn))
        pending = ("val", "test") if progress.evaluation_due else ("test",)
        outputs.checkpoints = checkpoints
        outputs.logger = open_logger(run.root, config, self.console, start_step=progress.step, pending=pending)
        if "val" in parts.eval_loaders:
            shown = run.root, parts.eval_loaders["val"].dataset, parts.evaluator
            outputs.views += [BoundaryFrames(*shown), GridFrames(*shown)]
        if config.tracking.tensorboard:
            pictures = Pictures(config.tracking, parts.evaluator, outputs.logger)
            outputs.views.append(pictures)
            watches = config.tracking.images is not None or config.tracking.graph
            outputs.watch_batch = pictures.on_batch if watches else None
        return outputs

    def _facts(self) -> RunFacts:
        """What a failure's report needs of this run, and what the run does about it."""
        parts, world, logs = self.parts, self.world, self.run.path("logs")
        auto = self.config.trainer.micro_batch_size == "auto"

        def samples(step: int, rank: int) -> Sequence[int]:
            return parts.plan.local(step - 1, rank, world.size).tolist()

        def less_memory() -> tuple[str, int | None]:
            changes = splitting_changes(parts)
            if parts.plan.leaf_size is not None:
                changes = "by consent alone (checkpoint.accept_changes=true), as bits depend on it"
            return failure.less_memory(parts.micro_batch_size, changes, auto=auto)

        if is_owned():  # a crash inside C code leaves its Python stack in the log
            faulthandler.enable(open(logs / f"rank-{world.rank}.log", "a"))  # noqa: SIM115
        return RunFacts(str(logs), samples, less_memory, self._record_failure, self._on_exit)

    def _record_start(self, step: int, numerics: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        placement = self.world.placement
        differing = self._differing_numerics(numerics) if self.parts.plan.leaf_size is not None else []
        for line in differing:
            self.console.warn(f"{line}: kernels may round otherwise there, so that the bits may differ from here on")
        self.run.record_attempt(
            "start",
            attempt=self.attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            world_size=self.world.size,
            nodes=placement.nodes,
            launcher=placement.launcher,
            resumed_from=step,
            **{name: facts[name] for name in ("command", "versions", "git", "better") if name in facts},
            **({"changed": self.decision.changes} if self.decision.changes else {}),
            numerics=numerics[0],
            **({"bits_may_differ": differing} if differing else {}),
            code=source_files(self.config),
            objects=facts_of(self.config),
        )

    def _differing_numerics(self, numerics: list[dict[str, Any]]) -> list[str]:
        """What differs between the ranks, or from the last start of this run, of what bits depend on."""
        records, _ = read_lines(self.run.storage, "attempts.jsonl")
        last = next((record["numerics"] for record in reversed(records) if "numerics" in record), numerics[0])
        mine, found = numerics[0], list[str]()
        for key, value in mine.items():
            if value != last.get(key):
                found.append(f"{key} is {value}, and was {last.get(key)} at the last start")
            for rank, theirs in enumerate(numerics):
                if theirs[key] != value:
                    found.append(f"{key} is {value} on rank 0, and {theirs[key]} on rank {rank}")
        return found

    def _warn_of_unfinished(self) -> None:
        """A process that was killed alone couldn't say so: its start has no end in attempts.jsonl."""
        lines, wrong = read_lines(self.run.storage, "attempts.jsonl")
        if wrong:
            self.console.warn(f"{wrong}: skipped")
        last = lines[-1] if self.attempt and lines else {"event": "end"}
        if last["event"] == "start":
            said = (self.run.read_json("status.json") or {"step": 0})["step"]  # some seconds old
            step = max(said, *CheckpointStore(self.run.storage.sub("checkpoints")).steps(), 0)
            self.console.warn(
                f"attempt {last.get('attempt')} on {last.get('host')} (pid {last.get('pid')}) ended without a message, after "
                f"step {step} or later: it was killed, or its host went down. Look for the kernel's out-of-memory killer (dmesg "
                "-T | grep -i kill) and the scheduler's limits"
            )

    def _on_exit(self) -> None:
        """What a rank does that leaves before the end: it releases the run for the next start, and the terminal."""
        if self.run.lease is not None:
            self.run.lease.release()
        self.console.close()

    def _record_failure(self, record: failure.Record) -> None:
        """Record a failure as far as disk and store allow: their errors must not hide the failure itself."""
        run, trainer = self.run, self.trainer
        if self._lost() is not None:
            return  # the records are another's by now
        cause = failure.cause(record)

        def write() -> None:
            at = run.read_json("status.json") or {"step": 0, "epoch": 0}
            step, epoch = (at["step"], at["epoch"]) if trainer is None else (trainer.step, trainer.epoch)
            run.write_status("failed", step=step, epoch=epoch, world_size=self.world.size, error=cause)
            run.record_attempt("end", attempt=self.attempt, state="failed", step=step, cause=cause)
            if "halved" in record:
                run.write_json(MICRO_BATCHES, {"micro_batch_size": record["halved"], "because": cause})

        def close() -> None:
            if trainer is not None:
                trainer.outputs.logger.close("failed", timeout=15.0 if self.world.size == 1 else 2.0)

        for action in (write, close, run.upload):
            try:
                action()
            except (StorageError, LeaseLostError, OSError) as error:
                logging.getLogger("dist_train").warning("%s", error)
