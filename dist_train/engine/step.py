"""One optimizer step: forward and backward of each micro-batch, reduction, clipping, non-finite check, update, EMA.

Nothing here waits for the device or talks to other ranks, except where a comment says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.engine.buffers import BufferSnapshot
from dist_train.engine.reduce import Reducer
from dist_train.runtime.here import DATA, FORWARD, UPDATE, here
from dist_train.runtime.seeding import seed_forward

if TYPE_CHECKING:
    from dist_train.data.loader import StepWork
    from dist_train.data.plan import Indices

MAX_OVERFLOWS_IN_A_ROW = 20
MOST_UNREAD = 4096  # steps between two readings of the non-finite record on CUDA


class NonFiniteError(RuntimeError):
    """A loss or gradient is inf or nan; the message names step, samples and parameter, and what to try."""


class Stepper:
    """Runs optimizer steps and keeps the sums of the open log interval on the device.

    Attributes:
        totals: float64 (2,) on the device: loss sum and weight since the last log row, without skipped steps.
        grad_norm: the norm of the last step's gradient before clipping (0-dim tensor), if it was asked for or clipped.
        skipped: optimizer steps skipped so far for a non-finite loss or gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reducer: Reducer,
        *,
        scaler: torch.amp.GradScaler | None,
        device: torch.device,
        seed: int,
        summed: bool,
        prepare: Callable[[Any, int, Any], Any],
        clip_norm: float | None = None,
        clip_value: float | None = None,
        on_nonfinite: str = "stop",
    ):
        self.model, self.optimizer, self.reducer, self.scaler = model, optimizer, reducer, scaler
        self.device, self.seed, self.summed, self.prepare = device, seed, summed, prepare
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.grad_norm: Tensor | None = None
        self.guard = FiniteGuard(optimizer, device, scaler is not None, on_nonfinite)
        self._loss_total, self._weight_total = self.totals.unbind()  # views
        self._one = torch.ones((), device=device)
        self._samples = (1, torch.ones((), dtype=torch.float64, device=device))
        self._warm = False

    def __call__(self, work: StepWork, want_norm: bool) -> None:
        """Run the optimizer step that `work` describes.

        Raises:
            NonFiniteError: before the update where the check can act there (see `FiniteGuard`).
        """
        scale = 1.0 if self.summed else 1.0 / work.samples
        here.phase = DATA
        for micro in work.micro_batches:
            here.phase = FORWARD
            here.item += 1
            batch = self.prepare(micro.batch, work.epoch, micro.indices)
            if not self._warm:
                self._warm_up(batch)
            seed_forward(self.seed, work.step, micro.position, self.device)
            kept = BufferSnapshot(self.model) if micro.weightless else None
            self.reducer.forward_backward(batch, scale=scale, weightless=micro.weightless, last=micro.last)
            if kept is not None:
                kept.restore()
            here.phase = DATA
        here.phase = UPDATE
        loss, weight = self.reducer.finish()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.guard.begin(work.step + 1)
        self._divide(gradients, loss, weight, work.samples)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters, self.clip_value)
        if self.clip_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        elif want_norm:
            self.grad_norm = nn.utils.get_total_norm(gradients)
        self._update(loss, weight, work)
        for parameter in self.parameters:
            parameter.grad = None

    def _warm_up(self, batch: Any) -> None:
        """Before the first step of every start (see `DataParallel.warm_up`)."""
        kept = BufferSnapshot(self.model)

        def rewind() -> None:
            kept.restore()
            seed_forward(self.seed, 0, 0, self.device)

        self.reducer.warm_up(batch, rewind)
        kept.restore()
        self._warm = True

    def _divide(self, gradients: Sequence[Tensor], loss: Tensor, weight: Tensor, samples: int) -> None:
        """Gradients over the sample count become gradients over the loss's own weight; inf and nan are found in the same pass."""
        lists: dict[torch.dtype, list[Tensor]] = {loss.dtype: [loss.clone()]}
        for gradient in gradients:
            lists.setdefault(gradient.dtype, []).append(gradient)
        for dtype, tensors in lists.items():
            factor = self._one
            if not self.summed:
                if self._samples[0] != samples:
                    self._samples = (samples, torch.full_like(self._samples[1], samples))
                factor = torch.div(self._samples[1], weight)  # float64 on the way: exact where it is a whole number
                if dtype == torch.float64:
                    torch._foreach_mul_(tensors, factor)  # the fused kernel takes a float32 factor only
                    factor = self._one
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, self.guard.found, factor.float())

    def _update(self, loss: Tensor, weight: Tensor, work: StepWork) -> None:
        if self.guard.on_host:
            if self.guard.read_now():
                self.guard.answer(work.step + 1, work.indices, self.model, loss)
            else:
                self._loss_total.add_(loss)
                self._weight_total.add_(weight)
                self._optimizer_step()
        else:
            good = self.guard.found == 0
            self._loss_total.add_(loss.where(good, 0))
            self._weight_total.add_(weight.where(good, 0))
            self._optimizer_step()
        if self.scaler is not None:
            self.scaler.update()

    def _optimizer_step(self) -> None:
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # reads a flag on the host unless the optimizer is fused
        else:
            self.optimizer.step()


class FiniteGuard:
    """What happens when a loss or gradient is inf or nan.

    On the CPU the finding is read at once and acts before the update. On CUDA a fused optimizer gets the finding and leaves
    everything as it was; with others the update happens and a sticky record on the device, read at log intervals and before
    any evaluation or save, ends the run before anything of it is kept. `skip` with an optimizer that isn't fused reads the
    finding in every step. Under fp16 an overflow is the scaler's normal work: skipped, and only 20 in a row end the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaled: bool,
        on_nonfinite: str,
        reads_at_once: bool | None = None,  # None: on the CPU
    ):
        self.scaled, self.skips = scaled, scaled or on_nonfinite == "skip"
        fused = is_fused(optimizer)
        cheap = device.type == "cpu" if reads_at_once is None else reads_at_once
        self.on_host = cheap or (on_nonfinite == "skip" and not fused and not scaled)
        self.skipped = 0
        self.in_a_row = 0
        # A place for each step's finding until they are read: the check writes there itself, so that keeping it costs no kernel.
        self._findings = torch.zeros(1 if self.on_host else MOST_UNREAD, device=device)
        self._places = self._findings.unbind()
        self._unread: list[int] = []
        self._bad: tuple[int, int] | None = None  # the step that ends the run, and how many overflowed in a row
        self.found = self._places[0]
        self._view = self.found.numpy() if device.type == "cpu" else None
        self._told = optimizer if not self.on_host and fused and not scaled else None

    def begin(self, step: int) -> None:
        """Make `found` the place for the finding of optimizer step `step` (from 1)."""
        if self.on_host:
            self.found.zero_()
            return
        if len(self._unread) == MOST_UNREAD:
            self._read()
        self.found = self._places[len(self._unread)]
        self._unread.append(step)
        if self._told is not None:
            self._told.found_inf = self.found  # type: ignore[attr-defined]

    def read_now(self) -> bool:
        """Whether this step's loss or gradient is non-finite; on CUDA this waits for the device."""
        bad = bool(self._view) if self._view is not None else bool(self.found)
        if not bad:
            self.in_a_row = 0
        return bad

    def answer(self, step: int, indices: Indices, model: nn.Module, loss: Tensor) -> None:
        """Count a bad step, or end the run.

        Raises:
            NonFiniteError: `trainer.on_nonfinite` is `stop`, or fp16 has overflowed 20 times in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        if self.skips and not (self.scaled and self.in_a_row >= MAX_OVERFLOWS_IN_A_ROW):
            return
        raise NonFiniteError(_message(step, indices, _culprit(model, loss), self.in_a_row if self.scaled else 0))

    def _read(self) -> None:
        """Take in the findings since the last reading; waits for the device."""
        flags = self._findings[: len(self._unread)].tolist()
        self._findings.zero_()
        for step, flag in zip(self._unread, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.skipped += bool(flag)
            if (
                flag
                and self._bad is None
                and (not self.skips or (self.scaled and self.in_a_row >= MAX_OVERFLOWS_IN_A_ROW))
            ):
                self._bad = (step, self.in_a_row)
        self._unread.clear()

    def check_record(self, indices_of: Callable[[int], Indices], model: nn.Module) -> None:
        """Read the record; waits for the device, so it is called at log intervals and before evaluations and saves only.

        Raises:
            NonFiniteError: as `answer`.
        """
        if self.on_host:
            return
        self._read()
        if self._bad is not None:
            step, row = self._bad
            raise NonFiniteError(_message(step, indices_of(step - 1), _culprit(model, None), row if self.scaled else 0))

    def state_dict(self) -> dict[str, int]:
        """Counters to go on with after a resume; call `check_record` first."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every parameter group is updated by a fused kernel, which can skip an update without the host knowing."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(supports) and all(group.get("fused") for group in optimizer.param_groups)


def accepts_fused(optimizer_class: Callable[..., Any]) -> bool:
    """Whether an optimizer class takes `fused=`."""
    return "fused" in inspect.signature(optimizer_class).parameters


def _culprit(model: nn.Module, loss: Tensor | None) -> str:
    """The first parameter whose gradient (or, after the fact, value) is inf or nan."""
    for what, of in (("gradient", lambda parameter: parameter.grad), ("value", lambda parameter: parameter.detach())):
        for name, parameter in model.named_parameters():
            tensor = of(parameter)
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return f"first affected parameter: {name} ({what})"
    if loss is not None and not bool(torch.isfinite(loss)):
        return f"the loss is {float(loss)}, every gradient is finite"
    return "the parameters are finite (the update was skipped)"


def _message(step: int, indices: Indices, culprit: str, overflows: int) -> str:
    shown = ", ".join(str(int(index)) for index in indices[:16]) + (", ..." if len(indices) > 16 else "")
    what = f"fp16 overflowed {overflows} times in a row" if overflows else "the loss or a gradient is inf or nan"
    return (
        f"step {step}: {what}; {culprit}; samples of the step: {shown}. Nothing of it was saved. Try a lower optimizer.lr, "
        "trainer.clip_grad_norm, trainer.precision=fp32, or trainer.on_nonfinite=skip, and look at those samples"
    )
