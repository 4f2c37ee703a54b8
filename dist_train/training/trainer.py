"""The life of a run, from its first step to its last: read `fit` top to bottom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from dist_train.evaluation.evaluate import EvaluationInterruptedError, on_rank_zero
from dist_train.tracking.live import Beside
from dist_train.training.callbacks import Callback
from dist_train.training.due import Due, clocks
from dist_train.training.first_batch import FirstBatch
from dist_train.training.meter import Meter
from dist_train.training.parts import build_stepper
from dist_train.training.rows import TrainRows
from dist_train.training.state import of_every_rank, snapshot
from dist_train.training.unfreezing import Trainable
from dist_train.watch.control import EVALUATE, FINISH, LOG, SAVE, STOP, Control
from dist_train.watch.leave import LEAVE_SECONDS
from dist_train.watch.status import CALLBACK, EVALUATION, LOGGING, PHASES, SAVING, SYNC, status

if TYPE_CHECKING:
    from dist_train.data.plan import MicroBatch, StepWork
    from dist_train.training.parts import Parts
    from dist_train.training.rows import Outputs
    from dist_train.training.state import Progress

STATUS_SECONDS = 10.0
HOOKS = ("on_start", "on_step_end", "on_epoch_end", "on_evaluation_end", "on_end")


class Evaluated(Enum):
    """How an evaluation during training has ended: all ranks agreed to stop meanwhile; or it is, or isn't, the best so far."""

    INTERRUPTED = 0
    BEST = 1
    NOT_BEST = 2


class Trainer:
    """Runs optimizer steps and does what is due after each: log, evaluate, stop, save - in this order, always.

    It is what callbacks see (`callbacks.Training`).

    Attributes:
        outcome: None while training; `completed` when the run's duration is reached or `stop_when` has ended it; `preempted`
            when it was asked to stop.
        reason: why, in words.
    """

    def __init__(self, parts: Parts, progress: Progress, outputs: Outputs, stepper_state: dict[str, Any] | None = None):
        self.parts, self.progress, self.outputs = parts, progress, outputs
        self.config, self.world, self.plan = parts.config, parts.world, parts.plan
        self.model, self.modules = parts.model, parts.modules
        self.optimizer: Any = parts.optimizer
        self.run, self.console, self.checkpoints = outputs.run, outputs.console, outputs.checkpoints
        self.callbacks = list(parts.callbacks)  # theirs may be set, or replaced, at any time
        self.outcome: str | None = None
        self.reason = ""
        self._began = time.monotonic() - progress.seconds
        self.meter = Meter(parts, self.console.note)
        self.first_batch = FirstBatch(parts, stepper_state is None, self.meter)
        self.stepper = build_stepper(parts, self._prepare, outputs.digests)
        if stepper_state is not None:
            self.stepper.load_state_dict(stepper_state)
        self.rows = TrainRows(self.stepper, progress.samples, self.meter)
        self._trainable = Trainable(parts, self.stepper)
        sources = [*self.run.requests(), *clocks(self.config, lambda: self.seconds)] if self.world.is_main else []
        self._stopping = False
        self.control = Control(self.world.rank, self.world.size, self.world.clone_store(), sources, self._hear_stop)
        self.due = Due(self.config, self.plan.steps_per_epoch)
        self._due_at = 0  # until that step there is nothing to do after one
        self._views = {name: _overriding(name, outputs.views) for name in HOOKS}
        self._saved_step = self.step or -1
        self._status_at = time.monotonic()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        """The epoch (from 1) that the last step done belongs to; 0 before the first."""
        return 0 if self.step == 0 else self.plan.epoch_of(self.step - 1) + 1

    @property
    def seconds(self) -> float:
        """Seconds trained, over all starts of this run."""
        return time.monotonic() - self._began

    def log(self, name: str, value: float) -> None:
        """Add a metric to the next train row (that of rank 0 is recorded)."""
        self.rows.extra[name] = value

    def fit(self) -> str:
        """Train until the end, or until all ranks agree to stop; returns the outcome, with everything saved."""
        self.control.start()
        self._call("on_start")
        epochs = None if self.due.end is None else -(-self.due.end // self.plan.steps_per_epoch)
        evaluates = "val" in self.parts.eval_loaders and self.config.trainer.evaluate_every is not None
        self.console.begin(
            self.step, self.due.end, self.epoch, epochs, seconds=self.seconds, evaluates=evaluates, doing=self._doing
        )

        progress = self.progress
        if self.step == 0 and self.config.trainer.evaluate_at_start and progress.evaluated_step < 0:
            progress.evaluation_due = "val" in self.parts.eval_loaders
        self._check_end()  # the duration may be shorter by now
        self._settle()  # what a stop has interrupted at this step
        ends = [step for step in (self.due.end, self.due.stop) if step is not None]
        ahead = not self.callbacks and not self.config.has_live_objects  # which may change the dataset in any step
        steps = self.parts.train_loader.steps(self.step, min(ends) if ends else None, ahead=ahead)
        while self.outcome is None:
            work = next(steps)
            status.step = work.step + 1
            self.control.begin()
            self._run_step(work)
            self._boundary(self.control.due())

        self._call("on_end")
        if self._saved_step != self.step:
            self._save()
        self.world.barrier()  # no control thread ends while another rank may still need its agreement
        self.control.close()
        if self.checkpoints is not None:
            status.phase = SAVING
            self.checkpoints.wait()
            if self.outcome == "preempted" and self.checkpoints.tolerated is not None:
                raise self.checkpoints.tolerated
        return self.outcome

    def _hear_stop(self, reason: str) -> None:
        """Answer at once, from the control thread: the step may take long."""
        again = "; Ctrl-C again ends it now, without saving" if reason == "SIGINT" else ""
        text = f"stopping after this step ({reason}): it is saved, and the same command resumes{again}"

        def answer() -> None:
            if self.outcome is None:
                self._stopping = True
                self.console.note(text)

        if (
            reason == "SIGTERM" and self.world.size > 1
        ):  # torchrun sends it, too, when another rank has failed: all leave then
            waiting = threading.Timer(LEAVE_SECONDS, answer)
            waiting.daemon = True
            waiting.start()
        else:
            answer()

    def _doing(self) -> str:
        """What the terminal shows instead of training steps."""
        if self._stopping:
            return "stopping"
        return PHASES[status.phase] if status.phase in (EVALUATION, SAVING) else ""

    def _call(self, hook: str, *args: Any) -> None:
        """Call every callback, then make the rest follow where one of them lets other parameters train."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)
        for call in self._views[hook]:
            call(self, *args)
        if self.callbacks and hook != "on_end":
            self._trainable.follow()

    def _prepare(self, micro: MicroBatch, work: StepWork) -> Any:
        batch = self.parts.prepare(micro, work)
        if self.outputs.watch_batch is not None:
            self.outputs.watch_batch(self, batch)
        if self.first_batch.needed:
            self.first_batch.look(batch, micro.samples, work.samples)
        return batch

    def _run_step(self, work: StepWork) -> None:
        """One optimizer step, then schedule and EMA."""
        parts, done = self.parts, work.step + 1
        status.began = time.perf_counter()
        if self.outputs.trace is not None:
            self.outputs.trace.write(done, self.plan.local(work.step, self.world.rank, self.world.size))
        self.rows.lr = parts.learning_rates()
        self.stepper(work, want_norm=self.due.log(done))
        self.progress.step = self.console.step = done
        self.progress.samples += work.samples
        if parts.schedule is not None:
            parts.schedule.after_step(done)
        if parts.ema is not None:
            parts.ema.update()

    def _boundary(self, actions: set[str]) -> None:
        """What is due after a step: callbacks and the log, then what `_settle` does."""
        parts, progress, step = self.parts, self.progress, self.step
        status.phase, status.steps, status.waited = CALLBACK, status.steps + 1, parts.train_loader.waited
        if status.steps == 1:
            self._trainable.check_known()
            for warning in self.first_batch.warnings():
                self.console.warn(warning)
        self._call("on_step_end")
        due = step >= self._due_at or bool(actions)
        if due and step % self.plan.steps_per_epoch == 0:
            self._call("on_epoch_end")
        if self.outputs.digests is not None:
            self.outputs.digests.take(step)
        if self.checkpoints is not None:
            self.checkpoints.poll()
        if not due:
            return
        self._due_at = self.due.following(step)
        self._check_end(FINISH in actions)
        if progress.finished or LOG in actions or self.due.log(step):
            self._log()
        if progress.finished or EVALUATE in actions or self.due.evaluate(step):
            progress.evaluation_due = "val" in parts.eval_loaders
        self._settle(save=SAVE in actions or self.due.save(step), stop=STOP in actions)

    def _check_end(self, over: bool = False) -> None:
        if over or (self.due.end is not None and self.step >= self.due.end):
            reached = f"trainer.duration={self.config.trainer.duration} reached"
            self.progress.finished = self.progress.finished or reached

    def _settle(self, *, save: bool = False, stop: bool = False) -> None:
        """Evaluate and save if that is due, and decide whether this is the end; `stop`: all ranks agreed to stop here."""
        progress = self.progress
        if progress.evaluation_due and not stop:
            evaluated = self._evaluate()
            save, stop = save or evaluated is Evaluated.BEST, evaluated is Evaluated.INTERRUPTED
        if stop or (self.due.stop is not None and self.step >= self.due.stop and not progress.finished):
            self.outcome = "preempted"
            self.reason = self.control.reasons.get(STOP, f"trainer.stop_at={self.config.trainer.stop_at}")
        elif progress.finished:
            self.outcome, self.reason = "completed", progress.finished
        if self.step and (save or (self.outcome is not None and self._saved_step != self.step)):
            self._save()

    def _evaluate(self) -> Evaluated:
        """Evaluate on val, record it, and let schedule, callbacks and `stop_when` see it."""
        parts, progress = self.parts, self.progress
        self.stepper.read()
        try:
            results = parts.evaluator.run(parts.eval_loaders["val"], self.control)
        except EvaluationInterruptedError:
            return Evaluated.INTERRUPTED
        progress.evaluation_due = False
        progress.evaluated_step = self.step
        self._saved_step = -1  # an evaluation is saved too
        status.phase = CALLBACK
        progress.metrics = metrics = {f"val/{name}": value for name, value in results.items()}
        self._write_row("val", results)
        self.console.evaluation("val", self.step, results, self._beside())
        if parts.schedule is not None:
            parts.schedule.evaluated(metrics)
        self._call("on_evaluation_end", metrics)
        if parts.stop_when is not None and self.step:
            progress.finished = progress.finished or parts.stop_when.judge(metrics, self.step)
        best = parts.keep_best is not None and self.step > 0 and progress.take_best(*parts.keep_best)
        return Evaluated.BEST if best else Evaluated.NOT_BEST

    def _beside(self) -> Beside:
        """What the console shows beside the evaluation that has just ended."""
        keep, means = self.parts.keep_best, self.stepper.take_means()
        best = keep is not None and self.step > 0 and self.progress.is_best(*keep)
        main = "loss" if keep is None else keep[0].removeprefix("val/")
        train = {name: value for name, value in means.items() if self.step and not name.startswith("loss/")}
        return Beside(self.epoch, train, self.rows.lr, main, best)

    def _log(self) -> None:
        """A train row, for the records and for the console."""
        status.phase = LOGGING
        self.stepper.read()
        if self.outputs.digests is not None:
            self.outputs.digests.flush()
        self._count_skipped()
        row = self.rows.take(self.progress.samples, self.parts.train_loader.waited, self.world.peers.pace())
        self._write_row("train", row)
        duration = self.config.trainer.duration
        left = max(0.0, duration.value - self.seconds) if duration.is_time else None
        self.console.progress(self.step, self.due.end, self.epoch, row, left)
        for warning in filter(None, (self.world.peers.slow_rank(), self.meter.advice())):
            self.console.warn(warning)
        if self.world.is_main and time.monotonic() - self._status_at > STATUS_SECONDS:
            self._status_at = time.monotonic()
            with self.run.best_effort():
                self.write_status("running")

    def _count_skipped(self) -> None:
        """Samples that were replaced on any rank since the last time, for the next row and the checkpoint; all ranks call it."""
        if self.config.data.on_error == "skip":
            self.progress.skipped_samples += sum(self.world.all_gather(self.parts.train_loader.skipped.take()))
            self.log("skipped_samples", self.progress.skipped_samples)

    def _write_row(self, split: str, metrics: dict[str, float]) -> None:
        if self.checkpoints is not None:
            self.checkpoints.assure_owner()
        self.outputs.logger.row(split, self.step, self.epoch, self.progress.samples, metrics)

    def _save(self) -> None:
        """Save a checkpoint of this step; all ranks call it, rank 0 writes."""
        status.phase = SYNC
        self.stepper.read()
        self._trainable.check_known()
        if self.outputs.digests is not None:  # before rank 0 hears of this rank, and so before it publishes
            self.outputs.digests.flush(sync=True)
        self._count_skipped()
        ranks = of_every_rank(self.modules, self.world, equal=self.plan.leaf_size is not None)
        stream = self.parts.train_loader.state_dict(lambda value: on_rank_zero(self.world, value))
        status.phase = SAVING
        progress = self.progress
        self._saved_step = self.step
        progress.seconds = self.seconds
        if self.checkpoints is None:
            self.run.upload_in_background()
            return
        meta = {
            "epoch": self.epoch,
            "samples": progress.samples,
            "world_size": self.world.size,
            "best": self.parts.keep_best,
            "plan": self.plan.record(),
            "horizon": self.parts.horizon,
            **self.outputs.record,
        }
        metrics = progress.metrics if progress.evaluated_step == self.step else None
        state = snapshot(self.parts, self.stepper, progress, ranks, stream)
        self.checkpoints.save(self.step, state, meta, metrics, before_publish=self.outputs.flush_and_upload)

    def write_status(self, state: str, error: str | None = None) -> None:
        """status.json as it should be now (rank 0)."""
        self.run.write_status(state, step=self.step, epoch=self.epoch, world_size=self.world.size, error=error)

    def close(self) -> None:
        """End loader workers and files, whatever happened."""
        loaders, outputs = (self.parts.train_loader, *self.parts.eval_loaders.values()), self.outputs
        for opened in (*loaders, outputs.trace, outputs.digests):
            if opened is not None:
                opened.close()


def _overriding(hook: str, views: Sequence[Callback]) -> list[Callable[..., None]]:
    """The hook of each view that defines it."""
    found = [getattr(view, hook) for view in views]
    return [call for call in found if getattr(call, "__func__", call) is not getattr(Callback, hook)]
