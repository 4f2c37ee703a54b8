"""Learning rate schedules beyond torch's own."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """A linear warm-up to the lr over `warmup_steps`, then half a cosine down to `final_scale` of it at `total_steps`.

    A run shorter than the warm-up ends inside it. Steps are those of `scheduler.every`, by default optimizer steps. The shape
    is SGDR's first cycle (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983) after the warm-up of Goyal et al. 2017
    (https://arxiv.org/abs/1706.02677).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, final_scale: float = 0.0
    ):
        if warmup_steps < 0 or total_steps < 1:
            raise ValueError(f"expected warmup_steps >= 0 and total_steps >= 1, got {warmup_steps} and {total_steps}")
        if not 0 <= final_scale <= 1:
            raise ValueError(f"expected final_scale between 0 and 1 (a share of the lr), got {final_scale}")

        def scale(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_scale + (1 - final_scale) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, scale)
