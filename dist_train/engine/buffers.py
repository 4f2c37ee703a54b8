"""Buffers of a model (BatchNorm's statistics, say) over ranks and over forwards that must leave no trace."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """The values of all buffers at one moment."""

    def __init__(self, model: nn.Module):
        self._kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Make the buffers what they were."""
        for buffer, value in self._kept:
            buffer.copy_(value)


@torch.no_grad()
def take_from_rank_zero(tensors: Iterable[Tensor], world_size: int) -> None:
    """Make `tensors` on every rank those of rank 0: one broadcast for each dtype. Every rank must call it."""
    if world_size == 1:
        return
    import torch.distributed as dist

    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))
