"""Buffers of a model (BatchNorm's statistics, say) over ranks and over forwards that must leave no trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dist_train.runtime.world import World
    from dist_train.step.modules import Modules, Slot

BROADCAST_BYTES = 64 << 20  # of one broadcast: a copy of so much is made


class BufferSnapshot:
    """The values of all buffers and numbers at one moment, one flat copy for each kind; what is replaced counts as changed.

    With `frozen` also of parameters that don't train: a forward may update them (an encoder that follows another). They may
    be large, so they are copied to the host.
    """

    @torch.no_grad()
    def __init__(self, modules: Modules, frozen: bool = False):
        self._places = [(slot, slot.value) for slot in modules.buffers_at]
        self._numbers = [(slot, slot.value) for slot in modules.numbers_at]
        kinds: dict[Any, dict[int, tuple[Slot, Tensor]]] = {}
        for slot, buffer in self._places:
            if buffer is not None:
                kinds.setdefault((buffer.device, buffer.dtype), {}).setdefault(id(buffer), (slot, buffer))
        self._kept = [(list(kind.values()), _flat(buffer for _, buffer in kind.values())) for kind in kinds.values()]
        still = [parameter for parameter in modules.parameters() if frozen and not parameter.requires_grad]
        self._frozen = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in still]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Make everything what it was; given `where`, a bool on the device, only if that is true (nobody waits for it).

        Numbers, and tensors that are kept on the host, stay in that case: the host doesn't know.
        """
        if where is not None and any(_shape(slot.value) != _shape(buffer) for slot, buffer in self._places):
            if not where:  # of another size by now: here it does wait
                return
            where = None
        for kept, values in self._kept:
            if where is not None and values.device != where.device:
                continue
            if where is not None:
                values = torch.where(where, values, _flat(slot.value for slot, _ in kept))
            buffers = [buffer for _, buffer in kept]
            parts = values.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
        for slot, buffer in self._places:
            if where is None or buffer is None or buffer.device == where.device:
                slot.value = buffer
        for slot, number in self._numbers if where is None else ():
            slot.value = number
        for parameter, value in self._frozen:
            parameter.copy_(value)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _shape(value: Tensor | None) -> Any:
    return None if value is None else value.shape


@torch.no_grad()
def take_from_rank_zero(tensors: Iterable[Tensor | None], world: World) -> None:
    """Make `tensors` on this rank's device those of rank 0: few broadcasts for each dtype. Every rank must call it."""
    if world.size == 1:
        return
    import torch.distributed as dist

    groups: dict[torch.dtype, list[list[Tensor]]] = {}
    for tensor in tensors:
        if tensor is None or tensor.device.type != world.device.type:
            continue  # a plain attribute that the model keeps elsewhere
        of_dtype = groups.setdefault(tensor.dtype, [[]])
        if sum(other.nbytes for other in of_dtype[-1]) > BROADCAST_BYTES:
            of_dtype.append([])
        of_dtype[-1].append(tensor.detach())
    for group in (group for of_dtype in groups.values() for group in of_dtype):
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))
