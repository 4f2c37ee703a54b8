"""Buffers of a model (BatchNorm's statistics, say) over ranks and over forwards that must leave no trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class BufferSnapshot:
    """The values of all buffers at one moment, one flat copy for each kind; a buffer that is replaced counts as changed."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        seen: set[int] = set()
        kinds: dict[Any, list[tuple[nn.Module, str, Tensor]]] = {}
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    kinds.setdefault((buffer.device, buffer.dtype), []).append((module, name, buffer))
        self._kept = [(places, _flat(buffer for *_, buffer in places)) for places in kinds.values()]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Make the buffers what they were; given `where`, a bool on the device, only if that is true (nobody waits for it)."""
        for places, values in self._kept:
            if where is not None:
                values = torch.where(where, values, _flat(module._buffers[name] for module, name, _ in places))
            buffers = [buffer for *_, buffer in places]
            parts = values.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
            for module, name, buffer in places:
                module._buffers[name] = buffer


def _flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors if tensor is not None])


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
