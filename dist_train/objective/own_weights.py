"""Named losses with denominators of their own: their global weights are known before the first backward of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.objective.objective import Item, Objective, trainable
from dist_train.runtime.world import gather_rows
from dist_train.task.terms import Computed, combine, computed
from dist_train.watch.status import SYNC, status

if TYPE_CHECKING:
    from dist_train.data.plan import MicroBatch, StepWork
    from dist_train.objective.modules import Modules
    from dist_train.objective.precision import Precision
    from dist_train.runtime.world import World
    from dist_train.task.task import Task


class OwnWeights(Objective):
    """The loss is the sum of factor * total / weight, each over the global batch.

    The task's `weights(batch)` gives the weights of a micro-batch. They are gathered from all ranks, a few numbers for each
    micro-batch, all of which are on the device by then, and summed in the order of the global batch.

    Args:
        counts: of the samples of a step, how many micro-batches with weight each rank has.
    """

    def __init__(
        self,
        modules: Modules,
        task: Task,
        precision: Precision,
        scaler: torch.amp.GradScaler | None,
        world: World,
        counts: Callable[[int], list[int]],
    ):
        super().__init__(modules, task, precision, scaler, world.size)
        self.world, self.counts = world, counts

    def items(
        self, work: StepWork, prepare: Callable[[MicroBatch, StepWork], Any]
    ) -> Iterator[tuple[MicroBatch, Item]]:
        loaded = [(micro, prepare(micro, work)) for micro in work.micro_batches]
        given = [self._weights(batch) for micro, batch in loaded]
        names = sorted(given[0])
        rows = []
        for (micro, _), weights in zip(loaded, given, strict=True):
            if sorted(weights) != names:
                raise ValueError(
                    f"a task's weights(batch) gave {', '.join(names)} before, and now {', '.join(sorted(weights))}"
                )
            if not micro.zero_weight:
                rows.append(torch.stack([self._number(weights[name]) for name in names]))
        mine = torch.stack(rows) if rows else self._number(0.0).expand(0, len(names))
        if self.world.size > 1:
            status.phase = SYNC
            mine = gather_rows(mine, self.counts(work.samples), self.world)
        total = mine.sum(0)
        # samples / weight: the step divides by the samples. A loss without weight in the whole batch is zero.
        scales = (work.samples / total).nan_to_num(posinf=0.0, nan=0.0).unbind()
        for (micro, batch), weights in zip(loaded, given, strict=True):
            yield micro, (batch, micro.samples, dict(zip(names, scales, strict=True)), weights)

    def _number(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self.world.device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.world.device)

    def _weights(self, batch: Any) -> dict[str, Any]:
        weights = self.task.weights(batch)  # type: ignore[attr-defined]
        if not isinstance(weights, dict) or not weights:
            raise TypeError(
                "a task's weights(batch) must return a dict of numbers or 0-dim tensors by the losses' names, found "
                f"{type(weights).__name__}"
            )
        return weights

    def forward(self, item: Item) -> Computed:
        batch, samples, scales, weights = item
        with self.precision.autocast():
            output = computed(self.task.step(self.model, batch))
        if output.terms.keys() != scales.keys():
            raise ValueError(
                f"a task's weights(batch) gave those of {', '.join(scales)}, but its step the losses {', '.join(output.terms)}: "
                "expected the same names"
            )
        if self.terms is None:  # the first forward: it waits for the device
            for name, term in output.terms.items():
                if float(term.weight) != float(weights[name]):
                    raise ValueError(
                        f"a task's weights(batch) gave {float(weights[name]):g} for {name}, but its step {float(term.weight):g}: "
                        "both must be what the sum is divided by"
                    )
        self.same_terms(output)
        self.factors = [term.factor for term in output.terms.values()]
        return trainable(combine(output.terms, scales, samples, output.outputs, output.targets))
