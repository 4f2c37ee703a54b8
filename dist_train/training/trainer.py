"""The life of a run, from its first step to its last: read `fit` top to bottom."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dist_train.checkpoint.store import merit
from dist_train.task.metrics import figure
from dist_train.tracking.logger import Logger
from dist_train.training.due import Due, clocks
from dist_train.training.evaluate import EvaluationInterruptedError, on_rank_zero
from dist_train.training.rows import TrainRows
from dist_train.training.state import Progress, facts, meta, of_every_rank, snapshot
from dist_train.training.trace import Trace
from dist_train.training.unfreezing import Trained
from dist_train.views.sinks import open_logger
from dist_train.watch.control import EVALUATE, FINISH, LOG, SAVE, STOP, Control
from dist_train.watch.status import CALLBACK, LOGGING, SAVING, SYNC, status

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.data.loader import StepWork
    from dist_train.runtime.rundir import RunDir
    from dist_train.tracking.console import Console
    from dist_train.training.parts import Parts

STATUS_SECONDS = 10.0


class Trainer:
    """Runs optimizer steps and does what is due after each: log, evaluate, stop, save - in this order, always.

    Attributes:
        outcome: None while training; `completed` when the run's duration is reached or `stop_when` has ended it; `preempted`
            when it was asked to stop.
        reason: why, in words.
        record: what goes into every manifest.
    """

    def __init__(
        self,
        parts: Parts,
        run: RunDir,
        console: Console,
        checkpoints: CheckpointManager,
        progress: Progress,
        attempt: int,
    ):
        self.parts, self.run, self.console, self.progress = parts, run, console, progress
        self.config, self.world, self.plan = parts.config, parts.world, parts.plan
        self.model, self.optimizer, self.stepper = parts.model, parts.optimizer, parts.stepper
        self._trained = Trained(parts)
        self.outcome: str | None = None
        self.reason = ""
        self.record = {"horizon": parts.horizon, **facts(self.config)}
        self.rows = TrainRows(parts, progress)
        self.logger = Logger()
        self.checkpoints: CheckpointManager | None = None
        sources = []
        self._began = time.monotonic() - progress.seconds
        if self.world.is_main:
            pending = ("val", "test") if progress.evaluation_due else ("test",)
            self.logger = open_logger(run.root, self.config, console, start_step=self.step, pending=pending)
            self.checkpoints = checkpoints
            sources = [*run.wishes(), *clocks(self.config, lambda: self.seconds)]
        self.control = Control(self.world.rank, self.world.size, self.world.clone_store(), sources)
        parts.evaluator.ema, parts.evaluator.control = parts.ema, self.control
        self.trace: Trace | None = None
        if self.config.debug.trace_samples:
            self.trace = Trace(run.path("trace"), attempt, self.world.rank)
        schedule = parts.schedule.every if parts.schedule is not None and not parts.schedule.on_plateau else None
        self.due = Due(self.config, self.plan.steps_per_epoch, schedule)
        self.total_steps = self.due.end
        self._saved_step = self.step or -1
        self._status_at = time.monotonic()

    @property
    def step(self) -> int:
        """Optimizer steps committed so far."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        """The epoch (from 1) that the last committed step belongs to; 0 before the first."""
        return 0 if self.step == 0 else self.plan.epoch_of(self.step - 1) + 1

    @property
    def seconds(self) -> float:
        """Seconds trained, over all starts of this run."""
        return time.monotonic() - self._began

    def log(self, name: str, value: float) -> None:
        """Put a figure of one's own into the next train row (rank 0's is kept)."""
        self.rows.extra[name] = value

    def fit(self) -> str:
        """Train until the end, or until all ranks agree to stop; returns the outcome, with everything saved."""
        self.control.start()
        self._call("on_start")
        epochs = None if self.total_steps is None else -(-self.total_steps // self.plan.steps_per_epoch)
        self.console.begin(self.step, self.total_steps, self.epoch, epochs)

        progress = self.progress
        if self.step == 0 and self.config.trainer.evaluate_at_start and progress.evaluated_step < 0:
            progress.evaluation_due = "val" in self.parts.eval_loaders
        self._check_end()  # the duration may be shorter by now
        self._settle()  # what a stop has left undone at this step
        ends = [step for step in (self.total_steps, self.due.stop) if step is not None]
        steps = self.parts.train_loader.steps(self.step, min(ends) if ends else None)
        while self.outcome is None:
            work = next(steps)
            status.step = work.step + 1
            self.control.begin()
            self._run_step(work)
            self._boundary(self.control.due())

        for callback in self.parts.callbacks:
            callback.on_end(self)
        if self._saved_step != self.step:
            self._save()
        self.world.barrier()  # nobody stops listening while another may still have to agree on something
        self.control.close()
        if self.checkpoints is not None:
            status.phase = SAVING
            self.checkpoints.wait()
            if self.outcome == "preempted" and self.checkpoints.tolerated is not None:
                raise self.checkpoints.tolerated
        return self.outcome

    def _call(self, hook: str, *args: Any) -> None:
        """Every callback, and then what follows where one of them has let other parameters train."""
        for callback in self.parts.callbacks:
            getattr(callback, hook)(self, *args)
        if self.config.callbacks:
            self._trained.follow()

    def _run_step(self, work: StepWork) -> None:
        """One optimizer step, then schedule and EMA."""
        parts, number = self.parts, work.step + 1
        status.began = time.perf_counter()
        if self.trace is not None:
            self.trace.write(number, work.local_indices)
        self.rows.lr = self.optimizer.param_groups[0]["lr"]
        self.stepper(work, want_norm=self.due.log(number))
        self.progress.step = self.console.step = number
        self.progress.samples += work.samples
        if parts.schedule is not None and self.due.schedule(number):
            parts.schedule.step()
        if parts.ema is not None:
            parts.ema.update()

    def _boundary(self, actions: set[str]) -> None:
        """What is due after a step: callbacks and the log, then what `_settle` does."""
        parts, progress, step = self.parts, self.progress, self.step
        status.phase, status.steps, status.waited = CALLBACK, status.steps + 1, parts.train_loader.waited
        if status.steps == 1:
            self._trained.check_known()
            for warning in filter(None, (parts.inexactness(), parts.forgotten)):
                self.console.warn(warning)
        self._call("on_step_end")
        if step % self.plan.steps_per_epoch == 0:
            self._call("on_epoch_end")
        self._check_end(FINISH in actions)
        if progress.finished or LOG in actions or self.due.log(step):
            self._log()
        if progress.finished or EVALUATE in actions or self.due.evaluate(step):
            progress.evaluation_due = "val" in parts.eval_loaders
        self._settle(save=SAVE in actions or self.due.save(step), asked=STOP in actions)
        if self.checkpoints is not None:
            self.checkpoints.poll()

    def _check_end(self, over: bool = False) -> None:
        if over or (self.total_steps is not None and self.step >= self.total_steps):
            self.progress.finished = (
                self.progress.finished or f"trainer.duration={self.config.trainer.duration} reached"
            )

    def _settle(self, *, save: bool = False, asked: bool = False) -> None:
        """Evaluate if that is due, find out whether this is the end, and save; `asked`: all ranks agreed to stop here."""
        progress, trainer = self.progress, self.config.trainer
        if progress.evaluation_due and not asked:
            improved, asked = self._evaluate()
            save = save or improved
        if asked or (self.due.stop is not None and self.step >= self.due.stop and not progress.finished):
            self.outcome = "preempted"
            self.reason = self.control.reasons.get(STOP, f"trainer.stop_at={trainer.stop_at}")
        elif progress.finished:
            self.outcome, self.reason = "completed", progress.finished
        if self.step and (save or (self.outcome is not None and self._saved_step != self.step)):
            self._save()

    def _evaluate(self) -> tuple[bool, bool]:
        """Evaluate on val; (the kept metric is better than ever, all ranks agreed to stop meanwhile)."""
        parts, progress = self.parts, self.progress
        self.stepper.guard.read()
        try:
            figures = parts.evaluator.run(parts.eval_loaders["val"])
        except EvaluationInterruptedError:
            return False, True
        progress.evaluation_due = False
        progress.evaluated_step = self.step
        self._saved_step = -1  # there is more to save by now
        status.phase = CALLBACK
        progress.metrics = metrics = {f"val/{name}": value for name, value in figures.items()}
        self._write_row("val", figures)
        self.console.evaluation("val", self.step, figures)
        if parts.schedule is not None and parts.schedule.on_plateau:
            parts.schedule.step(metrics)
        self._call("on_evaluation_end", metrics)
        if parts.stop_when is not None and self.step:
            progress.finished = progress.finished or parts.stop_when.judge(metrics, self.step)
        if parts.keep_best is None or not self.step:
            return False, False
        name, mode = parts.keep_best
        value, now = figure(metrics, name), merit(metrics, name, mode)
        sign = 1.0 if mode == "min" else -1.0
        if now is None or (progress.best is not None and now >= (sign * progress.best, progress.best_loss)):
            return False, False
        progress.best, progress.best_loss, progress.best_step = value, now[1], self.step
        return True, False

    def _log(self) -> None:
        """A train row, for the records and for the person."""
        status.phase = LOGGING
        self.stepper.guard.read()
        row = self.rows.take()
        self._write_row("train", row)
        duration = self.config.trainer.duration
        left = max(0.0, duration.value - self.seconds) if duration.is_time else None
        self.console.progress(self.step, self.total_steps, self.epoch, row, left)
        if slow := self.world.peers.slow_rank():
            self.console.warn(slow)
        if self.world.is_main and time.monotonic() - self._status_at > STATUS_SECONDS:
            self._status_at = time.monotonic()
            with self.run.only_a_view():
                self.write_status("running")

    def _write_row(self, split: str, figures: dict[str, float]) -> None:
        if self.checkpoints is not None:
            self.checkpoints.assure_owner()
        self.logger.row(split, self.step, self.epoch, self.progress.samples, figures)

    def _save(self) -> None:
        """Save a checkpoint of this step; all ranks call it, rank 0 writes."""
        status.phase = SYNC
        self.stepper.guard.read()
        self._trained.check_known()
        ranks = of_every_rank(self.parts.modules, self.world)
        stream = self.parts.train_loader.state_dict(lambda value: on_rank_zero(self.world, value))
        status.phase = SAVING
        progress = self.progress
        self._saved_step = self.step
        progress.seconds = self.seconds
        if self.checkpoints is None:
            self.run.upload_meanwhile()
            return
        metrics = progress.metrics if progress.evaluated_step == self.step else None
        state = snapshot(self.parts, progress, ranks, stream)
        self.checkpoints.save(self.step, state, meta(self), metrics, before_publish=self.bring_home)

    def bring_home(self) -> None:
        """What has been recorded so far is made as durable as the checkpoint that is about to be published (rank 0)."""
        self.logger.flush(wait=0.0 if self.run.storage.is_local else 5.0)
        self.run.upload()

    def write_status(self, state: str, error: str | None = None) -> None:
        """status.json as it should be now (rank 0)."""
        self.run.write_status(state, step=self.step, epoch=self.epoch, world_size=self.world.size, error=error)

    def close(self) -> None:
        """End loader workers and files, whatever happened."""
        for loader in (self.parts.train_loader, *self.parts.eval_loaders.values(), self.trace):
            if loader is not None:
                loader.close()
