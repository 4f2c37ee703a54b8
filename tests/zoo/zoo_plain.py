"""What each user would write by hand: a plain loop over the same samples, in the engine's documented arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from dist_train.data.plan import Plan
from dist_train.data.weights import Weights
from dist_train.runtime.seeding import seed_augment, seed_forward, seed_sample

LossOf = Callable[[Any, Any], tuple[Tensor, Any]]
BATCH, MICRO, STEPS, CPU = 8, 4, 6, torch.device("cpu")


def plain_loop(
    build: Callable[[], nn.Module],
    data: Any,
    loss_of: LossOf | list[LossOf],
    optimizer_of: Callable[[Any], Any],
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    mix: Callable[[Tensor, Tensor], Any] | None = None,
    schedule_of: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    balanced: bool = False,
) -> tuple[nn.Module, list[float]]:
    """The model after six steps, and the loss of each; `loss_of` gives the sum over a micro-batch, and its weight.

    With several of these and as many optimizers, each moves in every step, on the same batch and under the same seeds.
    """
    torch.manual_seed(0)
    model = build().train()
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer) if schedule_of else None
    moves = list(zip(loss_of, optimizer, strict=True)) if isinstance(loss_of, list) else [(loss_of, optimizer)]
    weights = Weights.of(1 / np.bincount(data.labels)[data.labels], 24) if balanced else None
    plan = Plan(0, 24, BATCH, shuffle=not isinstance(data, IterableDataset), weights=weights)
    samples, losses = read(data, plan), []
    for step in range(STEPS):
        indices, losses_here = plan.batch(step).tolist(), 0.0
        micros = [collate([next(samples) for _ in range(MICRO)]) for _ in range(0, BATCH, MICRO)]
        if mix is not None:
            micros = [mixed(mix, batch, plan.epoch_of(step), indices[k * MICRO]) for k, batch in enumerate(micros)]
        for one_loss, one_optimizer in moves:
            total, weight = 0.0, 0.0
            for k, batch in enumerate(micros):
                seed_forward(0, step, k * MICRO, CPU)
                loss, count = one_loss(model, batch)
                (loss * (1 / BATCH)).backward()
                total, weight = total + loss.item(), weight + float(count)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(BATCH / weight)
            if clip is not None:
                nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
            one_optimizer.step()
            model.zero_grad()
            losses_here += total / weight
        if schedule is not None:
            schedule.step()
        losses.append(losses_here)
    return model, losses


def mixed(mix: Callable[[Tensor, Tensor], Any], batch: Any, epoch: int, first: int) -> Any:
    """A micro-batch behind an augmentation of batches, seeded by its first sample."""
    seed_augment(0, epoch, first, 0, CPU)
    return mix(*batch)


def read(data: Any, plan: Plan) -> Iterator[Any]:
    """The samples in the plan's order, each under its seed; a stream as it comes, again and again."""
    while isinstance(data, IterableDataset):
        yield from data
    for step in range(STEPS):
        for k, index in enumerate(plan.batch(step).tolist()):
            place = (step * BATCH + k) % 24  # with weights a sample may be drawn twice, each time with draws of its own
            seed_sample(0, plan.epoch_of(step), index if plan.weights is None else place)
            yield data[index]
