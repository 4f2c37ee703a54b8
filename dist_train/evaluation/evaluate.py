"""Evaluation: every sample once, on any number of processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_train.data.reading import attribute_of
from dist_train.models.layers import evaluating
from dist_train.objective.modules import BufferSnapshot
from dist_train.objective.objective import term_sums
from dist_train.runtime.seeding import seed_forward
from dist_train.runtime.world import gather_rows
from dist_train.task.batch import in_full_precision, map_tensors
from dist_train.task.entries import check_names
from dist_train.task.task import Supervised, evaluated
from dist_train.task.terms import Computed, mean_of
from dist_train.watch.status import EVALUATION, SYNC, status

if TYPE_CHECKING:
    from dist_train.building.model import ModelParts
    from dist_train.data.loader import EvalLoader
    from dist_train.data.plan import EvalPlan
    from dist_train.optim.ema import EMA
    from dist_train.runtime.world import World
    from dist_train.watch.control import Control

FIRST = 3  # sums before those of the metrics: loss, weight, samples


class Losses(NamedTuple):
    """The named losses of an evaluation with their factors in the total; see `Computed.shared`."""

    factors: dict[str, float]
    shared: bool = True


class EvaluationInterruptedError(Exception):
    """All ranks agreed to stop inside an evaluation: its sums are dropped, and a resumed run evaluates again."""


def in_rounds(loader: EvalLoader, control: Control | None = None) -> Iterator[tuple[range, Any] | None]:
    """This rank's eval batches with the samples they hold; None in a last round without one: all ranks run the same number."""
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


class _Sums:
    """Float64 sums over the eval batches of all ranks, in the order of the dataset: the bits are those of one process.

    Each eval batch has a row, unless there are more than 64 sums (a metric with many usually counts: exact in any order).

    Args:
        ordered: of more, too, each round's are gathered and added in order.
    """

    def __init__(self, size: int, plan: EvalPlan, world: World, *, ordered: bool):
        self.plan, self.world, self.round = plan, world, 0
        rows = len(plan) if size <= 64 else 1
        self.rows = torch.zeros(rows, size, dtype=torch.float64, device=world.device)
        self.gathers = ordered and rows == 1 and world.size > 1

    def add(self, samples: range | None, sums: Tensor | None) -> None:
        """Those of this rank's eval batch of these samples; None where it has none in this round."""
        if self.gathers:
            last = len(self.plan) - self.round * self.world.size
            mine = self.rows.new_zeros(0, self.rows.shape[1]) if sums is None else sums[None]
            for row in gather_rows(mine, [int(rank < last) for rank in range(self.world.size)], self.world):
                self.rows[0] += row
        elif samples is not None and sums is not None:
            self.rows[samples.start // self.plan.batch_size % len(self.rows)] += sums
        self.round += 1

    def total(self) -> Tensor:
        """(size,), on the CPU; all ranks call it."""
        if self.world.size > 1 and not self.gathers:
            torch.distributed.all_reduce(self.rows)
        return torch.from_numpy(self.rows.cpu().numpy().sum(axis=0))


class Evaluator:
    """Runs the module itself, without the DDP wrapper, over fixed eval batches; sums in float64, one all-reduce.

    Args:
        ema: its weights are evaluated, and the raw ones beside them; None: the model's own.
    """

    def __init__(self, parts: ModelParts, ema: EMA | None = None):
        self.modules, self.task, self.metrics = parts.modules, parts.task, parts.metrics
        self.model, self.world, self.precision = parts.model, parts.world, parts.precision
        self.prepare, self.seed, self.ema = parts.move, parts.config.seed, ema
        self.ordered = parts.config.distributed.reproducibility == "bitwise"
        # Which losses the task gives, once a rank knows, and whether all know it. torch's own give one.
        self._agreed = isinstance(parts.task, Supervised) and parts.task.val_loss.exact is True
        self._losses = Losses({}) if self._agreed else None

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
        self.modules.broadcast_buffers(self.world)
        whole = [entry for entry in self.metrics if entry.whole is not None]
        for entry in whole:
            entry.reset()
        sums = None
        for mine in in_rounds(loader, control):
            output = self.forward(*mine) if mine is not None else None
            if sums is None:  # the first round, in which rank 0 always has a batch
                self._settle(output)
                sums = _Sums(self.size, loader.plan, self.world, ordered=self.ordered)
            if mine is None or output is None:
                sums.add(None, None)
            else:
                sums.add(mine[0], self.sums(output, len(mine[0])))
            seen = self.seen(output) if whole and output is not None else None
            for outputs, targets in filter(None, on_rank_zero(self.world, seen) if whole else []):
                for entry in whole:
                    entry.update(outputs, targets)
            if control is not None and control.stop_due():
                raise EvaluationInterruptedError
            output = None  # its memory is free for the next forward
        assert sums is not None
        status.phase = SYNC
        return self._results(sums.total(), class_names(loader.dataset))

    @property
    def size(self) -> int:
        """How many numbers an evaluation adds up."""
        assert self._losses is not None
        return FIRST + 2 * len(self._losses.factors) + sum(entry.size or 0 for entry in self.metrics)

    def forward(self, samples: range, batch: Any) -> Computed:
        """What the task gives for an eval batch; its outputs in full precision."""
        batch = self.prepare(batch)
        seed_forward(self.seed, 0, samples.start, self.world.device)
        with self.precision.autocast():
            output = evaluated(self.task, self.model, batch)
        losses = Losses({name: term.factor for name, term in output.terms.items()}, output.shared)
        if self._losses is not None and losses.factors.keys() != self._losses.factors.keys():
            before, now = (", ".join(one.factors) or "one" for one in (self._losses, losses))
            raise ValueError(
                f"the task gave the losses {before} before, and {now} in this eval batch: give the same ones for each"
            )
        self._losses = losses  # factors may change in the course of a run
        if self.metrics and output.outputs is None:
            raise TypeError("metrics need the outputs: the task's step must return (loss, weight, outputs, targets)")
        return replace(output, outputs=in_full_precision(output.outputs))

    def sums(self, output: Computed, samples: int) -> Tensor:
        """What an eval batch adds to the sums."""
        head = torch.zeros(FIRST, dtype=torch.float64, device=self.world.device)
        head[0], head[1], head[2] = output.loss, output.weight, samples
        summed = [entry for entry in self.metrics if entry.whole is None]
        parts = [entry.sums(output.outputs, output.targets) for entry in summed]
        if output.terms:
            parts.insert(0, term_sums(output, head.device).view(-1))
        return torch.cat([head, *(part.to(head.device) for part in parts)])

    def seen(self, output: Computed) -> tuple[Any, Any]:
        """Outputs and targets of an eval batch for metrics that can't be summed, on the CPU."""
        outputs, targets = map_tensors(Tensor.cpu, (output.outputs, output.targets))
        return outputs, targets

    def _settle(self, output: Computed | None) -> None:
        """All ranks learn from rank 0's first outputs which losses there are, and how many classes where a metric needs that; of
        losses with denominators of their own, in each evaluation, the factors."""
        unknown = [entry for entry in self.metrics if entry.size is None]
        if unknown or not self._agreed or not (self._losses is None or self._losses.shared):
            seen = [] if output is None else [entry.classes_in(output.outputs, output.targets) for entry in unknown]
            losses, found = self.world.broadcast((self._losses, seen))
            self._losses, self._agreed = Losses(*losses), True
            for entry, classes in zip(unknown, found, strict=True):
                entry.settle(classes)

    def _results(self, sums: Tensor, classes: Sequence[str] = ()) -> dict[str, float]:
        loss, weight, samples = sums[:FIRST].tolist()
        assert self._losses is not None
        factors, shared = self._losses
        start = FIRST + 2 * len(factors)
        pairs = sums[FIRST:start].view(-1, 2).tolist()
        terms = {name: total / part if part else math.nan for name, (total, part) in zip(factors, pairs, strict=True)}
        mean = loss / weight if weight else math.nan
        if not shared:
            mean = mean_of(factors.values(), pairs)
        results: dict[str, float] = {}
        names: list[str] = []
        for entry in self.metrics:
            part = sums[start : start + (entry.size or 0)]
            if entry.whole is not None:
                found = self.world.on_main(partial(entry.results, part, classes))
            else:
                found = entry.results(part, classes)
            results |= found
            names += found
            start += len(part)
        check_names(names)
        losses = {"loss": mean, **{f"loss/{name}": value for name, value in terms.items()}}
        return {**losses, **results, "eval_samples": int(samples)}


def class_names(dataset: Any) -> tuple[str, ...]:
    """The names of a dataset's classes: its attribute `classes`, if it is a list; () without one."""
    names = attribute_of(dataset, "classes")
    return tuple(map(str, names)) if isinstance(names, list | tuple | np.ndarray) else ()
