"""Evaluation that counts every sample once, on any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from dist_train.models.layers import evaluating
from dist_train.runtime.seeding import seed_forward
from dist_train.step.buffers import BufferSnapshot, take_from_rank_zero
from dist_train.task.batch import in_full_precision, map_tensors
from dist_train.task.metrics import Whole, check_names, naming, sums_of
from dist_train.task.task import as_step_output
from dist_train.watch.status import EVALUATION, SYNC, status

if TYPE_CHECKING:
    from dist_train.data.loader import EvalLoader
    from dist_train.runtime.world import World
    from dist_train.step.ema import EMA
    from dist_train.training.model import ModelParts
    from dist_train.watch.control import Control

FIRST = 3  # sums before those of the metrics: loss, weight, samples


class EvaluationInterruptedError(Exception):
    """All ranks agreed to stop inside an evaluation: its sums are dropped, and a resumed run evaluates again."""


def in_rounds(loader: EvalLoader, control: Control | None = None) -> Iterator[tuple[range, Any] | None]:
    """This rank's eval batches with the samples they hold; None for a last round without one, so that all ranks run as many."""
    batches = iter(loader)
    for _ in range(loader.rounds):
        if control is not None:
            control.begin()
        status.phase, status.item = EVALUATION, status.item + 1
        yield next(batches, None)


def on_rank_zero(world: World, value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on rank 0; [] on the others. All ranks call it."""
    if world.size == 1:
        return [value]
    every: list[Any] = [None] * world.size
    status.phase = SYNC
    torch.distributed.gather_object(value, every if world.is_main else None, dst=0)
    return every if world.is_main else []


class Evaluator:
    """Runs the module itself, without the DDP wrapper, over fixed eval batches; sums in float64, one all-reduce.

    Args:
        ema: its weights are evaluated, and the raw ones beside them; None: the model's own.
    """

    def __init__(self, parts: ModelParts, ema: EMA | None = None):
        self.modules, self.task, self.metrics = parts.modules, parts.task, parts.metrics
        self.model, self.world, self.precision = parts.model, parts.world, parts.precision
        self.prepare, self.seed, self.ema = parts.move, parts.config.seed, ema

    def run(self, loader: EvalLoader, control: Control | None = None) -> dict[str, float]:
        """loss, the metrics, and `eval_samples`: how many samples were evaluated.

        With an EMA the metrics are those of its weights; those of the raw weights follow as `raw_*`.

        Args:
            control: asked after each round whether all ranks have agreed to stop.

        Raises:
            EvaluationInterruptedError: they have.
        """
        with self.serving():
            metrics = self._run(loader, control)
        if self.ema is None:
            return metrics
        samples = metrics.pop("eval_samples")
        with self.serving(ema=False):
            raw = {f"raw_{name}": value for name, value in self._run(loader, control).items() if name != "eval_samples"}
        return {**metrics, **raw, "eval_samples": samples}

    @contextlib.contextmanager
    def serving(self, ema: bool = True) -> Iterator[None]:
        """The model as it is used after training: in eval mode, without gradients, with the EMA weights where there are any.

        Modes, buffers and numbers are restored afterwards, so that training isn't affected.
        """
        kept = BufferSnapshot(self.modules)
        averaged = self.ema.applied() if self.ema is not None and ema else contextlib.nullcontext()
        try:
            with evaluating(self.modules), averaged, torch.no_grad():
                yield
        finally:
            kept.restore()

    def _run(self, loader: EvalLoader, control: Control | None) -> dict[str, float]:
        status.phase = SYNC
        take_from_rank_zero((slot.value for slot in self.modules.buffers_at), self.world)
        size = FIRST + sum(metric.size for metric in self.metrics)
        whole = [metric for metric in self.metrics if isinstance(metric, Whole)]
        for metric in whole:
            metric.metric.reset()
        # A row for each eval batch, added up in the order of the dataset: the bits are those of one process. (Metrics with
        # many sums are counts, which are exact in any order.)
        rows = len(loader.plan) if size <= 64 else 1
        sums = torch.zeros(rows, size, dtype=torch.float64, device=self.world.device)
        for mine in in_rounds(loader, control):
            seen = None
            if mine is not None:
                samples, batch = mine
                row, seen = self._batch(samples, batch)
                sums[samples.start // loader.plan.batch_size % rows] += row
            for outputs, targets in filter(None, on_rank_zero(self.world, seen) if whole else []):
                for metric in whole:
                    with naming(metric):
                        metric.update(outputs, targets)
            if control is not None and control.stop_due():
                raise EvaluationInterruptedError
        status.phase = SYNC
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        return self._results(torch.from_numpy(sums.cpu().numpy().sum(axis=0)))

    def _batch(self, samples: range, batch: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """What an eval batch adds to the sums, and its outputs and targets for metrics that can't be summed."""
        batch = self.prepare(batch)
        seed_forward(self.seed, 0, samples.start, self.world.device)
        with self.precision.autocast():
            output = as_step_output(self.task.step(self.model, batch))
        if self.metrics and output.outputs is None:
            raise TypeError("metrics need the outputs: the task's step must return (loss, weight, outputs, targets)")
        head = torch.zeros(FIRST, dtype=torch.float64, device=self.world.device)
        head[0], head[1], head[2] = output.loss, output.weight, len(samples)
        outputs = in_full_precision(output.outputs)
        sums = [sums_of(metric, outputs, output.targets) for metric in self.metrics if not isinstance(metric, Whole)]
        seen = (outputs, output.targets) if len(sums) < len(self.metrics) else ()
        return torch.cat([head, *(part.to(head.device) for part in sums)]), map_tensors(torch.Tensor.cpu, seen)

    def _results(self, sums: torch.Tensor) -> dict[str, float]:
        loss, weight, samples = sums[:FIRST].tolist()
        results: dict[str, float] = {}
        names: list[str] = []
        start = FIRST
        for metric in self.metrics:
            with naming(metric):
                if isinstance(metric, Whole):
                    found = self.world.on_main(metric.figures)
                else:
                    found = {metric.name: float(metric.result(sums[start : start + metric.size]))}
            results |= found
            names += found
            start += metric.size
        check_names(names)
        return {"loss": loss / weight if weight else float("nan"), **results, "eval_samples": int(samples)}
