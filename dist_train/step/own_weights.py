"""Named losses with denominators of their own: their global weights are known before the first backward of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.step.objective import Item, Objective, trainable
from dist_train.task.terms import Computed, combine, computed
from dist_train.watch.status import SYNC, status

if TYPE_CHECKING:
    from dist_train.data.loader import StepWork
    from dist_train.data.plan import MicroBatch


class OwnWeights(Objective):
    """The loss is the sum of factor * total / weight, each over the global batch.

    The task's `weights(batch)` gives the weights of a micro-batch; they are summed over the rank's micro-batches, which are all
    on the device by then, and by one all-reduce of a few numbers over the ranks.
    """

    def items(
        self, work: StepWork, prepare: Callable[[MicroBatch, StepWork], Any]
    ) -> Iterator[tuple[MicroBatch, Item]]:
        loaded = [(micro, prepare(micro, work)) for micro in work.micro_batches]
        given = [self._weights(batch) for micro, batch in loaded]
        names = sorted(given[0])
        device = next(self.modules.parameters()).device
        total = torch.zeros(len(names), dtype=torch.float64, device=device)
        for (micro, _), weights in zip(loaded, given, strict=True):
            if sorted(weights) != names:
                raise ValueError(
                    f"a task's weights(batch) gave {', '.join(names)} before, and now {', '.join(sorted(weights))}"
                )
            if not micro.zero_weight:
                numbers = [weights[name] for name in names]
                total += torch.stack([
                    number.detach().to(total) if isinstance(number, Tensor) else torch.full_like(total[0], number)
                    for number in numbers
                ])  # fmt: skip
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            status.phase = SYNC
            torch.distributed.all_reduce(total)
        # samples / weight: the step divides by the samples. A loss without weight in the whole batch is zero.
        scales = (work.samples / total).nan_to_num(posinf=0.0, nan=0.0).unbind()
        for (micro, batch), weights in zip(loaded, given, strict=True):
            yield micro, (batch, micro.samples, dict(zip(names, scales, strict=True)), weights)

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
        return trainable(combine(output.terms, scales, samples, output.outputs, output.targets))
