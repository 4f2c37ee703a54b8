"""One optimizer step: forward and backward of each micro-batch, reduction, clipping, non-finite check, update.

Nothing here waits for the device or communicates with other ranks, except where a comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.objective.modules import BufferSnapshot
from dist_train.objective.objective import Item, Objective, StepSums
from dist_train.optim.optim import take_step
from dist_train.optim.parameters import takes_closure
from dist_train.reduction.reduce import Reducer
from dist_train.runtime.seeding import seed_forward
from dist_train.step.closure import Closure, replayed
from dist_train.step.finite import FiniteGuard, by_dtype, gradient_values
from dist_train.task.batch import HALF, clone_batch
from dist_train.watch.status import DATA, FORWARD, UPDATE, status

if TYPE_CHECKING:
    from dist_train.config.schema import TrainerConfig
    from dist_train.data.plan import MicroBatch, Plan, StepWork


class Stepper:
    """Runs optimizer steps and keeps the sums of the open log interval on the device.

    Args:
        new_reducer: makes the reducer for the parameters that train when it is called.
        plan: the order of samples, with the run's seed.
        prepare: makes the batch that the model gets from a micro-batch of a step.
        config: clip_grad_norm, clip_grad_value and on_nonfinite.

    Attributes:
        totals: float64 (1 + k, 2) on the device: (sum, weight) of the loss, then of each of k named losses, then sums of metrics
            in pairs, since the last log row, without skipped steps.
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
        self.objective, self.modules = objective, objective.modules
        self.scaler, self.summed = objective.scaler, objective.summed
        self.optimizer, self.seed, self.prepare = optimizer, plan.seed, prepare
        assert not isinstance(config.clip_grad_norm, dict), "the values of this optimizer"
        assert not isinstance(config.clip_grad_value, dict)
        self.clip_norm, self.clip_value = config.clip_grad_norm, config.clip_grad_value
        self._clips = self.clip_norm is not None or self.clip_value is not None
        self.device = device = next(self.modules.parameters()).device
        self.totals = torch.zeros(1, 2, dtype=torch.float64, device=device)
        self.grad_norm: Tensor | None = None
        self._closure = takes_closure(optimizer)
        policy = "rescale" if self.scaler is not None else config.on_nonfinite
        self.guard = FiniteGuard(self.modules, optimizer, plan, policy, on_host=True if self._closure else None)
        self.new_reducer = new_reducer
        self.reducer: Reducer | None = None  # until the first micro-batch
        self.parameters = list(objective.trained().values())
        self._set_totals(self.totals)
        # The totals of the rows since `take_means`, less what it has counted already.
        self._before: list[list[float]] = []
        self._samples = (1, torch.ones((), dtype=torch.float64, device=device))
        self._factor = torch.ones((), dtype=torch.float64, device=device)
        self._own_optimizer = not type(optimizer).__module__.startswith("torch.")

    def renew_reducer(self) -> None:
        """Train the parameters that require a gradient now, through a new reducer."""
        if self.reducer is not None:
            self.reducer.close()
        self.reducer = None
        self.parameters = list(self.objective.trained().values())

    def __call__(self, work: StepWork, want_norm: bool) -> None:
        """Run the optimizer step that `work` describes.

        Raises:
            NonFiniteError: before the update where the check can act there (see `FiniteGuard`).
        """
        before = BufferSnapshot(self.modules) if self.guard.skips or self._closure else None
        closure: Closure | None = None
        if self._closure:
            assert before is not None
            work, closure = replayed(work, self._gradient_again, self.parameters, before)
        sums = self._gradient(work, want_norm)
        if closure is not None:
            closure.computed(sums)
        if self._own_optimizer:  # one that draws random numbers (SGLD) draws the same on all ranks
            seed_forward(self.seed, work.step, work.samples, self.device)
        self._update(sums, before, closure)
        for parameter in self.parameters:
            parameter.grad = None

    def _gradient(self, work: StepWork, want_norm: bool) -> StepSums:
        """The gradient that the optimizer gets, in every `.grad`."""
        sums = self._forward_backward(work)
        if self._on_host is not None:
            sums = sums._replace(weight=float(sums.weight))
        status.phase = UPDATE
        gradients = gradient_values(self.parameters)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.guard.begin(work.step + 1)
        self._divide(gradients, sums.weight, work.samples)
        self.guard.check(gradients, sums.loss, sums.weight)
        if want_norm or self._clips:
            self._clip(gradients, want_norm)
        return sums

    def _gradient_again(self, work: StepWork) -> StepSums:
        """For a closure; the norm stays that of the step's first gradient. Raises NonFiniteError."""
        norm, sums = self.grad_norm, self._gradient(work, want_norm=False)
        self.guard.read(sums.loss)
        self.grad_norm = norm
        return sums

    def _forward_backward(self, work: StepWork) -> StepSums:
        scale = 1.0 if self.summed else 1.0 / work.samples
        status.phase, torch_alone = DATA, self.objective.draws_from_torch
        for micro, item in self.objective.items(work, self.prepare):
            status.phase = FORWARD
            status.item += 1
            reducer = self.reducer or self._begin(item)
            seed_forward(self.seed, work.step, micro.position, self.device, torch_alone=torch_alone)
            reducer.forward_backward(item, micro, scale=scale)
            status.phase = DATA
        assert self.reducer is not None
        return self.reducer.finish()

    def _begin(self, item: Item) -> Reducer:
        """Before the first step of every start: the reducer, once it is known how many losses there are (see `warm_up`)."""
        kept = BufferSnapshot(self.modules, frozen=True)

        def rewind() -> None:
            kept.restore()
            seed_forward(self.seed, 0, 0, self.device)

        if self.objective.terms is None and self.objective.ranks > 1:
            rewind()
            self.objective.forward(clone_batch(item))
        self.reducer = self.new_reducer()
        self.reducer.warm_up(item, rewind)
        kept.restore()
        return self.reducer

    def _divide(self, gradients: Sequence[Tensor], weight: Tensor | float, samples: int) -> None:
        """Gradients over the sample count become gradients over the loss's own weight; zero where that is zero."""
        if self.summed:
            return
        # In float64, which is exact for integers. x / 0 becomes 0, and 0 / 0 doesn't occur.
        if not isinstance(weight, Tensor):
            if weight == samples:  # as usual
                return
            self._factor.fill_(samples / weight if weight else 0.0)
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

    def _update(self, sums: StepSums, before: BufferSnapshot | None, closure: Closure | None) -> None:
        bad, (loss, weight, terms) = False, sums
        if self.scaler is not None:  # by itself it skips only for what it saw before the division
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                torch.maximum(found, self.guard.found, out=found)  # kernels compare it with 1
        if self.guard.on_host:
            bad = self.guard.read(loss, self.grad_norm)
            if bad and before is not None:
                before.restore()
        else:
            good = self.guard.found == 0
            weight = weight if isinstance(weight, Tensor) else torch.full_like(self._weight_total, weight)
            loss, weight = loss.where(good, 0), weight.where(good, 0)
            terms = None if terms is None else terms.where(good, 0)
            if before is not None:
                before.restore(~good)
        if not bad:
            if self._on_host is not None:
                self._on_host[0] += float(loss)
                self._on_host[1] += float(weight)
            else:
                self._loss_total.add_(loss)
                self._weight_total.add_(weight)
            if terms is not None:
                self._add_terms(terms)
            if closure is not None:
                closure.step(self.optimizer)
            elif self.scaler is None:
                take_step(self.optimizer)
            else:
                self.scaler.step(self.optimizer)  # reads a flag on the host unless the optimizer is fused
        if self.scaler is not None:
            self.scaler.update()

    def _add_terms(self, terms: Tensor) -> None:
        if len(self.totals) != 1 + len(terms):  # the first, or a changed task's
            self._set_totals(torch.cat([self.totals[:1], torch.zeros_like(terms)]))
        self.totals[1:].add_(terms)

    def _set_totals(self, totals: Tensor) -> None:
        self.totals = totals
        self._loss_total, self._weight_total = totals[0].unbind()  # views
        self._on_host = totals[0].numpy() if self.device.type == "cpu" else None  # another, which is quick to add to

    def take_row(self) -> dict[str, float]:
        """loss, those of named losses, grad_norm and skipped since the last row, for the next; waits for the device."""
        sums = self.totals.tolist()
        self._before = _added(self._before, sums)
        self.totals.zero_()
        row = self.objective.means(sums)
        if self.grad_norm is not None:
            row["grad_norm"], self.grad_norm = float(self.grad_norm), None
        if self.guard.skipped:
            row["skipped"] = self.guard.skipped
        return row

    def take_means(self) -> dict[str, float]:
        """loss and those of named losses since the last call, whatever rows were taken meanwhile; waits for the device."""
        sums = self.totals.tolist()
        means = self.objective.means(_added(self._before, sums))
        self._before = [[-total, -weight] for total, weight in sums]
        return means

    def read(self) -> None:
        """Read the flags of all steps so far. Raises as `FiniteGuard.read`."""
        self.guard.read()

    def state_dict(self) -> dict[str, Any]:
        """Open sums, counters and loss scale; call `read` first."""
        scale = self.scaler.state_dict() if self.scaler is not None else {}
        guard, before = self.guard, torch.tensor(self._before, dtype=torch.float64)
        counted = {"totals": self.totals, "before": before, "skipped": guard.skipped, "in_a_row": guard.in_a_row}
        return {**counted, "scaler": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._set_totals(state["totals"].view(-1, 2).to(self.device, copy=True))
        self._before = state["before"].tolist() if "before" in state else []
        self.guard.skipped, self.guard.in_a_row = state["skipped"], state["in_a_row"]
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _added(before: list[list[float]], sums: list[list[float]]) -> list[list[float]]:
    """Both together; the first one may be shorter (before the first step, say)."""
    missing = [[0.0, 0.0]] * (len(sums) - len(before))
    return [[a + c, b + d] for (a, b), (c, d) in zip([*before, *missing], sums, strict=False)]
