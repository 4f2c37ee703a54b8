"""What each user would write by hand: a plain loop over the same samples, in the engine's documented arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from dist_train.data.plan import Plan
from dist_train.runtime.seeding import seed_augment, seed_forward, seed_sample

BATCH, MICRO, STEPS, CPU = 8, 4, 6, torch.device("cpu")


def plain_loop(
    build: Callable[[], nn.Module],
    data: Any,
    loss_of: Callable[[nn.Module, Any], tuple[Tensor, Any]],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    mix: Callable[[Tensor, Tensor], Any] | None = None,
    schedule_of: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
) -> tuple[nn.Module, list[float]]:
    """The model after six steps, and the loss of each; `loss_of` gives the sum over a micro-batch, and its weight."""
    torch.manual_seed(0)
    model = build().train()
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer) if schedule_of else None
    plan = Plan(0, 24, BATCH, shuffle=not isinstance(data, IterableDataset))
    samples, losses = read(data, plan), []
    for step in range(STEPS):
        indices, total, weight = plan.batch(step).tolist(), 0.0, 0.0
        for at in range(0, BATCH, MICRO):
            batch = collate([next(samples) for _ in range(MICRO)])
            if mix is not None:
                seed_augment(0, plan.epoch_of(step), indices[at], 0, CPU)
                batch = mix(*batch)
            seed_forward(0, step, at, CPU)
            loss, count = loss_of(model, batch)
            (loss * (1 / BATCH)).backward()
            total, weight = total + loss.item(), weight + float(count)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(BATCH / weight)
        if clip is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(total / weight)
    return model, losses


def read(data: Any, plan: Plan) -> Iterator[Any]:
    """The samples in the plan's order, each under its seed; a stream as it comes, again and again."""
    while isinstance(data, IterableDataset):
        yield from data
    for step in range(STEPS):
        for index in plan.batch(step).tolist():
            seed_sample(0, plan.epoch_of(step), index)
            yield data[index]
