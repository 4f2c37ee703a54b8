"""`trainer.train_metrics`: metrics of the training batches.

Their sums are added up on the device and reduced over the ranks with the loss, which every step reduces anyway: no wait for the
device, no collective more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_train.config.errors import ConfigError, did_you_mean
from dist_train.task.batch import in_full_precision
from dist_train.task.entries import MetricEntry
from dist_train.task.task import SeveralLosses, WholeBatchTask
from dist_train.task.terms import Computed, computed

KEY = "trainer.train_metrics"


def counted_entries(names: Sequence[str], entries: Sequence[MetricEntry], task: Any) -> list[MetricEntry]:
    """Those of `metrics` that are computed of training batches too.

    Raises:
        ConfigError: there is none of that name, or it can't be added up over batches; or the task's losses aren't reduced so.
    """
    known = {entry.name: entry for entry in entries}
    for name in names:
        if name not in known:
            guess = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'}"
            raise ConfigError.single(KEY, f"{name} is none of `metrics`{guess}")
        if not known[name].size:
            why = (
                "must see all outputs at once"
                if known[name].whole is not None
                else "learns its classes in an evaluation"
            )
            raise ConfigError.single(
                KEY, f"{name} {why}, so that it can't be added up over training steps: leave it to the evaluation"
            )
    own_weights = callable(getattr(task, "weights", None))
    if names and (own_weights or isinstance(task, WholeBatchTask | SeveralLosses)):
        raise ConfigError.single(
            KEY,
            f"isn't supported with {type(task).__name__}: its losses are weighted by themselves; evaluate on `data.val`",
        )
    return [known[name] for name in dict.fromkeys(names)]


class Counting:
    """A task whose steps give the sums of metrics as well; everything else is the task's.

    Attributes:
        size: of the sums. pairs: how many (sum, weight) pairs they take in what is reduced.
    """

    def __init__(self, task: Any, entries: Sequence[MetricEntry]):
        self.task, self.entries = task, entries
        self.size = sum(entry.size or 0 for entry in entries)
        self.pairs = -(-self.size // 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def step(self, model: Any, batch: Any) -> Computed:
        """As the task's. Raises TypeError: it gives no outputs."""
        output = computed(self.task.step(model, batch))
        if output.outputs is None:
            raise TypeError(f"{KEY} needs the outputs: the task's step must return (loss, weight, outputs, targets)")
        device = output.loss.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            outputs = in_full_precision(output.outputs)
            sums = [entry.sums(outputs, output.targets).to(device) for entry in self.entries]
            if self.size % 2:
                sums.append(sums[0].new_zeros(1))
            output.counts = torch.cat(sums)
        return output

    def results(self, pairs: Sequence[Sequence[float]]) -> dict[str, float]:
        """The metrics, by their names in the records, from the sums over several steps."""
        sums = torch.tensor(pairs, dtype=torch.float64).flatten()
        found: dict[str, float] = {}
        for entry in self.entries:
            part, sums = sums.split([entry.size or 0, len(sums) - (entry.size or 0)])
            found |= entry.results(part)
        return found


def pairs_of(task: Any) -> int:
    """How many pairs the metrics of a task's training batches take; 0 without any."""
    return task.pairs if isinstance(task, Counting) else 0
