"""What happens when a loss or gradient is inf or nan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_train.task.batch import HALF

if TYPE_CHECKING:
    from dist_train.data.plan import Indices

MAX_OVERFLOWS_IN_A_ROW = 20
MOST_UNREAD = 4096  # steps between two readings where the host doesn't look at each


class NonFiniteError(RuntimeError):
    """A loss or gradient is inf or nan; the message names step, samples and parameter, and what to try."""


def values_of_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Each gradient's numbers, to be read and changed in place: of a sparse one its values, of a complex one pairs of reals."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            if not gradient.is_coalesced():  # rows that stand in it twice would be looked at before they are added up
                gradient = parameter.grad = gradient.coalesce()
            gradient = gradient._values()
        found.append(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
    return found


def by_dtype(tensors: Sequence[Tensor]) -> Iterable[tuple[torch.dtype, list[Tensor]]]:
    """`tensors` in lists of one dtype, as the kernels that work on lists want them."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups.items()


class FiniteGuard:
    """Keeps each step's finding on the device and acts on it.

    On the CPU, and for `skip` with an optimizer that isn't fused, it is read at once and acts before the update. Else a fused
    optimizer gets it and leaves everything as it was; with others the update happens, and the findings, which are read at log
    intervals and before any evaluation or save, end the run before anything of it is kept. Under fp16 an overflow is the
    scaler's normal work: skipped, and only 20 in a row end the run.

    Attributes:
        found: where the check of this step writes its finding: not 0 for inf or nan.
        on_host: findings are read in the step.
        skipped: steps that were left out so far. in_a_row: the last so many steps were.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        scaled: bool,
        skip: bool,
        indices_of: Callable[[int], Indices],
        on_host: bool | None = None,
    ):
        self.model, self.indices_of = model, indices_of
        self.scaled, self.skips = scaled, scaled or skip
        fused = getattr(optimizer, "_step_supports_amp_scaling", False) and all(
            group.get("fused") for group in optimizer.param_groups
        )
        waits = device.type == "cpu" or (skip and not fused and not scaled)
        self.on_host = waits if on_host is None else on_host
        self.skipped = 0
        self.in_a_row = 0
        # A place for each step's finding until they are read: the check writes there itself, so that keeping it costs no kernel.
        self._findings = torch.zeros(1 if self.on_host else MOST_UNREAD, device=device)
        self._on_cpu = self._findings.numpy() if device.type == "cpu" else None  # a view: quick to look at
        self._places = self._findings.unbind()
        self._unread: list[int] = []
        self.found = self._places[0]
        self._one = torch.ones((), device=device)
        self._told = optimizer if not self.on_host and fused and not scaled else None

    def begin(self, step: int) -> None:
        """Make `found` the place for the finding of optimizer step `step` (from 1). Raises as `read`."""
        if len(self._unread) == len(self._places):
            self.read()
        self.found = self._places[len(self._unread)]
        self._unread.append(step)
        if self._told is not None:
            self._told.found_inf = self.found  # type: ignore[attr-defined]

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Write to `found` if one of `tensors` (on the device, dense and real) holds inf or nan."""
        for dtype, group in by_dtype(tensors):
            if dtype in HALF:  # the kernel doesn't take them everywhere
                group = [torch.stack(torch._foreach_norm(group, math.inf)).float()]
            torch._amp_foreach_non_finite_check_and_unscale_(group, self.found, self._one)

    def read(self, loss: Tensor | None = None, norm: Tensor | None = None) -> bool:
        """Take in the findings since the last reading; whether the last step was bad. Waits for the device.

        `loss` and `norm` of the last step's gradients are for the message.

        Raises:
            NonFiniteError: `trainer.on_nonfinite` is `stop`, or fp16 has overflowed 20 times in a row.
        """
        findings = self._findings if self._on_cpu is None else self._on_cpu
        flags = findings[: len(self._unread)].tolist()
        if not any(flags):
            self.in_a_row = 0 if flags else self.in_a_row
            self._unread.clear()
            return False
        self._findings.zero_()
        for step, flag in zip(self._unread, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.skipped += bool(flag)
            if flag and (not self.skips or (self.scaled and self.in_a_row >= MAX_OVERFLOWS_IN_A_ROW)):
                raise NonFiniteError(self._message(step, loss, norm))
        self._unread.clear()
        return bool(flags[-1])

    def _message(self, step: int, loss: Tensor | None, norm: Tensor | None) -> str:
        indices = self.indices_of(step - 1)
        shown = ", ".join(str(int(index)) for index in indices[:16]) + (", ..." if len(indices) > 16 else "")
        what = (
            f"fp16 overflowed {self.in_a_row} times in a row" if self.scaled else "the loss or a gradient is inf or nan"
        )
        return (
            f"step {step}: {what}; {self._culprit(loss, norm)}; samples of the step: {shown}. Nothing of it was saved. Try a "
            "lower optimizer.lr, trainer.clip_grad_norm, trainer.precision=fp32, or trainer.on_nonfinite=skip, and look at those "
            "samples"
        )

    def _culprit(self, loss: Tensor | None, norm: Tensor | None) -> str:
        """The first parameter whose gradient (or, after the fact, value) is inf or nan."""
        for what in ("gradient", "value"):
            for name, parameter in self.model.named_parameters():
                tensor = parameter.grad if what == "gradient" else parameter.detach()
                if tensor is not None and not bool(tensor.isfinite().all()):
                    return f"first affected parameter: {name} ({what})"
        if loss is not None and not bool(loss.isfinite()):
            return f"the loss is {float(loss)}, every gradient is finite"
        if norm is not None and not bool(norm.isfinite()):
            return f"the norm of the gradients is {float(norm)}, each of them was finite"
        return "the parameters are finite (the update was skipped)"
