"""One optimizer step: forward and backward of each micro-batch, reduction, clipping, non-finite check, update.

Nothing here waits for the device or communicates with other ranks, except where a comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.runtime.seeding import seed_forward
from dist_train.step.finite import FiniteGuard, by_dtype, gradient_values
from dist_train.step.modules import BufferSnapshot
from dist_train.step.objective import Objective
from dist_train.step.reduce import Reducer
from dist_train.task.batch import HALF
from dist_train.watch.status import DATA, FORWARD, UPDATE, status

if TYPE_CHECKING:
    from dist_train.config.schema import TrainerConfig
    from dist_train.data.loader import StepWork
    from dist_train.data.plan import MicroBatch, Plan


class Stepper:
    """Runs optimizer steps and keeps the sums of the open log interval on the device.

    Args:
        new_reducer: makes the reducer for the parameters that train when it is called.
        plan: the order of samples, with the run's seed.
        prepare: makes the batch that the model gets from a micro-batch of a step.
        config: clip_grad_norm, clip_grad_value and on_nonfinite.

    Attributes:
        totals: float64 (2,) on the device: loss sum and weight since the last log row, without skipped steps.
        grad_norm: the norm of the last step's gradient before clipping (0-dim tensor), if it was asked for or clipped.
        guard: checks for inf and nan, and counts the steps that were skipped for them.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        new_reducer: Callable[[], Reducer],
        plan: Plan,
        prepare: Callable[[MicroBatch, StepWork], Any],
        config: TrainerConfig,
    ):
        self.modules, self.scaler, self.summed = objective.modules, objective.scaler, objective.summed
        self.optimizer, self.seed, self.prepare = optimizer, plan.seed, prepare
        self.clip_norm, self.clip_value = config.clip_grad_norm, config.clip_grad_value
        self.device = device = next(self.modules.parameters()).device
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.grad_norm: Tensor | None = None
        policy = "rescale" if self.scaler is not None else config.on_nonfinite
        self.guard = FiniteGuard(self.modules, optimizer, plan, policy)
        self.new_reducer, self.reducer = new_reducer, new_reducer()
        self.parameters = list(self.modules.trained().values())
        self._warm = False
        self._loss_total, self._weight_total = self.totals.unbind()  # views
        self._samples = (1, torch.ones((), dtype=torch.float64, device=device))
        self._factor = torch.ones((), dtype=torch.float64, device=device)
        self._own_optimizer = not type(optimizer).__module__.startswith("torch.")

    def renew_reducer(self) -> None:
        """Train the parameters that require a gradient now, through a new reducer."""
        self.reducer.close()
        self.reducer = self.new_reducer()
        self.parameters = list(self.modules.trained().values())
        self._warm = False

    def __call__(self, work: StepWork, want_norm: bool) -> None:
        """Run the optimizer step that `work` describes.

        Raises:
            NonFiniteError: before the update where the check can act there (see `FiniteGuard`).
        """
        before = BufferSnapshot(self.modules) if self.guard.skips else None
        loss, weight = self._forward_backward(work)
        status.phase = UPDATE
        gradients = gradient_values(self.parameters)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.guard.begin(work.step + 1)
        self._divide(gradients, weight, work.samples)
        self.guard.check([loss.clone(), *gradients])
        self._clip(gradients, want_norm)
        if self._own_optimizer:  # one that draws random numbers (SGLD) draws the same on all ranks
            seed_forward(self.seed, work.step, work.samples, self.device)
        self._update(loss, weight, before)
        for parameter in self.parameters:
            parameter.grad = None

    def _forward_backward(self, work: StepWork) -> tuple[Tensor, Tensor]:
        scale = 1.0 if self.summed else 1.0 / work.samples
        status.phase = DATA
        for micro in work.micro_batches:
            status.phase = FORWARD
            status.item += 1
            batch = self.prepare(micro, work)
            if not self._warm:
                self._warm_up(batch)
            seed_forward(self.seed, work.step, micro.position, self.device)
            kept = BufferSnapshot(self.modules) if micro.zero_weight else None
            self.reducer.forward_backward(batch, scale=scale, zero_weight=micro.zero_weight, last=micro.last)
            if kept is not None:
                kept.restore()
            status.phase = DATA
        return self.reducer.finish()

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
        """Gradients over the sample count become gradients over the loss's own weight; zero where that is zero."""
        if self.summed:
            return
        # In float64, which is exact for integers. x / 0 becomes 0, and 0 / 0 doesn't occur.
        if self.device.type == "cpu":  # reading through numpy is fast, and usually no division is needed
            number = weight.detach().double().numpy().item()
            if number == samples:
                return
            self._factor.fill_(samples / number if number else 0.0)
        else:
            if self._samples[0] != samples:
                self._samples = (samples, torch.full_like(self._samples[1], samples))
            torch.div(self._samples[1], weight, out=self._factor).nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)
        for dtype, tensors in by_dtype(gradients):
            if dtype in HALF:  # a factor of their own dtype would have few digits
                wide = [tensor.float() for tensor in tensors]
                torch._foreach_mul_(wide, self._factor.float())
                torch._foreach_copy_(tensors, wide)
            else:
                torch._foreach_mul_(tensors, self._factor.to(dtype))

    def _clip(self, gradients: Sequence[Tensor], want_norm: bool) -> None:
        """As torch's functions do, which take neither sparse nor complex gradients."""
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
        if self.scaler is not None:  # by itself it skips only for what it saw before the division
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                torch.maximum(found, self.guard.found, out=found)  # kernels compare it with 1
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
        """Open sums, counters and loss scale; call `guard.read` first."""
        scale = self.scaler.state_dict() if self.scaler is not None else {}
        return {"totals": self.totals, "skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row, "scaler": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.totals.copy_(state["totals"])
        self.guard.skipped, self.guard.in_a_row = state["skipped"], state["in_a_row"]
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
