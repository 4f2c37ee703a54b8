"""`trainer.profile`: a trace of some steps by torch's profiler, for Perfetto and TensorBoard's profiler plugin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.training.callbacks import Callback
from dist_train.training.due import NEVER, Due

if TYPE_CHECKING:
    from dist_train.config.schema_tracking import ProfileConfig
    from dist_train.training.callbacks import Training

FOLDER = "profile"


class Profile(Callback):
    """Traces the steps first..last of the run, as rows count them, on rank 0: its operators, and its kernels on a GPU.

    In the trace each step is `ProfilerStep#N`, with its batch's reading, forward, backward and optimizer, and what is due after
    it (evaluation, save); after a stop by a signal the last one holds a save only. A start in the middle of the steps traces
    the rest. Tracing changes no result; it slows these steps.

    Args:
        folder: the run's directory on this host.
        note, warn: print a line.
    """

    def __init__(
        self, config: ProfileConfig, folder: Path, note: Callable[[str], object], warn: Callable[[str], object]
    ):
        self.first, self.last = config.steps
        self._folder, self._note, self._warn = folder / FOLDER, note, warn
        self._profiler: Any = None
        self._begun: int | None = None  # the first step of the trace
        self._step = contextlib.ExitStack()
        self._end = NEVER  # the last step of this start, where it is known

    def on_start(self, trainer: Training) -> None:
        """Say what won't be traced, and begin where the first step of this start is one of them."""
        due, steps = Due(trainer.config, trainer.plan.steps_per_epoch), f"{self.first} to {self.last}"
        self._end = min((step for step in (due.end, due.stop) if step is not None), default=NEVER)
        if trainer.step >= self.last:
            self._warn(f"trainer.profile: steps {steps} are over, this start resumes after step {trainer.step}")
        elif due.end is not None and due.end < self.first:
            self._warn(f"trainer.profile: steps {steps} are never reached, the run ends at step {due.end}")
        else:
            self._advance(trainer)

    def on_step_end(self, trainer: Training) -> None:
        """Begin or end the trace where it is time, and mark the next step."""
        if self.first - 2 <= trainer.step <= self.last:  # two comparisons in all other steps
            self._advance(trainer)

    def on_end(self, trainer: Training) -> None:
        """Write what there is of a trace that the end has cut short."""
        if self._profiler is not None:
            self._finish(trainer)

    def _advance(self, trainer: Training) -> None:
        from torch.profiler import record_function

        step = trainer.step
        self._step.close()
        if step >= self.last:
            if self._profiler is not None:
                self._finish(trainer)
            return
        if self._profiler is None and step >= self.first - 2:
            self._profiler = _profiler(trainer.world.device.type)
            self._profiler.prepare_trace()  # a step ahead, if there is one: on a GPU it takes a while
        if self._profiler is not None and self.first - 1 <= step < self._end:
            if self._begun is None:
                self._begun = step + 1
                self._profiler.start_trace()
            self._step.enter_context(record_function(f"ProfilerStep#{step + 1}"))

    def _finish(self, trainer: Training) -> None:
        """Write the trace; a failure is no reason to end a run."""
        profiler, self._profiler = self._profiler, None
        if self._begun is None:
            self._warn(f"trainer.profile: training ended at step {trainer.step}, before step {self.first}")
            return
        path = self._folder / f"rank-{trainer.world.rank}-steps-{self._begun}-{trainer.step}.pt.trace.json.gz"
        try:
            profiler.stop_trace()
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except Exception as error:
            self._warn(f"trainer.profile: no trace could be written: {type(error).__name__}: {error}")
            return
        self._note(
            f"profile of steps {self._begun} to {trainer.step}: {path} (open it in https://ui.perfetto.dev, or with "
            "TensorBoard's profiler plugin)"
        )


def _profiler(device: str) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    return profile(activities=activities, record_shapes=True)
