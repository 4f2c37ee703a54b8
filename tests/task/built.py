"""Metrics built from the entries of a config, as a run builds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_train.config.load import load_config
from dist_train.config.slots import require_components
from dist_train.task.entries import MetricEntry, build_metric, check_entries
from dist_train.task.losses import Loss

CONFIG = {
    "data": {"train": torch.utils.data.TensorDataset(torch.zeros(1))},
    "model": {"_target_": "torch.nn.Identity"},
    "loss": {"_target_": "torch.nn.MSELoss"},
    "optimizer": {"_target_": "torch.optim.SGD"},
}


def entries(*specs: Any, loss: Any = None) -> list[MetricEntry]:
    """The entries of `metrics`, checked and built for a loss, or for a task."""
    config = load_config({**CONFIG, "metrics": list(specs)})
    require_components(config)
    function = Loss(loss).function if isinstance(loss, nn.Module) else loss
    built = [build_metric(entry, function, f"metrics.{k}") for k, entry in enumerate(config.metrics)]
    check_entries(built)
    return built


def values(entry: MetricEntry, outputs: Any, targets: Any, classes: Sequence[str] = ()) -> dict[str, float]:
    """What it is over the samples of tensors, which it gets in three batches."""
    batches = [(outputs[part], targets[part]) for part in (slice(0, 1), slice(1, 40), slice(40, None))]
    if entry.whole is not None:
        for batch in batches:
            entry.update(*batch)
        return entry.results(torch.zeros(0, dtype=torch.float64), classes)
    if entry.size is None:
        entry.settle(entry.classes_in(*batches[0]))
    sums = [entry.sums(*batch) for batch in batches]
    assert all(part.dtype == torch.float64 and part.shape == (entry.size,) for part in sums)
    return entry.results(torch.stack(sums).sum(0), classes)
