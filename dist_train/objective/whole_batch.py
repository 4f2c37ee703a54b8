"""A loss of the whole global batch over micro-batches and ranks: contrastive losses, losses of covariances.

As GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): a first pass computes
the outputs of all micro-batches without a graph, the loss of all ranks' outputs gives their gradient, and a second pass, with
the same random numbers and the buffers of before the first, carries it into the parameters. So the memory is that of one
micro-batch and of the outputs, and the gradient that of one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.objective.modules import BufferSnapshot, Modules
from dist_train.objective.objective import Item, Objective, trainable
from dist_train.objective.precision import Precision
from dist_train.runtime.seeding import seed_forward
from dist_train.runtime.world import gather_rows
from dist_train.task.batch import clone_batch, in_full_precision, map_tensors, tensors_in
from dist_train.task.task import WholeBatchTask, full_precision
from dist_train.task.terms import Computed, StepOutput, Term, combine, computed, weight_of
from dist_train.watch.status import FORWARD, SYNC, status

if TYPE_CHECKING:
    from dist_train.data.plan import MicroBatch, Plan, StepWork
    from dist_train.runtime.world import World


@dataclass
class Cached:
    """What the second pass of a micro-batch takes.

    Attributes:
        gradients: of the loss with respect to each tensor of the outputs. of_parameters: to those that the loss itself uses,
            by name; zeros but in one micro-batch of the step.
        loss: what the step's loss was; of one micro-batch of the step, None in the others.
    """

    batch: Any
    gradients: list[Tensor | None]
    of_parameters: dict[str, Tensor] = field(default_factory=dict)
    loss: Computed | None = None


class WholeBatch(Objective):
    """The objective of a task with `outputs` and `loss`."""

    def __init__(
        self,
        modules: Modules,
        task: WholeBatchTask,
        precision: Precision,
        scaler: torch.amp.GradScaler | None,
        world: World,
        plan: Plan,
    ):
        super().__init__(modules, task, precision, scaler, world.size)
        self.whole, self.world, self.plan, self.seed = task, world, plan, plan.seed
        self._first = True  # at the first step there are checks that wait for the device
        self._snapshot_frozen = True  # as long as a forward may change parameters that don't train

    def items(
        self, work: StepWork, prepare: Callable[[MicroBatch, StepWork], Any]
    ) -> Iterator[tuple[MicroBatch, Item]]:
        loaded = [(micro, prepare(micro, work)) for micro in work.micro_batches]
        outputs, targets = zip(*self._first_pass(loaded, work), strict=True)
        status.phase = SYNC
        of_all, targets_of_all = (self._gather(parts, work) for parts in (outputs, targets))
        self._first = False
        status.phase = FORWARD
        seed_forward(self.seed, work.step, work.samples, self.world.device)
        loss, gradients, of_parameters = self._differentiate(of_all, targets_of_all, work.samples)
        for k, (micro, batch) in enumerate(loaded):
            rows = slice(micro.position, micro.position + micro.samples)
            mine = [_share(gradient, rows) for gradient in gradients]
            if micro.zero_weight:  # a rank without samples of this batch runs one that doesn't count
                mine = [
                    g if g is None else torch.zeros_like(o) for g, o in zip(mine, tensors_in(outputs[k]), strict=True)
                ]
            first = self.world.is_main and k == 0
            # What isn't of one sample - a temperature among the outputs, a parameter of the loss - counts once.
            mine = [g if g is None or g.dim() or first else torch.zeros_like(g) for g in mine]
            extra = of_parameters if first else {name: torch.zeros_like(g) for name, g in of_parameters.items()}
            yield micro, Cached(batch, mine, extra, loss if first else None)

    def _first_pass(self, loaded: list[tuple[MicroBatch, Any]], work: StepWork) -> list[tuple[Any, Any]]:
        """Outputs and targets of each micro-batch, without a graph; buffers and numbers are as before afterwards."""
        kept = BufferSnapshot(self.modules, frozen=self._snapshot_frozen)
        found = []
        with torch.no_grad(), self.precision.autocast():
            for micro, batch in loaded:
                seed_forward(self.seed, work.step, micro.position, self.world.device)
                outputs, targets = self.whole.outputs(self.model, clone_batch(batch))
                if not micro.zero_weight:
                    _check_rows(outputs, targets, micro.samples)
                found.append((in_full_precision(outputs), targets))
        if self._first:
            self._snapshot_frozen = kept.frozen_changed()
        kept.restore()
        return found

    def _gather(self, parts: tuple[Any, ...], work: StepWork) -> Any:
        """Tensors of all micro-batches and ranks in the order of the global batch; of 0-dim ones rank 0's first."""
        if next(tensors_in(parts), None) is None:
            if parts[0] is not None:
                raise ValueError(
                    f"with whole_batch outputs and targets are tensors, to be gathered, or None, found {type(parts[0]).__name__}"
                )
            return None
        leaves = [list(tensors_in(part)) for part in parts]
        joined = []
        for tensors in zip(*leaves, strict=True):
            if not tensors[0].dim() and self._first:
                _check_equal(tensors)
            mine = (
                torch.cat([tensor.detach() for tensor in tensors]) if tensors[0].dim() else tensors[0].detach().clone()
            )
            joined.append(self._from_ranks(mine, work.samples))
        one = iter(joined)
        return map_tensors(lambda _: next(one), parts[0])

    def _from_ranks(self, mine: Tensor, samples: int) -> Tensor:
        world = self.world
        if world.size == 1:
            return mine
        if not mine.dim():
            first = mine.clone()
            torch.distributed.broadcast(first, 0)
            if self._first:
                _check_equal([first, mine])
            return first
        shares = [self.plan.share(samples, rank, world.size) for rank in range(world.size)]
        return gather_rows(mine, [share.stop - share.start for share in shares], world)

    def _differentiate(
        self, outputs: Any, targets: Any, samples: int
    ) -> tuple[Computed, list[Tensor | None], dict[str, Tensor]]:
        """The loss of the global batch, its gradients with respect to each tensor of the outputs, and to parameters in it."""
        leaves = map_tensors(lambda t: t.requires_grad_() if t.is_floating_point() or t.is_complex() else t, outputs)
        with torch.enable_grad(), full_precision([outputs, targets]):
            loss = computed(StepOutput(*self.whole.loss(leaves, targets)))
            self.factors = [] if loss.shared else [term.factor for term in loss.terms.values()]
            if not loss.shared:  # it is whole: each is divided by its own weight
                loss = combine(
                    loss.terms, {name: samples / weight_of(term) for name, term in loss.terms.items()}, samples
                )
        tensors, trained = list(tensors_in(leaves)), self.trained()
        asked = [tensor for tensor in tensors if tensor.requires_grad]
        found = torch.autograd.grad(trainable(loss).loss, [*asked, *trained.values()], allow_unused=True)
        of_outputs = iter(found[: len(asked)])
        gradients = [next(of_outputs) if tensor.requires_grad else None for tensor in tensors]
        used = zip(trained, found[len(asked) :], strict=True)
        terms = {name: Term(term.total.detach(), term.weight, term.factor) for name, term in loss.terms.items()}
        self.same_terms(loss)
        done = Computed(loss.loss.detach(), loss.weight, terms=terms)
        return done, gradients, {name: gradient for name, gradient in used if gradient is not None}

    def forward(self, item: Item) -> Computed:
        """The second pass: its backward carries the gradient of the global batch's loss into the parameters."""
        cached: Cached = item
        with self.precision.autocast():
            outputs = in_full_precision(self.whole.outputs(self.model, cached.batch)[0])
        trained = self.trained()
        found = zip(tensors_in(outputs), cached.gradients, strict=True)
        pairs = [(tensor, gradient) for tensor, gradient in found if gradient is not None]
        pairs += [(trained[name], gradient) for name, gradient in cached.of_parameters.items()]
        with full_precision(outputs):
            parts = [(tensor * gradient.conj()).real.sum() for tensor, gradient in pairs if tensor.requires_grad]
        loss = functools.reduce(torch.add, parts) if parts else torch.zeros(())
        zero = torch.zeros_like(loss.detach())
        if cached.loss is not None:
            return trainable(Computed(loss, cached.loss.weight, terms=cached.loss.terms, value=cached.loss.loss))
        terms = {name: Term(zero, 0.0) for name in self.terms or ()}
        return trainable(Computed(loss, 0.0, terms=terms, value=zero))


def _share(gradient: Tensor | None, rows: slice) -> Tensor | None:
    """The rows of some samples in a gradient over the global batch; of a 0-dim one all."""
    return gradient[rows] if gradient is not None and gradient.dim() else gradient


def _check_equal(scalars: Sequence[Tensor]) -> None:
    """Raises ValueError: an output that is one number isn't the same for all micro-batches."""
    if not all(torch.allclose(scalar, scalars[0], rtol=1e-3) for scalar in scalars):
        raise ValueError(
            "with whole_batch an output that is one number (a temperature) must be the same for each micro-batch, found "
            f"{', '.join(f'{float(scalar):.6g}' for scalar in scalars[:4])}: what depends on samples is one value for each"
        )


def _check_rows(outputs: Any, targets: Any, samples: int) -> None:
    """Raises ValueError: a tensor has other than `samples` rows, so that it can't be put together with those of other ranks."""
    for what, value in (("outputs", outputs), ("targets", targets)):
        for tensor in tensors_in(value):
            if tensor.dim() and len(tensor) != samples:
                raise ValueError(
                    f"with whole_batch each tensor of the {what} has a row for each sample, so that those of all micro-batches "
                    f"can be put together: expected {samples} rows, found the shape {tuple(tensor.shape)}. Return two "
                    "views as two tensors, and what belongs to no sample as a 0-dim tensor"
                )
