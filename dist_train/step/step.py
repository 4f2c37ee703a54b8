"""One optimizer step: forward and backward of each micro-batch, reduction, clipping, non-finite check, update.

Nothing here waits for the device or talks to other ranks, except where a comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.runtime.seeding import seed_forward
from dist_train.step.buffers import BufferSnapshot
from dist_train.step.finite import FiniteGuard, by_dtype, values_of_gradients
from dist_train.step.modules import Modules
from dist_train.step.reduce import Reducer
from dist_train.task.batch import HALF
from dist_train.watch.status import DATA, FORWARD, UPDATE, status

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
        modules: Modules,
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
        look: Callable[[Any, int, int], None] | None = None,
    ):
        self.modules, self.optimizer, self.reducer, self.scaler = modules, optimizer, reducer, scaler
        self.device, self.seed, self.summed, self.prepare = device, seed, summed, prepare
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.parameters = list(modules.trained().values())
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.grad_norm: Tensor | None = None
        self.guard = FiniteGuard(
            modules, optimizer, device, scaled=scaler is not None, skip=skip, indices_of=indices_of
        )
        self._loss_total, self._weight_total = self.totals.unbind()  # views
        self._samples = (1, torch.ones((), dtype=torch.float64, device=device))
        self._factor = torch.ones((), dtype=torch.float64, device=device)
        self._warm, self._look = False, look
        self._own_optimizer = not type(optimizer).__module__.startswith("torch.")

    def __call__(self, work: StepWork, want_norm: bool) -> None:
        """Run the optimizer step that `work` describes.

        Raises:
            NonFiniteError: before the update where the check can act there (see `FiniteGuard`).
        """
        scale = 1.0 if self.summed else 1.0 / work.samples
        status.phase = DATA
        before = BufferSnapshot(self.modules) if self.guard.skips else None
        for micro in work.micro_batches:
            status.phase = FORWARD
            status.item += 1
            batch = self.prepare(micro.batch, work.epoch, micro.indices)
            if self._look is not None:
                self._look(batch, micro.samples, work.samples)
                self._look = None
            if not self._warm:
                self._warm_up(batch)
            seed_forward(self.seed, work.step, micro.position, self.device)
            kept = BufferSnapshot(self.modules) if micro.weightless else None
            self.reducer.forward_backward(batch, scale=scale, weightless=micro.weightless, last=micro.last)
            if kept is not None:
                kept.restore()
            status.phase = DATA
        loss, weight = self.reducer.finish()
        status.phase = UPDATE
        gradients = values_of_gradients(self.parameters)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.guard.begin(work.step + 1)
        self._divide(gradients, weight, work.samples)
        self.guard.check([loss.clone(), *gradients])
        self._clip(gradients, want_norm)
        if self._own_optimizer:  # one that draws (SGLD) does so alike on all ranks
            seed_forward(self.seed, work.step, work.samples, self.device)
        self._update(loss, weight, before)
        for parameter in self.parameters:
            parameter.grad = None

    def retrain(self, new_reducer: Callable[[torch.amp.GradScaler | None], Reducer]) -> None:
        """Train what requires a gradient by now, through another reducer."""
        self.reducer.close()
        self.reducer = new_reducer(self.scaler)
        self.parameters = list(self.modules.trained().values())
        self._warm = False

    def _warm_up(self, batch: Any) -> None:
        """Before the first step of every start (see `DataParallel.warm_up`)."""
        kept = BufferSnapshot(self.modules, frozen=True)

        def rewind() -> None:
            kept.restore()
            seed_forward(self.seed, 0, 0, self.device)

        self.reducer.warm_up(batch, rewind)
        kept.restore()
        self._warm = True

    def _divide(self, gradients: Sequence[Tensor], weight: Tensor, samples: int) -> None:
        """Gradients over the sample count become gradients over the loss's own weight; zero where nothing has weight."""
        if self.summed:
            return
        # float64 on the way: exact where it is a whole number. x / 0 is made 0, and 0 / 0 doesn't occur.
        if self.device.type == "cpu":  # numpy looks quickly, and mostly there is nothing to do
            number = weight.detach().double().numpy().item()
            if number == samples:
                return
            self._factor.fill_(samples / number if number else 0.0)
        else:
            if self._samples[0] != samples:
                self._samples = (samples, torch.full_like(self._samples[1], samples))
            torch.div(self._samples[1], weight, out=self._factor).nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)
        for dtype, tensors in by_dtype(gradients):
            if dtype in HALF:  # a factor of their own kind would have few digits
                wide = [tensor.float() for tensor in tensors]
                torch._foreach_mul_(wide, self._factor.float())
                torch._foreach_copy_(tensors, wide)
            else:
                torch._foreach_mul_(tensors, self._factor.to(dtype))

    def _clip(self, gradients: Sequence[Tensor], want_norm: bool) -> None:
        """As torch's functions do it, which take neither sparse nor complex gradients."""
        if self.clip_value is not None:
            for _, tensors in by_dtype(gradients):
                torch._foreach_clamp_min_(tensors, -self.clip_value)
                torch._foreach_clamp_max_(tensors, self.clip_value)
        if self.clip_norm is None and not want_norm:
            return
        self.grad_norm = norm = nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            self.guard.check([norm.clone()])  # squares may overflow where no gradient does, and all would become 0
            scale = torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
            for _, tensors in by_dtype(gradients):
                torch._foreach_mul_(tensors, scale)

    def _update(self, loss: Tensor, weight: Tensor, before: BufferSnapshot | None) -> None:
        bad = False
        if self.scaler is not None:  # it skips for what it has seen itself, before the division
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                torch.maximum(found, self.guard.found, out=found)  # kernels ask whether it is 1
        if self.guard.on_host:
            bad = self.guard.read(loss, self.grad_norm)
            if bad and before is not None:
                before.restore()
        else:
            good = self.guard.found == 0
            loss, weight = loss.where(good, 0), weight.where(good, 0)
            if before is not None:
                before.restore(~good)
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
