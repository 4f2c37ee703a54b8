"""The reducer whose sums have the same bits on any number of processes (`distributed.reproducibility: bitwise`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_train.objective.objective import (
    Item,
    Objective,
    StepSums,
    backward,
    check_all_used,
    reported,
    step_sums,
)
from dist_train.reduction.buckets import CPU_MB, Bucket, in_buckets
from dist_train.reduction.leaves import LeafState
from dist_train.reduction.links import Links
from dist_train.reduction.tree import Node, Partials, peers
from dist_train.watch.status import BACKWARD, status

if TYPE_CHECKING:
    from dist_train.config.schema import DistributedConfig
    from dist_train.data.plan import MicroBatch
    from dist_train.runtime.world import World


class Bitwise:
    """The gradient of each micro-batch is a leaf of one tree (`reduction.tree`), in which it doesn't matter who computes what.

    Beside it travel the loss sum and its weight, those of named losses, and running statistics (`LeafState`). Gradients go in
    buckets, in the order in which a backward computes them, all but the last while the rank's last backward still runs: on CUDA
    in a stream of their own, on the CPU in a thread.
    """

    def __init__(self, objective: Objective, world: World, config: DistributedConfig):
        self.objective, self.trained, self.state = objective, objective.trained(), LeafState(objective.modules)
        self.find_unused = config.find_unused_parameters
        parameters = list(self.trained.values())
        double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in parameters)
        size = 2 + 2 * objective.pairs + self.state.size + (len(parameters) if self.find_unused else 0)
        numbers = torch.zeros(size, dtype=torch.float64 if double else self.state.dtype, device=world.device)
        tensors = [numbers, *reversed(parameters)]
        most = min(config.bucket_mb, CPU_MB) if world.device.type == "cpu" else config.bucket_mb
        groups = [tensors] if world.size == 1 else in_buckets(tensors, most)
        self.links = None if world.size == 1 else Links(world, peers(world.rank, world.size))
        self.buckets = [Bucket(world.rank, world.size, self.links, group) for group in groups]
        names = {id(parameter): name for name, parameter in self.trained.items()}
        named = [[names[id(one)] for one in group if one is not numbers] for group in groups]
        self._parameters = [{name: self.trained[name] for name in group} for group in named]
        self._partials: list[Partials] = []  # of each bucket; empty before the first micro-batch of a step
        self._leaf, self._numbers = Node(0, 0), numbers
        # How many gradients of each bucket a backward computes, as this rank's first shows: it may come back to a parameter (one
        # in two reentrant checkpoints).
        self._expected: list[int] = []
        self._computed: list[int] = []  # so far, by the step's last backward; empty in the others
        self._sent: list[Callable[[], list[Tensor]]] = []  # each waits for a bucket's sums
        self._overlap = None if len(groups) == 1 or self.find_unused else _Overlap(world.device)
        self._hooks = []
        for k, group in enumerate(self._parameters if self._overlap else ()):
            hook = partial(self._is_there, k)
            self._hooks += [parameter.register_post_accumulate_grad_hook(hook) for parameter in group.values()]

    def warm_up(self, item: Item, rewind: Callable[[], object]) -> None:
        pass

    def forward_backward(self, item: Item, micro: MicroBatch, *, scale: float) -> None:
        if self._partials:
            self.state.rewind()
        else:
            self._partials = [Partials(micro.leaves) for _ in self.buckets]
            self.state.begin()
        output = self.objective.forward(item)
        self.state.check()
        if micro.zero_weight:  # it advances the counters, in a checkpoint the backward does too
            backward(output.loss, torch.zeros_like(output.loss))
            for parameter in self.trained.values():
                parameter.grad = None
            return
        values = reported(output, self._numbers)
        self._numbers = torch.cat([values, self.state.statistics().to(values)]) if self.state.size else values
        self._leaf = Node(0, micro.leaf)
        self._computed = [0] * len(self.buckets) if micro.last and self._overlap else []
        status.phase = BACKWARD
        if (scaler := self.objective.scaler) is not None:
            scaler.scale(output.loss * scale).backward()
        else:
            backward(output.loss, torch.full_like(output.loss, scale))
        self._expected = self._expected or self._computed
        self._computed = []
        for k in range(len(self._sent), len(self.buckets)):
            self._take(k)

    def _is_there(self, k: int, _: Tensor) -> None:
        """A gradient of bucket k is there. The last bucket is sent by `finish`: there is nothing left to overlap with.

        Raises ValueError: the bucket is under way, so that the gradient would be lost.
        """
        if not self._computed:
            return
        if k < len(self._sent):
            raise ValueError(
                "the backward came back more often than in the first step to a parameter, one of "
                f"{', '.join(self._parameters[k])}: with reentrant checkpoints that share parameters, use them equally often in "
                "each step, or set use_reentrant=False or distributed.find_unused_parameters=true"
            )
        self._computed[k] += 1
        while self._expected and (number := len(self._sent)) < len(self.buckets) - 1:
            if self._computed[number] < self._expected[number]:
                break
            assert self._overlap is not None
            self._take(number)
            self._sent.append(self._overlap.begin(partial(self.buckets[number].summed, self._partials[number])))

    @torch.no_grad()
    def _take(self, k: int) -> None:
        """The leaf's gradients of bucket k become part of its sums. Raises ValueError: there is none for some parameter."""
        group, numbers = self._parameters[k], [self._numbers] if k == 0 else []
        if not self.find_unused:
            check_all_used(group)
        elif numbers:
            used = [float(parameter.grad is not None) for parameter in self.trained.values()]
            numbers = [torch.cat([self._numbers, self._numbers.new_tensor(used)])]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group.values()]
        for parameter in group.values():
            parameter.grad = None
        self._partials[k].add(self._leaf, [*numbers, *gradients])

    @torch.no_grad()
    def finish(self) -> StepSums:
        status.phase = BACKWARD
        status.busy += time.perf_counter() - status.began  # from here on the ranks wait for each other
        totals = [wait() for wait in self._sent]
        rest = slice(len(totals), None)
        totals += [bucket.summed(sums) for bucket, sums in zip(self.buckets[rest], self._partials[rest], strict=True)]
        leaves = self._partials[0].leaves
        self._partials, self._sent = [], []
        values = 2 + 2 * self.objective.pairs  # see `reported`
        numbers, used = totals[0][0], None
        if self.state.size:
            self.state.finish(numbers[values : values + self.state.size] / leaves)
        if self.find_unused:  # waits for the device, as DDP does
            counts = dict(zip(self.trained, numbers[values + self.state.size :].tolist(), strict=True))
            used = {name for name, count in counts.items() if count}
        for group, tensors in zip(self._parameters, [totals[0][1:], *totals[1:]], strict=True):
            for (name, parameter), gradient in zip(group.items(), tensors, strict=True):
                parameter.grad = gradient if used is None or name in used else None
        return step_sums(numbers[:values].clone())

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._overlap is not None:
            self._overlap.close()
        if self.links is not None:
            self.links.close()


class _Overlap:
    """Runs communication beside the backward."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = None if self._stream else ThreadPoolExecutor(1, thread_name_prefix="dist_train-reduce")

    def begin(self, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Begin some work, after all that was begun before; the result waits for it, on CUDA the current stream."""
        if self._thread is not None:
            return self._thread.submit(work).result
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            tensors = work()
        event = self._stream.record_event()

        def wait() -> list[Tensor]:
            torch.cuda.current_stream().wait_event(event)
            return tensors

        return wait

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
