"""Buffers and numbers that a forward changes, in steps whose micro-batches are leaves of one tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.data.digest import content_digest
from dist_train.objective.modules import Modules, Slot

Stamp = tuple[int, int]
SMALL = 16  # elements of an integer buffer that is restored even if it seems unchanged: a write through `.data` leaves no stamp


class _Copy(NamedTuple):
    slot: Slot
    tensor: Tensor
    value: Tensor
    stamp: Stamp
    """Of the tensor when it was copied."""


class LeafState:
    """Each leaf's forward starts from the values of before the step; afterwards

    - running statistics of normalization layers are the mean of what the leaves made of them, summed like gradients;
    - integers have advanced once, as one leaf's forward has advanced them; counters that only some leaves advance (those of a
      layer that others leave out) by the mean of all, rounded up.

    Nothing else may change, since its value would depend on how many leaves a rank computes.

    Attributes:
        size: how many numbers the running statistics are, and what counters have advanced by.
        dtype: in which they are summed.
        fixed: other floating-point buffers, and frozen parameters.
    """

    def __init__(self, modules: Modules):
        statistics = {id(tensor): module for tensor, module in _running_statistics(modules)}
        frozen = [Slot(name, {"": p}, "") for name, p in modules.named_parameters() if not p.requires_grad]
        slots = {id(slot.value): slot for slot in [*modules.buffers_at, *frozen] if slot.value is not None}
        self._averaged = [slot for key, slot in slots.items() if key in statistics]
        self._layers = [statistics[key] for key in slots if key in statistics]
        rest = [slot for key, slot in slots.items() if key not in statistics]
        self.fixed = [slot for slot in rest if _is_inexact(slot.value)]
        self._counted = [slot for slot in rest if not _is_inexact(slot.value)]
        self._counters = [slot for slot in self._counted if _is_counter(slot.value)]
        self._numbers = modules.numbers_at
        self._sizes = [slot.value.numel() for slot in (*self._averaged, *self._counters)]
        self.size = sum(self._sizes)
        double = any(slot.value.dtype == torch.float64 for slot in self._averaged)
        self.dtype = torch.float64 if double else torch.float32
        self._copies: list[_Copy] = []  # of what may change, from before the step
        self._numbers_before: list[Any] = []
        self._numbers_after: list[Any] | None = None  # the first leaf's forward
        self._fixed_before: list[tuple[Tensor, Stamp]] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first forward of a step."""
        known = {id(copy.tensor): copy for copy in self._copies}
        slots = [*self._averaged, *self._counted]
        self._copies = []
        for k, slot in enumerate(slots):
            copy = known.get(id(slot.value))
            # F.batch_norm's writes leave no stamp; large integers that don't change (masks) are copied once.
            if copy is None or self._always(k, copy.value) or copy.stamp != _stamp(slot.value):
                copy = _Copy(slot, slot.value, slot.value.clone(), _stamp(slot.value))
            self._copies.append(copy)
        self._numbers_before = [slot.value for slot in self._numbers]
        self._numbers_after = None
        self._fixed_before = [(slot.value, _stamp(slot.value)) for slot in self.fixed]

    @torch.no_grad()
    def rewind(self) -> None:
        """Before each further forward of the step."""
        for k, (slot, tensor, value, stamp) in enumerate(self._copies):
            if self._always(k, value) or slot.value is not tensor or _stamp(tensor) != stamp:
                tensor.copy_(value)
                slot.value = tensor  # a forward may have replaced it
        for slot, number in zip(self._numbers, self._numbers_before, strict=True):
            slot.value = number
        self._fixed_before = [(slot.value, _stamp(slot.value)) for slot in self.fixed]

    def _always(self, k: int, value: Tensor) -> bool:
        """Whether the k-th of what may change is restored without asking for its stamp."""
        return k < len(self._averaged) or value.numel() <= SMALL

    def check(self) -> None:
        """After a forward.

        Raises:
            ValueError: it has changed something that it mustn't; names it.
        """
        for slot, (tensor, stamp) in zip(self.fixed, self._fixed_before, strict=True):
            if slot.value is not tensor or _stamp(tensor) != stamp:
                raise ValueError(changed(slot.name))
        now = [slot.value for slot in self._numbers]
        if now != self._numbers_before:
            for slot, value, number in zip(self._numbers, now, self._numbers_before, strict=True):
                if isinstance(number, float) and value != number and (value == value or number == number):
                    raise ValueError(changed(slot.name))
        first = self._numbers_after = self._numbers_after or now
        for slot, mine, other in zip(self._numbers, now, first, strict=True) if now != first else ():
            if mine is not other and mine != other:
                raise ValueError(
                    f"the forwards of two micro-batches of a step change {slot.name} in different ways (to {other} and {mine}): "
                    "its value would depend on how many of them a process computes. Make it a buffer (an integer tensor), whose "
                    "changes are averaged, or set distributed.reproducibility=fast"
                )

    @torch.no_grad()
    def statistics(self) -> Tensor:
        """The running statistics after a leaf's forward, and what counters have advanced by in it: (size,)."""
        before = {id(copy.slot): copy.value for copy in self._copies}
        values = [slot.value.detach() for slot in self._averaged]
        values += [slot.value - before[id(slot)] for slot in self._counters]
        return torch.cat([value.reshape(-1).to(self.dtype) for value in values])

    @torch.no_grad()
    def finish(self, mean: Tensor) -> None:
        """The step is over: set running statistics and counters by the mean of `statistics` over the leaves, (size,)."""
        parts = mean.split(self._sizes)
        for slot, part, layer in zip(self._averaged, parts, self._layers, strict=False):
            if layer.training:  # else the mean of equal numbers would differ from them by rounding
                slot.value.copy_(part.view_as(slot.value))
        before = {id(copy.slot): copy.value for copy in self._copies}
        for slot, part in zip(self._counters, parts[len(self._averaged) :], strict=True):
            slot.value.copy_(before[id(slot)] + part.ceil().view_as(slot.value).to(slot.value.dtype))

    def counts(self) -> dict[str, Any]:
        """The integers that a forward may advance, by name, those in buffers by their digest; waits for the device."""
        found: dict[str, Any] = {slot.name: content_digest(slot.value) for slot in self._counted}
        return found | {slot.name: slot.value for slot in self._numbers if isinstance(slot.value, int)}


def changed(name: str) -> str:
    """What to say of a buffer that mustn't change."""
    return (
        f"a forward changes {name}: with distributed.reproducibility=bitwise it may only change the running statistics of "
        "normalization layers, which are averaged over the micro-batches of a step, and integer counters. What else it keeps "
        "would depend on how many micro-batches a process computes: compute it outside of the forward (a callback), or set "
        "distributed.reproducibility=fast"
    )


def _running_statistics(modules: nn.Module) -> Iterator[tuple[Tensor, nn.Module]]:
    for module in modules.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            yield from ((t, module) for t in (module.running_mean, module.running_var) if isinstance(t, Tensor))


def _stamp(tensor: Tensor) -> Stamp:
    """What a write changes, without looking at the values (not one in place through `.data`, nor F.batch_norm's)."""
    return tensor._version, tensor.data_ptr()


def _is_counter(tensor: Tensor) -> bool:
    return not _is_inexact(tensor) and tensor.dtype != torch.bool and tensor.numel() <= SMALL


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
