"""The life of a run, from its first step to its last: read `fit` top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_train.config.durations import Duration
from dist_train.engine.buffers import take_from_rank_zero
from dist_train.engine.callbacks import Callback
from dist_train.engine.ema import EMA
from dist_train.engine.evaluate import EvaluationInterruptedError, Evaluator
from dist_train.engine.optim import Schedule
from dist_train.engine.step import Stepper
from dist_train.engine.stopping import StopWhen, in_steps, is_due
from dist_train.runtime.control import EVALUATE, FINISH, LOG, SAVE, STOP, Control, watch_clock
from dist_train.runtime.here import CALLBACK, LOGGING, MEETING, SAVING, here

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.config.schema import Config
    from dist_train.data.loader import EvalLoader, StepWork, TrainLoader
    from dist_train.data.plan import Plan
    from dist_train.engine.rundir import RunDir
    from dist_train.engine.trace import Trace
    from dist_train.runtime.world import World
    from dist_train.tracking.console import Console
    from dist_train.tracking.logger import Logger

STATUS_SECONDS = 10.0


@dataclass
class Parts:
    """What `engine.build` makes of a config, for the trainer to run."""

    config: Config
    world: World
    run: RunDir
    console: Console
    logger: Logger
    control: Control
    plan: Plan
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    evaluator: Evaluator
    train_loader: TrainLoader
    eval_loaders: dict[str, EvalLoader]
    checkpoints: CheckpointManager | None  # rank 0's
    schedule: Schedule | None = None
    ema: EMA | None = None
    stop_when: StopWhen | None = None
    trace: Trace | None = None
    callbacks: Sequence[Callback] = ()
    keep_best: tuple[str, str] | None = None  # metric, "min" or "max"
    once_trained: list[Callable[[], None]] = field(default_factory=list)  # called after the first step of this start
    record: dict[str, Any] = field(default_factory=dict)  # config, versions, commit: goes into every manifest


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        step: optimizer steps committed. samples: samples consumed by them. seconds: time trained, over all starts.
        evaluated_step: the step of the last complete evaluation, -1 before the first. evaluation_due: a stop broke one off.
        best, best_step: the best value of the metric that is kept.
        finished: why training is over, once it is.
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    evaluated_step: int = -1
    evaluation_due: bool = False
    best: float | None = None
    best_step: int = 0
    finished: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Runs optimizer steps and does what is due after each: log, evaluate, stop, save - in this order, always.

    Attributes:
        outcome: None while training; `completed` when the run's duration is reached or `stop_when` has ended it; `preempted`
            when it was asked to stop.
        reason: why, in words.
    """

    def __init__(self, parts: Parts, progress: Progress):
        self.parts, self.progress = parts, progress
        self.config, self.world = parts.config, parts.world
        self.model, self.optimizer = parts.model, parts.optimizer
        self.steps_per_epoch = parts.plan.steps_per_epoch
        self.total_steps = in_steps(self.config.trainer.duration, self.steps_per_epoch)
        self.stop_step = in_steps(self.config.trainer.stop_at, self.steps_per_epoch)
        self.outcome: str | None = None
        self.reason = ""
        self._lr = 0.0
        self._extra: dict[str, float] = {}
        now = time.monotonic()
        self._began = now - progress.seconds
        self._status_at = now
        self._saved_step = progress.step if progress.step else -1
        self._interval = (progress.samples, now, 0.0)

    @property
    def step(self) -> int:
        """Optimizer steps committed so far."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        """The epoch (from 1) that the last committed step belongs to; 0 before the first."""
        return 0 if self.step == 0 else self.parts.plan.epoch_of(self.step - 1) + 1

    @property
    def seconds(self) -> float:
        """Seconds trained, over all starts of this run."""
        return time.monotonic() - self._began

    def log(self, name: str, value: float) -> None:
        """Put a figure of one's own into the next train row (rank 0's is kept)."""
        self._extra[name] = value

    def fit(self) -> str:
        """Train until the end, or until all ranks agree to stop; returns the outcome, with everything saved."""
        parts = self.parts
        self._watch_clocks()
        parts.control.start()
        for callback in parts.callbacks:
            callback.on_start(self)
        ends = [step for step in (self.total_steps, self.stop_step) if step is not None]
        parts.console.begin(self.step, self.total_steps, self.epoch, self._epochs())

        self._resume_boundary()
        if self.outcome is None:
            for work in parts.train_loader.steps(self.step, min(ends) if ends else None):
                here.step = work.step + 1
                parts.control.begin()
                self._run_step(work)
                self._boundary(parts.control.due())
                if self.outcome is not None:
                    break

        for callback in parts.callbacks:
            callback.on_end(self)
        if self._saved_step != self.step:
            self._save()
        self.world.barrier()  # nobody stops listening while another may still have to agree on something
        parts.control.close()
        if parts.checkpoints is not None:
            here.phase = SAVING
            parts.checkpoints.wait()
            if self.outcome == "preempted" and parts.checkpoints.tolerated is not None:
                raise parts.checkpoints.tolerated
        assert self.outcome is not None
        return self.outcome

    def _run_step(self, work: StepWork) -> None:
        """One optimizer step, then schedule and EMA."""
        parts, number = self.parts, work.step + 1
        here.began = time.perf_counter()
        if parts.trace is not None:
            parts.trace.write(number, work.local_indices)
        self._lr = parts.optimizer.param_groups[0]["lr"]
        parts.stepper(work, want_norm=self._logs_at(number))
        self.progress.step = parts.console.step = number
        self.progress.samples += work.samples
        schedule = parts.schedule
        if schedule is not None and not schedule.on_plateau and is_due(schedule.every, number, self.steps_per_epoch):
            schedule.step()
        if parts.ema is not None:
            parts.ema.update()

    def _boundary(self, actions: set[str]) -> None:
        """What is due after a step, in this order: log, evaluate, stop_when, save."""
        parts, progress, step = self.parts, self.progress, self.step
        here.phase, here.steps, here.waited = CALLBACK, here.steps + 1, parts.train_loader.waited
        if parts.once_trained:
            parts.once_trained.pop()()
        for callback in parts.callbacks:
            callback.on_step_end(self)
        if step % self.steps_per_epoch == 0:
            for callback in parts.callbacks:
                callback.on_epoch_end(self)
        if step == self.total_steps or FINISH in actions:
            progress.finished = f"trainer.duration={self.config.trainer.duration} reached"
        asked = STOP in actions
        if progress.finished or LOG in actions or self._logs_at(step):
            self._log()
        if progress.finished or EVALUATE in actions or self._is_due(self.config.trainer.evaluate_every):
            progress.evaluation_due = "val" in parts.eval_loaders
        save = SAVE in actions or any(self._is_due(every) for every in self.config.checkpoint.every)
        if progress.evaluation_due and not asked:
            improved, asked = self._evaluate()
            save = save or improved
        if asked or (step == self.stop_step and not progress.finished):
            self._end("preempted", parts.control.reasons.get(STOP, f"trainer.stop_at={self.config.trainer.stop_at}"))
        elif progress.finished:
            self._end("completed", progress.finished)
        if save or self.outcome is not None:
            self._save()
        if parts.checkpoints is not None:
            parts.checkpoints.poll()

    def _resume_boundary(self) -> None:
        """What a stop left undone at this step, or an evaluation before the first."""
        progress = self.progress
        if self.step == 0 and self.config.trainer.evaluate_at_start and progress.evaluated_step < 0:
            progress.evaluation_due = "val" in self.parts.eval_loaders
        if progress.evaluation_due:
            improved, asked = self._evaluate()
            if asked:
                self._end("preempted", self.parts.control.reasons[STOP])
            if self.step and (improved or progress.finished or asked):
                self._save()
        if self.outcome is None and progress.finished is not None:
            self._end("completed", progress.finished)
        elif self.outcome is None and self.stop_step is not None and self.step >= self.stop_step:
            self._end("preempted", f"trainer.stop_at={self.config.trainer.stop_at}")

    def _end(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason

    def _evaluate(self) -> tuple[bool, bool]:
        """Evaluate on val; (the kept metric is better than ever, all ranks agreed to stop meanwhile)."""
        parts, progress = self.parts, self.progress
        self._check_finite()
        try:
            figures = parts.evaluator.run(parts.eval_loaders["val"])
        except EvaluationInterruptedError:
            return False, True
        progress.evaluation_due = False
        progress.evaluated_step = self.step
        here.phase = CALLBACK
        progress.metrics = metrics = {f"val/{name}": value for name, value in figures.items()}
        self._record("val", figures)
        parts.console.evaluation("val", self.step, figures)
        if parts.schedule is not None and parts.schedule.on_plateau:
            parts.schedule.step(metrics)
        for callback in parts.callbacks:
            callback.on_evaluation_end(self, metrics)
        if parts.stop_when is not None and self.step:
            progress.finished = progress.finished or parts.stop_when.judge(metrics, self.step)
        return self._improved(metrics), False

    def _improved(self, metrics: dict[str, float]) -> bool:
        if self.parts.keep_best is None or not self.step:
            return False
        name, mode = self.parts.keep_best
        value, best = metrics[name], self.progress.best
        better = value == value and (best is None or (value < best if mode == "min" else value > best))
        if better:
            self.progress.best, self.progress.best_step = value, self.step
        return better

    def _log(self) -> None:
        """A train row: the mean over the samples since the row before."""
        parts, progress = self.parts, self.progress
        here.phase = LOGGING
        self._check_finite()
        loss, weight = parts.stepper.totals.tolist()
        parts.stepper.totals.zero_()
        samples, began, waited = self._interval
        now = time.monotonic()
        elapsed = max(now - began, 1e-9)
        row: dict[str, float] = {"loss": loss / weight if weight else float("nan"), "lr": self._lr}
        if parts.stepper.grad_norm is not None:
            row["grad_norm"] = float(parts.stepper.grad_norm)
        if parts.stepper.guard.skipped:
            row["skipped"] = parts.stepper.guard.skipped
        row["samples_per_s"] = (progress.samples - samples) / elapsed
        row["data_wait"] = (parts.train_loader.waited - waited) / elapsed
        row.update(self.world.peers.pace())
        row.update(self._extra)
        self._extra.clear()
        self._interval = (progress.samples, now, parts.train_loader.waited)
        self._record("train", row)
        parts.console.progress(self.step, self.total_steps, self.epoch, row, self._seconds_left())
        slow = self.world.peers.slow_rank()
        if slow is not None:
            parts.console.warn(slow)
        if self.world.is_main and now - self._status_at > STATUS_SECONDS:
            self._status_at = now
            with self.parts.run.only_a_view():
                self.write_status("running")

    def _record(self, split: str, figures: dict[str, float]) -> None:
        if self.parts.checkpoints is not None:
            self.parts.checkpoints.assure_owner()
        self.parts.logger.row(split, self.step, self.epoch, self.progress.samples, figures)

    def bring_home(self) -> None:
        """What has been recorded so far is made as durable as the checkpoint that is about to be published (rank 0)."""
        self.parts.logger.flush(wait=0.0 if self.parts.run.storage.is_local else 5.0)
        self.parts.run.upload()

    def write_status(self, state: str, error: str | None = None) -> None:
        """status.json as it should be now (rank 0)."""
        self.parts.run.write_status(state, step=self.step, epoch=self.epoch, world_size=self.world.size, error=error)

    def _save(self) -> None:
        """Save a checkpoint of this step; all ranks call it, rank 0 writes."""
        parts, progress = self.parts, self.progress
        here.phase = MEETING
        self._check_finite()
        take_from_rank_zero(self.model.buffers(), self.world.size)
        here.phase = SAVING
        self._saved_step = self.step
        progress.seconds = self.seconds
        if parts.checkpoints is None:
            parts.run.upload_meanwhile()
            return
        states: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if parts.ema is not None:
            states["ema"] = parts.ema.state_dict()
        states["trainer"] = self._state()
        metrics = progress.metrics if progress.evaluated_step == self.step else None
        parts.checkpoints.save(self.step, states, self._meta(), metrics)

    def _state(self) -> dict[str, Any]:
        parts = self.parts
        return {
            "progress": asdict(self.progress),
            "stepper": parts.stepper.state_dict(),
            "schedule": parts.schedule.state_dict() if parts.schedule is not None else None,
            "stop_when": parts.stop_when.state_dict() if parts.stop_when is not None else None,
            "callbacks": [callback.state_dict() for callback in parts.callbacks],
        }

    def _meta(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "samples": self.progress.samples,
            "world_size": self.world.size,
            "plan": {"length": self.parts.plan.length, "fingerprint": self.parts.plan.fingerprint()},
            **self.parts.record,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `_state` gave (the progress itself was handed to the constructor)."""
        parts = self.parts
        parts.stepper.load_state_dict(state["stepper"])
        if parts.stop_when is not None and state["stop_when"] is not None:
            parts.stop_when.load_state_dict(state["stop_when"])
        for callback, saved in zip(parts.callbacks, state["callbacks"], strict=False):
            callback.load_state_dict(saved)

    def close(self) -> None:
        """End loader workers and files, whatever happened."""
        self.parts.train_loader.close()
        for loader in self.parts.eval_loaders.values():
            loader.close()
        if self.parts.trace is not None:
            self.parts.trace.close()

    def _check_finite(self) -> None:
        self.parts.stepper.guard.read()

    def _is_due(self, every: Duration | None) -> bool:
        return is_due(every, self.step, self.steps_per_epoch)

    def _logs_at(self, step: int) -> bool:
        return step == self.total_steps or is_due(self.config.trainer.log_every, step, self.steps_per_epoch)

    def _epochs(self) -> int | None:
        return None if self.total_steps is None else -(-self.total_steps // self.steps_per_epoch)

    def _seconds_left(self) -> float | None:
        duration = self.config.trainer.duration
        return max(0.0, duration.value - self.seconds) if duration.is_time else None

    def _watch_clocks(self) -> None:
        """Durations in time go by rank 0's clock, summed over all starts."""
        if not self.world.is_main:
            return
        trainer, sources = self.config.trainer, self.parts.control.sources
        for duration, action, key in (
            (trainer.duration, FINISH, "trainer.duration"),
            (trainer.stop_at, STOP, "trainer.stop_at"),
        ):
            if duration is not None and duration.is_time:
                sources.append(watch_clock(lambda: self.seconds, duration.value, None, action, f"{key}={duration}"))
        repeated = [(trainer.log_every, LOG), (trainer.evaluate_every, EVALUATE)]
        for every, action in repeated + [(every, SAVE) for every in self.config.checkpoint.every]:
            if every is not None and every.is_time:
                first = (self.seconds // every.value + 1) * every.value
                sources.append(watch_clock(lambda: self.seconds, first, every.value, action, f"every {every}"))
