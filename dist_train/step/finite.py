"""What happens when a loss or gradient is inf or nan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_train.task.batch import HALF

if TYPE_CHECKING:
    from dist_train.data.plan import Plan

MAX_OVERFLOWS_IN_A_ROW = 20
MAX_UNREAD = 4096  # steps between two reads where the host doesn't read in each step


class NonFiniteError(RuntimeError):
    """A loss or gradient is inf or nan; the message names step, samples and parameter, and what to try."""


def gradient_values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The numbers of each gradient, to read and change in place: a sparse one's values, a complex one's pairs of reals."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            if not gradient.is_coalesced():  # rows that occur twice must be added up before they are checked
                gradient = parameter.grad = gradient.coalesce()
            gradient = gradient._values()
        found.append(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
    return found


def by_dtype(tensors: Sequence[Tensor]) -> Iterable[tuple[torch.dtype, list[Tensor]]]:
    """`tensors` in lists of one dtype, as the foreach kernels require."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return [(tensors[0].dtype, list(tensors))]
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups.items()


class FiniteGuard:
    """Records on the device whether each step was finite, and acts on it.

    On the CPU, and for `skip` with an optimizer that isn't fused, the flag is read in the step and acts before the update.
    Otherwise a fused optimizer gets the flag and leaves the weights unchanged; with others the update happens, and the flags,
    which are read at log intervals and before any evaluation or save, end the run before anything of it is kept. Under fp16 an
    overflow is the scaler's normal work: it is skipped, and only 20 in a row end the run.

    Args:
        policy: `stop`, `skip` (`trainer.on_nonfinite`), or `rescale` (fp16, whatever the config says).
        on_host: read in each step; None decides as above.

    Attributes:
        found: the flag of this step, on the device: 0, or not if inf or nan was found.
        skips: bad steps are skipped. skipped: how many so far. in_a_row: how many of the last steps.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, policy: str, on_host: bool | None = None
    ):
        self.model, self.plan = model, plan
        self.scaled, self.skips = policy == "rescale", policy != "stop"
        fused = getattr(optimizer, "_step_supports_amp_scaling", False) and all(
            group.get("fused") for group in optimizer.param_groups
        )
        device = next(model.parameters()).device
        needed = device.type == "cpu" or (policy == "skip" and not fused)
        self.on_host = needed if on_host is None else on_host
        self.skipped = 0
        self.in_a_row = 0
        # One flag per step until they are read: the check writes there itself, so keeping them costs no kernel.
        self._flags = torch.zeros(1 if self.on_host else MAX_UNREAD, device=device)
        self._on_cpu = self._flags.numpy() if device.type == "cpu" else None  # a view: quick to read
        self._places = self._flags.unbind()
        self._unread: list[int] = []
        self.found = self._places[0]
        self._one = torch.ones((), device=device)
        self._informed = optimizer if not self.on_host and fused and not self.scaled else None

    def begin(self, step: int) -> None:
        """Make `found` the flag of optimizer step `step` (from 1). Raises as `read`."""
        if len(self._unread) == len(self._places):
            self.read()
        self.found = self._places[len(self._unread)]
        self._unread.append(step)
        if self._informed is not None:
            self._informed.found_inf = self.found  # type: ignore[attr-defined]

    def check(self, tensors: Sequence[Tensor], loss: Tensor | None = None, weight: Tensor | float = 1.0) -> None:
        """Set `found` if one of `tensors` (on the device, dense and real; they may be rewritten), the loss or its weight holds
        inf or nan."""
        if loss is not None and self._on_cpu is not None:
            if not (math.isfinite(loss) and math.isfinite(weight)):
                self.found.fill_(1.0)
        elif loss is not None:  # a weight that isn't finite makes 0 or nan of finite gradients
            tensors = [loss + (0.0 * weight.to(loss.dtype) if isinstance(weight, Tensor) else 0.0 * weight), *tensors]
        for dtype, group in by_dtype(tensors):
            if dtype in HALF:  # not every device has the kernel for them
                group = [torch.stack(torch._foreach_norm(group, math.inf)).float()]
            torch._amp_foreach_non_finite_check_and_unscale_(group, self.found, self._one)

    def read(self, loss: Tensor | None = None, norm: Tensor | None = None) -> bool:
        """Read the flags since the last read; returns whether the last step was bad. Waits for the device.

        `loss` and `norm` of the last step's gradients are for the message.

        Raises:
            NonFiniteError: `trainer.on_nonfinite` is `stop`, or fp16 has overflowed 20 times in a row.
        """
        flags = (self._flags if self._on_cpu is None else self._on_cpu)[: len(self._unread)].tolist()
        if not any(flags):
            self.in_a_row = 0 if flags else self.in_a_row
            self._unread.clear()
            return False
        self._flags.zero_()
        for step, flag in zip(self._unread, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.skipped += bool(flag)
            if flag and (not self.skips or (self.scaled and self.in_a_row >= MAX_OVERFLOWS_IN_A_ROW)):
                raise NonFiniteError(self._message(step, loss, norm))
        self._unread.clear()
        return bool(flags[-1])

    def _message(self, step: int, loss: Tensor | None, norm: Tensor | None) -> str:
        indices = self.plan.batch(step - 1)
        shown = ", ".join(str(int(index)) for index in indices[:16]) + (", ..." if len(indices) > 16 else "")
        what = (
            f"fp16 overflowed {self.in_a_row} times in a row" if self.scaled else "the loss or a gradient is inf or nan"
        )
        return (
            f"step {step}: {what}; {self._culprit(loss, norm)}; samples of the step: {shown}. Nothing of it was saved. Try a "
            "lower optimizer.lr, trainer.clip_grad_norm, trainer.precision=fp32, or trainer.on_nonfinite=skip, and check those "
            "samples"
        )

    def _culprit(self, loss: Tensor | None, norm: Tensor | None) -> str:
        """The first parameter whose gradient (or, if the update has happened, value) is inf or nan."""
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
