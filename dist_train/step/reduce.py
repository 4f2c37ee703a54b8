"""From micro-batches on many ranks to the one gradient of the global batch.

One small interface, three forms: `SingleProcess`, `DataParallel` around torch's DistributedDataParallel, and `OneBucket` for
small models on the CPU.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dist_train.step.exchange import Links
from dist_train.step.modules import Modules
from dist_train.step.precision import Precision
from dist_train.task.batch import copied
from dist_train.task.task import StepOutput, Task, as_step_output
from dist_train.watch.status import BACKWARD, status

if TYPE_CHECKING:
    from dist_train.config.schema import DistributedConfig
    from dist_train.runtime.world import World

# Buffers differ over the ranks, as in DDP everywhere. What is the same on all at the start is `Modules.agree`'s affair.
# torch 2.15 renamed the argument.
_DDP = nn.parallel.DistributedDataParallel
_RENAMED = "forward_sync_buffers" in inspect.signature(_DDP.__init__).parameters
_NOTHING_SENT: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False, "init_sync": False}
MOST_IN_ONE_BUCKET = 2**20  # bytes of gradients; DDP's own first bucket has this size


class Reducer(Protocol):
    """Runs forward and backward; after `finish` every parameter's `.grad` is the sum over all samples, times `scale`."""

    def warm_up(self, batch: Any, rewind: Callable[[], object]) -> None:
        """Settle whatever depends on the first backward; leaves weights, buffers and gradients as they were."""

    def forward_backward(self, batch: Any, *, scale: float, weightless: bool, last: bool) -> None:
        """Add one micro-batch's gradient of `scale * loss sum`; `last` marks this rank's last one of the step."""

    def finish(self) -> tuple[Tensor, Tensor]:
        """(loss sum, weight) of the step over all ranks and micro-batches: 0-dim tensors on the device."""

    def close(self) -> None:
        """Let go of the other ranks and of the parameters; all ranks call it."""


class _Tell(torch.autograd.Function):
    """`loss * factor`, whose backward also hands `told` to `report` as its gradient: no kernel more than the product."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, report: Tensor, told: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(told)
        ctx.factor = factor
        return loss * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (told,) = ctx.saved_tensors
        return gradients[0] * ctx.factor, told, None, None


class _Objective(nn.Module):
    """Model and task as one module, so that DDP sees the whole step as one forward.

    `report` is what the ranks tell each other. It is a parameter of two elements whose gradient *is* the pair (weight, loss
    sum) of a micro-batch: DDP adds it up over the ranks inside a bucket that it reduces anyway, so the global denominator and
    the global loss cost no collective of their own. No optimizer and no state_dict ever sees it.
    """

    def __init__(self, parts: Modules, task: Task, scaler: torch.amp.GradScaler | None, world_size: int):
        super().__init__()
        self.parts = parts
        self.task = (task,)  # in a tuple: its modules are among the parts
        self.scaler = scaler
        self.world_size = world_size
        trained = list(parts.trained().values())
        double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in trained)
        dtype = torch.float64 if double else torch.float32
        self.report = nn.Parameter(torch.zeros(2, dtype=dtype, device=trained[0].device))

    def forward(self, batch: Any, scale: float, weightless: bool) -> Tensor:
        output = with_gradient(self.task[0].step(self.parts.model, batch))
        loss = output.loss if self.scaler is None else self.scaler.scale(output.loss)
        if weightless:
            return _Tell.apply(loss, self.report, torch.zeros_like(self.report), 0.0)
        # DDP divides by the world size: multiplied first, whole numbers come back whole.
        told = torch.stack([self._reported(output.weight), self._reported(output.loss)]) * self.world_size
        return _Tell.apply(loss, self.report, told, scale * self.world_size)

    def _reported(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self.report, non_blocking=True)
        return torch.full(
            (), value, dtype=self.report.dtype, device=self.report.device
        )  # as_tensor would wait for the device


def with_gradient(value: Any) -> StepOutput:
    """A task's answer in training.

    Raises:
        ValueError: autograd doesn't know the loss, or it isn't real, or its weight would be trained.
    """
    output = as_step_output(value)
    if not output.loss.requires_grad or output.loss.is_complex():
        found = "a complex number" if output.loss.is_complex() else "no such"
        raise ValueError(
            f"expected a real loss that depends on a parameter that trains, found {found}: it was computed from detached values, "
            "under no_grad, or from what has no gradient (argmax, a comparison), or the model returns only what is frozen"
        )
    if isinstance(output.weight, Tensor) and output.weight.requires_grad:
        raise ValueError(
            "the weight of a loss is what it is divided by, so it must not depend on parameters: detach() it"
        )
    return output


class DataParallel:
    """Gradients summed over all ranks by DDP's overlapped all-reduce, the only collective of a step."""

    def __init__(
        self,
        modules: Modules,
        task: Task,
        precision: Precision,
        scaler: torch.amp.GradScaler | None,
        *,
        world_size: int,
        bucket_mb: float,
        find_unused_parameters: bool,
    ):
        self.precision = precision
        self.find_unused = find_unused_parameters
        self.objective = _Objective(modules, task, scaler, world_size)
        self.ddp = _DDP(
            self.objective,
            bucket_cap_mb=bucket_mb,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,
            **_NOTHING_SENT,
        )

    def warm_up(self, batch: Any, rewind: Callable[[], object]) -> None:
        """Two discarded steps: DDP lays its buckets out anew after its first backward, and until then sums in another order.

        Without this the first step after each start would differ in its last bits from the same step in the middle of a run.

        Raises:
            ValueError: parameters took no part in the loss; their names are in the message.
        """
        for _ in range(2):
            rewind()
            self.forward_backward(copied(batch), scale=1.0, weightless=False, last=True)
            if not self.find_unused:
                _name_unused(self.objective.parts.trained())
        for parameter in self.objective.parameters():
            parameter.grad = None

    def forward_backward(self, batch: Any, *, scale: float, weightless: bool, last: bool) -> None:
        """See `Reducer`; gradients travel with the last micro-batch only."""
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            with self.precision.autocast():
                objective = self.ddp(batch, scale, weightless)
            status.phase = BACKWARD
            if last:  # from here on the ranks wait for each other
                status.busy += time.perf_counter() - status.began
            objective.backward()

    def finish(self) -> tuple[Tensor, Tensor]:
        """See `Reducer`."""
        told = self.objective.report.grad
        assert told is not None
        weight, loss = told.clone().unbind()  # the gradient itself is a view into a bucket
        self.objective.report.grad = None
        return loss, weight

    def close(self) -> None:
        """See `Reducer`."""
        del self.ddp, self.objective


def _name_unused(trained: Mapping[str, nn.Parameter]) -> None:
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise ValueError(
            f"{len(unused)} parameter(s) took no part in the loss: {shown}. On several processes each gradient is waited for: "
            "freeze or remove them, or set distributed.find_unused_parameters=true (slower)"
        )


class SingleProcess:
    """One process: gradients are summed where they arise."""

    def __init__(self, modules: Modules, task: Task, precision: Precision, scaler: torch.amp.GradScaler | None):
        self.model, self.task, self.precision, self.scaler = modules.model, task, precision, scaler
        self._loss: Tensor | None = None
        self._weight: Tensor | float = 0.0
        self._factor = (0.0, torch.empty(0))

    def warm_up(self, batch: Any, rewind: Callable[[], object]) -> None:
        """Nothing to settle."""

    def forward_backward(self, batch: Any, *, scale: float, weightless: bool, last: bool) -> None:
        """See `Reducer`."""
        with self.precision.autocast():
            output = with_gradient(self.task.step(self.model, batch))
        loss = output.loss
        status.phase = BACKWARD
        if self.scaler is not None:
            self.scaler.scale(loss * scale).backward()
        else:
            if self._factor[0] != scale:
                self._factor = (scale, torch.full_like(loss, scale))
            loss.backward(
                self._factor[1]
            )  # a factor in the backward costs nothing; in the forward it would be two more kernels
        loss = loss.detach()
        if self._loss is None:
            self._loss, self._weight = loss, output.weight
        else:
            self._loss, self._weight = self._loss.double() + loss, self._weight + output.weight

    def finish(self) -> tuple[Tensor, Tensor]:
        """See `Reducer`."""
        assert self._loss is not None
        loss, weight, self._loss = self._loss, self._weight, None
        return loss, weight if isinstance(weight, Tensor) else torch.full_like(loss, weight, dtype=torch.float64)

    def close(self) -> None:
        """See `Reducer`."""


class OneBucket(SingleProcess):
    """Gradients that fit one bucket, on the CPU: summed where they arise, then over the ranks, pair by pair.

    DDP too would send them all after the last backward, so there is nothing to overlap, and gloo's all-reduce, a ring of many
    small messages, takes most of a small model's step (bench/RESULTS.md). Here each of log2(ranks) rounds is one message from
    and one to another rank (recursive doubling: Thakur, Rabenseifner and Gropp 2005), and a rank without samples sends zeros.
    a + b has the bits of b + a, so all ranks get the same sums, from the first step on.
    """

    def __init__(
        self,
        modules: Modules,
        task: Task,
        precision: Precision,
        scaler: torch.amp.GradScaler | None,
        world: World,
    ):
        super().__init__(modules, task, precision, scaler)
        self.rank, self.world_size = world.rank, world.size
        self.doubled = 1 << (world.size.bit_length() - 1)  # ranks below take part in all rounds
        self.beyond = self.rank ^ self.doubled  # a rank's partner on the other side of it
        partners = [self.rank ^ distance for distance in self._distances()]
        self.links = Links(world, [other for other in (*partners, self.beyond) if other < world.size])
        self.trained = modules.trained()
        self.parameters = list(self.trained.values())
        sizes = [parameter.numel() for parameter in self.parameters]
        self.bucket = torch.zeros(sum(sizes) + 2, dtype=self.parameters[0].dtype)  # the last two: loss sum and weight
        self.received = torch.empty_like(self.bucket)
        *parts, self.told = self.bucket.split([*sizes, 2])
        self.views = [_laid_out(part, parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def forward_backward(self, batch: Any, *, scale: float, weightless: bool, last: bool) -> None:
        """See `Reducer`."""
        if not weightless:
            super().forward_backward(batch, scale=scale, weightless=False, last=last)

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor]:
        """See `Reducer`."""
        status.phase = BACKWARD
        status.busy += time.perf_counter() - status.began  # from here on the ranks wait for each other
        if self._loss is None:
            self.bucket.zero_()
        else:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            if len(gradients) < len(self.views):
                _name_unused(self.trained)
            torch._foreach_copy_(self.views, gradients)
            self.told[0], self.told[1] = super().finish()
        self._exchange()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view
        loss, weight = self.told.clone().unbind()
        return loss, weight

    def close(self) -> None:
        """See `Reducer`."""
        self.links.close()

    def _distances(self) -> list[int]:
        rounds = self.doubled.bit_length() - 1 if self.rank < self.doubled else 0
        return [1 << number for number in range(rounds)]

    def _exchange(self) -> None:
        """The bucket becomes the sum over all ranks. Ranks beyond a power of two hand theirs to a partner, and get the sum."""
        links, bucket, paired = self.links, self.bucket, self.beyond < self.world_size
        if self.rank >= self.doubled:
            links.send(bucket, self.beyond)
            links.receive(bucket, self.beyond)
            return
        if paired:
            links.receive(self.received, self.beyond)
            bucket += self.received
        for distance in self._distances():
            links.swap(bucket, self.received, self.rank ^ distance)
            bucket += self.received
        if paired:
            links.send(bucket, self.beyond)


def _laid_out(part: Tensor, parameter: Tensor) -> Tensor:
    """A view of `part` with the parameter's strides: fused optimizers walk through memory, not through indices."""
    return part.as_strided(parameter.shape, torch.empty_like(parameter).stride(), part.storage_offset())


def reducer_for(
    modules: Modules,
    task: Task,
    precision: Precision,
    scaler: torch.amp.GradScaler | None,
    world: World,
    config: DistributedConfig,
) -> Reducer:
    """The form that suits the processes, the model and the config."""
    what = (modules, task, precision, scaler)
    if world.size == 1:
        return SingleProcess(*what)
    if config.strategy == "auto" and not config.find_unused_parameters and _fits_one_bucket(modules, config.bucket_mb):
        return OneBucket(*what, world)
    return DataParallel(
        *what,
        world_size=world.size,
        bucket_mb=config.bucket_mb,
        find_unused_parameters=config.find_unused_parameters,
    )


def _fits_one_bucket(modules: Modules, bucket_mb: float) -> bool:
    """Whether the gradients lie on the CPU, are dense, of one kind and small."""
    parameters = modules.trained().values()
    kinds = {(parameter.device.type, parameter.dtype) for parameter in parameters}
    return (
        kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})
        and sum(parameter.nbytes for parameter in parameters) <= min(bucket_mb * 2**20, MOST_IN_ONE_BUCKET)
        and not any(getattr(module, "sparse", False) for module in modules.modules())
    )
