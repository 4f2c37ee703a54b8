"""Buffers and numbers that a forward changes, in steps whose micro-batches are leaves of one tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.objective.modules import Modules, Slot


class LeafState:
    """Each leaf's forward starts from the values of before the step; afterwards

    - running statistics of normalization layers are the mean of what the leaves made of them, summed like gradients;
    - integers have advanced once, as one leaf's forward has advanced them.

    Nothing else may change, since its value would depend on how many leaves a rank computes.

    Attributes:
        size: how many numbers the running statistics are.
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
        self._numbers = modules.numbers_at
        self.size = sum(slot.value.numel() for slot in self._averaged)
        double = any(slot.value.dtype == torch.float64 for slot in self._averaged)
        self.dtype = torch.float64 if double else torch.float32
        self._before: list[list[Any]] = []
        self._written: list[tuple[int, int]] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first forward of a step."""
        changing = [slot.value for slot in (*self._averaged, *self._counted)]
        copies = [tensor.clone() for tensor in changing]
        self._before = [changing, copies, [slot.value for slot in self.fixed], [s.value for s in self._numbers]]
        self._written = [_written(tensor) for tensor in self._before[2]]

    @torch.no_grad()
    def rewind(self) -> None:
        """Before each further forward of the step. Raises as `check`."""
        self.check()
        tensors, copies, _, numbers = self._before
        if tensors:
            torch._foreach_copy_(tensors, copies)
        for slot, tensor in zip((*self._averaged, *self._counted), tensors, strict=True):
            slot.value = tensor  # a forward may have replaced it
        for slot, number in zip(self._numbers, numbers, strict=True):
            slot.value = number

    def check(self) -> None:
        """After a forward.

        Raises:
            ValueError: it has changed something that it mustn't; names it.
        """
        _, _, fixed, numbers = self._before
        if self.fixed:
            for slot, tensor, written in zip(self.fixed, fixed, self._written, strict=True):
                if slot.value is not tensor or _written(tensor) != written:
                    raise ValueError(changed(slot.name))
        now = [slot.value for slot in self._numbers]
        if now != numbers:
            for slot, value, number in zip(self._numbers, now, numbers, strict=True):
                if isinstance(number, float) and value != number and (value == value or number == number):
                    raise ValueError(changed(slot.name))

    @torch.no_grad()
    def statistics(self) -> Tensor:
        """The running statistics after a leaf's forward: (size,)."""
        return torch.cat([slot.value.detach().reshape(-1).to(self.dtype) for slot in self._averaged])

    @torch.no_grad()
    def finish(self, mean: Tensor) -> None:
        """The step is over: set the running statistics to the mean over the leaves, (size,)."""
        parts = mean.split([slot.value.numel() for slot in self._averaged])
        for slot, part, layer in zip(self._averaged, parts, self._layers, strict=True):
            if layer.training:  # else the mean of equal numbers would differ from them by rounding
                slot.value.copy_(part.view_as(slot.value))

    def counts(self) -> dict[str, Any]:
        """The integers that a forward may advance, by name; waits for the device."""
        found = {slot.name: slot.value.tolist() for slot in self._counted}
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


def _written(tensor: Tensor) -> tuple[int, int]:
    """What a write changes, without looking at the values (not one in place through `.data`, nor F.batch_norm's)."""
    return tensor._version, tensor.data_ptr()


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
