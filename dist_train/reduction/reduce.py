"""From micro-batches on many ranks to the gradient of the global batch, behind one interface with four forms.

`SingleProcess`, `DataParallel` around torch's DistributedDataParallel, `OneBucket` for small models on the CPU, and
`bitwise.Bitwise`, whose sums have the same bits on any number of processes.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dist_train.objective.modules import BufferSnapshot
from dist_train.objective.objective import (
    Item,
    Objective,
    SingleProcess,
    StepSums,
    check_all_used,
    reported,
    step_sums,
)
from dist_train.reduction.bitwise import Bitwise
from dist_train.reduction.buckets import FIRST_BYTES, Bucket
from dist_train.reduction.links import Links
from dist_train.reduction.tree import Node, Partials, peers
from dist_train.task.batch import clone_batch
from dist_train.watch.status import BACKWARD, status

if TYPE_CHECKING:
    from dist_train.config.schema import DistributedConfig
    from dist_train.data.plan import MicroBatch
    from dist_train.runtime.world import World

_DDP = nn.parallel.DistributedDataParallel
# `Modules.synchronize` makes everything equal at the start; after that buffers may differ between ranks, as in any DDP loop.
# torch 2.15 renamed the argument.
_RENAMED = "forward_sync_buffers" in inspect.signature(_DDP.__init__).parameters
_NO_BROADCAST: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False, "init_sync": False}


class Reducer(Protocol):
    """Runs forward and backward; after `finish` every `.grad` is the sum over all samples of all ranks, times `scale`."""

    def warm_up(self, item: Item, rewind: Callable[[], object]) -> None:
        """Finish whatever the first backward sets up; gradients are None again afterwards, the caller restores the rest.

        `rewind` restores buffers and seeds the generators; it is called before each forward.
        """

    def forward_backward(self, item: Item, micro: MicroBatch, *, scale: float) -> None:
        """Add one micro-batch's gradient of `scale * loss sum`; `item` is what the objective takes for it."""

    def finish(self) -> StepSums:
        """The sums of the step over all ranks and micro-batches."""

    def close(self) -> None:
        """Release parameters and connections; all ranks call it."""


class _Reporting(torch.autograd.Function):
    """`loss * factor`, whose backward also makes `values` the gradient of `report`: no kernels beyond the product."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, report: Tensor, values: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.factor = factor
        return loss * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (values,) = ctx.saved_tensors
        return gradients[0] * ctx.factor, values, None, None


class ReportingObjective(nn.Module):
    """The objective as one module, so that DDP sees a single forward.

    `report` is a parameter whose gradient *is* (weight, loss sum) of a micro-batch, followed by (sum, weight) of each named loss:
    DDP sums it over the ranks in a bucket that it reduces anyway, so the global denominator and loss need no collective of their
    own. No optimizer and no state_dict sees it.
    """

    def __init__(self, objective: Objective, world_size: int):
        super().__init__()
        self.modules_trained = objective.modules  # registers the parameters
        self.objective, self.world_size = objective, world_size
        trained = list(objective.trained().values())
        double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in trained)
        dtype = torch.float64 if double else torch.float32
        size = 2 + 2 * objective.pairs
        self.report = nn.Parameter(torch.zeros(size, dtype=dtype, device=trained[0].device))

    def forward(self, item: Item, scale: float, zero_weight: bool) -> Tensor:
        output, scaler = self.objective.forward(item), self.objective.scaler
        loss = output.loss if scaler is None else scaler.scale(output.loss)
        if zero_weight:
            return _Reporting.apply(loss, self.report, torch.zeros_like(self.report), 0.0)
        # DDP divides by the world size: after a product with it, integers stay integers.
        values = reported(output, self.report) * self.world_size
        return _Reporting.apply(loss, self.report, values, scale * self.world_size)


class DataParallel:
    """Gradients summed over all ranks by DDP's overlapped all-reduce, the only collective of a step."""

    def __init__(self, objective: Objective, world_size: int, config: DistributedConfig):
        self.find_unused = config.find_unused_parameters
        self.trained = objective.trained()
        self.objective = ReportingObjective(objective, world_size)
        self.ddp = _DDP(
            self.objective,
            bucket_cap_mb=config.bucket_mb,
            find_unused_parameters=self.find_unused,
            gradient_as_bucket_view=True,
            **_NO_BROADCAST,
        )

    def warm_up(self, item: Item, rewind: Callable[[], object]) -> None:
        """Two discarded steps: DDP rebuilds its buckets after its first backward, and until then sums in another order.

        Without them the first step after a start would differ in its last bits from the same step in the middle of a run.

        Raises:
            ValueError: parameters took no part in the loss; names them.
        """
        for _ in range(2):
            rewind()
            self._add(clone_batch(item), scale=1.0, zero_weight=False, last=True)
            if not self.find_unused:
                check_all_used(self.trained)
        for parameter in self.objective.parameters():
            parameter.grad = None

    def forward_backward(self, item: Item, micro: MicroBatch, *, scale: float) -> None:
        kept = BufferSnapshot(self.objective.modules_trained) if micro.zero_weight else None
        self._add(item, scale=scale, zero_weight=micro.zero_weight, last=micro.last)
        if kept is not None:
            kept.restore()

    def _add(self, item: Item, *, scale: float, zero_weight: bool, last: bool) -> None:
        # gradients are reduced with the last micro-batch only
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            loss = self.ddp(item, scale, zero_weight)
            status.phase = BACKWARD
            if last:  # from here on the ranks wait for each other
                status.busy += time.perf_counter() - status.began
            loss.backward()

    def finish(self) -> StepSums:
        assert self.objective.report.grad is not None
        reported = self.objective.report.grad.clone()  # the gradient itself is a view into a bucket
        self.objective.report.grad = None
        return step_sums(reported)

    def close(self) -> None:
        del self.ddp, self.objective, self.trained


class OneBucket(SingleProcess):
    """Gradients that fit one bucket, on the CPU: summed on each rank, then over the ranks, pair by pair.

    DDP too would reduce them all after the last backward, so there is nothing to overlap, and gloo's all-reduce, a ring of many
    small messages, takes most of a small model's step (bench/RESULTS.md). Here the ranks are leaves of a tree (`reduction.tree`),
    so that all get the same sums, from the first step on.
    """

    def __init__(self, objective: Objective, world: World):
        super().__init__(objective)
        self.rank, self.world_size = world.rank, world.size
        self.links = Links(world, peers(world.rank, world.size))
        self.trained = objective.trained()
        self.parameters = list(self.trained.values())
        like = self.parameters[0]
        self.report = like.new_zeros(2 + 2 * objective.pairs)  # see `step_sums`
        self.bucket = Bucket(world.rank, world.size, self.links, [*self.parameters, self.report])

    def forward_backward(self, item: Item, micro: MicroBatch, *, scale: float) -> None:
        if not micro.zero_weight:
            super().forward_backward(item, micro, scale=scale)

    @torch.no_grad()
    def finish(self) -> StepSums:
        status.phase = BACKWARD
        status.busy += time.perf_counter() - status.began  # from here on the ranks wait for each other
        if self._loss is None:
            self.report.zero_()
            gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        else:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            if len(gradients) < len(self.parameters):
                check_all_used(self.trained)
            sums = super().finish()
            self.report[0], self.report[1] = sums.weight, sums.loss
            if sums.terms is not None:
                self.report[2:] = sums.terms.view(-1)
        mine = Partials(self.world_size)
        mine.add(Node(0, self.rank), [*gradients, self.report])
        *totals, report = self.bucket.summed(mine)
        for parameter, total in zip(self.parameters, totals, strict=True):
            parameter.grad = total
        return step_sums(report.clone())

    def close(self) -> None:
        self.links.close()


def fits_one_bucket(objective: Objective, bucket_mb: float) -> bool:
    """Whether the gradients are on the CPU, dense, of one dtype and small."""
    parameters = objective.trained().values()
    kinds = {(parameter.device.type, parameter.dtype) for parameter in parameters}
    return (
        kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})
        and sum(parameter.nbytes for parameter in parameters) <= min(bucket_mb * 2**20, FIRST_BYTES)
        and not any(getattr(module, "sparse", False) for module in objective.modules.modules())
    )


def reducer_for(objective: Objective, world: World, config: DistributedConfig) -> Reducer:
    """The form that suits the processes, the model and the config.

    Raises:
        ValueError: the ranks' tasks give different losses.
    """
    if world.size == 1:
        return Bitwise(objective, world, config) if config.reproducibility == "bitwise" else SingleProcess(objective)
    every, weights = zip(*world.all_gather((objective.terms, objective.ratios)), strict=True)
    if any(len(w) != len(weights[0]) or math.dist(w, weights[0]) > 1e-9 for w in weights):
        raise ValueError(
            f"the weights of the losses {', '.join(objective.terms or ())} have other ratios on each rank, by which one backward "
            "can't divide afterwards: give the task a method weights(batch) that returns {name: weight}, or one weight to all"
        )
    if any(terms != every[0] for terms in every):
        raise ValueError(
            f"the ranks' tasks give different losses: {every}; give the same ones, in one order, for every batch"
        )
    if config.reproducibility == "bitwise":
        return Bitwise(objective, world, config)
    small = config.strategy == "auto" and not config.find_unused_parameters
    if small and fits_one_bucket(objective, config.bucket_mb):
        return OneBucket(objective, world)
    return DataParallel(objective, world.size, config)
