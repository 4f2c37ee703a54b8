"""Which precision the forward runs in, and the loss scale that fp16 needs."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dist_train.runtime.world import World


@dataclass(frozen=True)
class Precision:
    """A resolved precision: `fp32`, `bf16` or `fp16`; weights and gradients keep the model's dtype (usually float32)."""

    name: str
    device_type: str
    note: str | None = None

    def autocast(self) -> Any:
        """The context that the forward runs in."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=torch.bfloat16 if self.name == "bf16" else torch.float16)

    def scaler(self) -> torch.amp.GradScaler | None:
        """A GradScaler for fp16, else None."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None


def common_precision(mine: Precision, world: World) -> Precision:
    """What all ranks run in: the best that every rank's device supports. Every rank calls it."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    ranks = world.all_gather([mine.name, device])
    names = [name for name, _ in ranks]
    if len({*names}) == 1:
        return mine
    least = min(names, key=("fp32", "fp16", "bf16").index)
    would = ", ".join(f"rank {rank} ({device}) {name}" for rank, (name, device) in enumerate(ranks))
    return Precision(least, mine.device_type, f"unequal devices: {would}; all use {least}")


def resolve_precision(choice: str, device: torch.device) -> Precision:
    """`auto` is what accelerate's launcher asks for, else bf16 from compute capability 8.0, fp16 on 7.x, fp32 elsewhere.

    A choice in the config wins over accelerate's; a contradiction becomes a note.
    """
    asked = {"bf16": "bf16", "fp16": "fp16", "no": "fp32"}.get(os.environ.get("ACCELERATE_MIXED_PRECISION", ""))
    if choice != "auto":
        note = f"accelerate asks for mixed precision {asked}, trainer.precision says {choice}: {choice} is used"
        return Precision(choice, device.type, note if asked not in (None, choice) else None)
    if asked is None and device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        asked = "bf16" if major >= 8 else "fp16" if major == 7 else None
    return Precision(asked or "fp32", device.type)
