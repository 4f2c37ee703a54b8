"""Evaluation that counts every sample once, on any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dist_train.models.layers import evaluating
from dist_train.runtime.seeding import seed_forward
from dist_train.step.buffers import BufferSnapshot, take_from_rank_zero
from dist_train.step.modules import Modules
from dist_train.step.precision import Precision
from dist_train.task.batch import in_full_precision, map_tensors
from dist_train.task.metrics import Metric, Whole, check_names, naming, sums_of
from dist_train.task.task import Task, as_step_output
from dist_train.watch.status import EVALUATION, SYNC, status

if TYPE_CHECKING:
    from dist_train.data.loader import EvalLoader
    from dist_train.runtime.world import World
    from dist_train.step.ema import EMA
    from dist_train.watch.control import Control


class EvaluationInterruptedError(Exception):
    """A stop was agreed inside an evaluation: it is dropped, and run again after the resume."""


def in_rounds(loader: EvalLoader, control: Control | None = None) -> Iterator[tuple[range, Any] | None]:
    """This rank's cuts of a dataset with their batches; None for a last round without one, so that all ranks have as many."""
    batches = iter(loader)
    for _ in range(loader.rounds):
        if control is not None:
            control.begin()
        status.phase, status.item = EVALUATION, status.item + 1
        yield next(batches, None)


def on_rank_zero(world: World, value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on rank 0; nothing on the others. Every rank calls it."""
    if world.size == 1:
        return [value]
    every: list[Any] = [None] * world.size
    status.phase = SYNC
    torch.distributed.gather_object(value, every if world.is_main else None, dst=0)
    return every if world.is_main else []


class Evaluator:
    """Runs the module itself, without the DDP wrapper, over fixed cuts of a dataset; sums in float64, one all-reduce."""

    def __init__(
        self,
        modules: Modules,
        task: Task,
        metrics: Sequence[Metric],
        *,
        world: World,
        precision: Precision,
        prepare: Callable[[Any], Any],
        seed: int,
        ema: EMA | None = None,
        control: Control | None = None,
    ):
        self.modules, self.task, self.metrics = modules, task, list(metrics)
        self.model = modules.model
        self.world, self.precision, self.prepare = world, precision, prepare
        self.seed, self.ema, self.control = seed, ema, control

    def run(self, loader: EvalLoader) -> dict[str, float]:
        """loss, the metrics, and `eval_samples`, the number of samples, as the plan counts them.

        Where there is an EMA the figures are those of its weights, and those of the raw weights follow as `raw_*`.

        Raises:
            EvaluationInterruptedError: all ranks agreed to stop between two rounds of it.
        """
        with self.serving():
            figures = self._run(loader)
        if self.ema is None:
            return figures
        samples = figures.pop("eval_samples")
        with self.serving(average=False):
            raw = {f"raw_{name}": value for name, value in self._run(loader).items() if name != "eval_samples"}
        return {**figures, **raw, "eval_samples": samples}

    @contextlib.contextmanager
    def serving(self, average: bool = True) -> Iterator[None]:
        """The model as it is used after training: in eval mode, with the average of the weights where there is one.

        Afterwards modes, buffers and numbers are what they were, so that training goes on as if nothing had been.
        """
        kept = BufferSnapshot(self.modules)
        averaged = self.ema.applied() if self.ema is not None and average else contextlib.nullcontext()
        try:
            with evaluating(self.modules), averaged, torch.no_grad():
                yield
        finally:
            kept.restore()

    def _run(self, loader: EvalLoader) -> dict[str, float]:
        status.phase = SYNC
        take_from_rank_zero((slot.value for slot in self.modules.buffers_at), self.world)
        size = 3 + sum(metric.size for metric in self.metrics)
        whole = [metric for metric in self.metrics if isinstance(metric, Whole)]
        for metric in whole:
            metric.metric.reset()
        # A row a cut, added up in the order of the dataset: the bits are those of one process. (Metrics of many numbers count.)
        rows = len(loader.plan) if size <= 64 else 1
        sums = torch.zeros(rows, size, dtype=torch.float64, device=self.world.device)
        for mine in in_rounds(loader, self.control):
            seen = None
            if mine is not None:
                cut, batch = mine
                row, seen = self._batch(cut, batch)
                sums[cut.start // loader.plan.batch_size % rows] += row
            for outputs, targets in filter(None, on_rank_zero(self.world, seen) if whole else []):
                for metric in whole:
                    with naming(metric):
                        metric.update(outputs, targets)
            if self.control is not None and self.control.stop_due():
                raise EvaluationInterruptedError
        status.phase = SYNC
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        return self._figures(torch.from_numpy(sums.cpu().numpy().sum(axis=0)))

    def _batch(self, cut: range, batch: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """What a cut adds to the sums, and its outputs and targets for the metrics that aren't sums."""
        batch = self.prepare(batch)
        seed_forward(self.seed, 0, cut.start, self.world.device)
        with self.precision.autocast():
            output = as_step_output(self.task.step(self.model, batch))
        if self.metrics and output.outputs is None:
            raise TypeError("metrics need the outputs: the task's step must return (loss, weight, outputs, targets)")
        head = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        head[0], head[1], head[2] = output.loss, output.weight, len(cut)
        outputs = in_full_precision(output.outputs)
        sums = [sums_of(metric, outputs, output.targets) for metric in self.metrics if not isinstance(metric, Whole)]
        seen = (outputs, output.targets) if len(sums) < len(self.metrics) else ()
        return torch.cat([head, *(part.to(head.device) for part in sums)]), map_tensors(torch.Tensor.cpu, seen)

    def _figures(self, sums: torch.Tensor) -> dict[str, float]:
        loss, weight, samples = sums[:3].tolist()
        figures: dict[str, float] = {}
        names: list[str] = []
        start = 3
        for metric in self.metrics:
            with naming(metric):
                if isinstance(metric, Whole):
                    found = self.world.on_main(metric.figures)
                else:
                    found = {metric.name: float(metric.result(sums[start : start + metric.size]))}
            figures |= found
            names += found
            start += metric.size
        check_names(names)
        return {"loss": loss / weight if weight else float("nan"), **figures, "eval_samples": int(samples)}
