"""One optimizer step: forward and backward of each micro-batch, reduction, clipping, non-finite check, update.

Nothing here waits for the device or talks to other ranks, except where a comment says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.engine.buffers import BufferSnapshot
from dist_train.engine.finite import FiniteGuard
from dist_train.engine.reduce import Reducer
from dist_train.runtime.here import DATA, FORWARD, UPDATE, here
from dist_train.runtime.seeding import seed_forward

if TYPE_CHECKING:
    from dist_train.data.loader import StepWork
    from dist_train.data.plan import Indices


class Stepper:
    """Runs optimizer steps and keeps the sums of the open log interval on the device.

    Attributes:
        totals: float64 (2,) on the device: loss sum and weight since the last log row, without skipped steps.
        grad_norm: the norm of the last step's gradient before clipping (0-dim tensor), if it was asked for or clipped.
        guard: looks for inf and nan, and counts the steps that were skipped for them.
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
        indices_of: Callable[[int], Indices],
        clip_norm: float | None = None,
        clip_value: float | None = None,
        skip: bool = False,
    ):
        self.model, self.optimizer, self.reducer, self.scaler = model, optimizer, reducer, scaler
        self.device, self.seed, self.summed, self.prepare = device, seed, summed, prepare
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.grad_norm: Tensor | None = None
        self.guard = FiniteGuard(model, optimizer, device, scaled=scaler is not None, skip=skip, indices_of=indices_of)
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
        loss, weight = self.reducer.finish()
        here.phase = UPDATE
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
        self._update(loss, weight)
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

    def _update(self, loss: Tensor, weight: Tensor) -> None:
        bad = False
        if self.guard.on_host:
            bad = self.guard.read(loss)
        else:
            good = self.guard.found == 0
            loss, weight = loss.where(good, 0), weight.where(good, 0)
        if not bad:
            self._loss_total.add_(loss)
            self._weight_total.add_(weight)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)  # reads a flag on the host unless the optimizer is fused
        if self.scaler is not None:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Open sums, counters and loss scale; after a reading of the guard."""
        scale = self.scaler.state_dict() if self.scaler is not None else {}
        return {"totals": self.totals, "skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row, "scaler": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.totals.copy_(state["totals"])
        self.guard.skipped, self.guard.in_a_row = state["skipped"], state["in_a_row"]
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
