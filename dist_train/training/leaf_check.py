"""What `distributed.reproducibility: bitwise` can't carry, found by one micro-batch before the first step of a start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError, Problem
from dist_train.data.digest import content_digest
from dist_train.data.plan import StepWork
from dist_train.objective.modules import BufferSnapshot, Modules
from dist_train.reduction.leaves import LeafState, changed
from dist_train.runtime.compiler import uncompiled
from dist_train.runtime.seeding import seed_forward, undisturbed_generators
from dist_train.task.batch import clone_batch, tensors_in
from dist_train.task.task import OfOptimizer, SeveralLosses, WholeBatchTask
from dist_train.task.terms import computed

if TYPE_CHECKING:
    from dist_train.training.parts import Parts

_NO_DETERMINISTIC_FORM = ("does not have a deterministic implementation", "Deterministic behavior was enabled")


def check_leaves(parts: Parts) -> None:
    """Try the run's first micro-batch, forward and backward; modes, buffers and generators are as before. All ranks call it.

    Where the forward fails otherwise, training is left to report that.

    Raises:
        ConfigError: a forward changes a buffer that would depend on how micro-batches are dealt to processes; an operation has
            no deterministic form; a gradient is sparse, or there is none for some parameter.
    """
    try:
        _try(parts)
        found = []
    except ConfigError as error:
        found = [vars(problem) for problem in error.problems]
    for problems in parts.world.all_gather(found):
        if problems:
            raise ConfigError([Problem(**problem) for problem in problems])


def _try(parts: Parts) -> None:
    device, several = parts.world.device, isinstance(parts.task, SeveralLosses)
    with (
        undisturbed_generators(device, parts.datasets["train"]),
        uncompiled(),
        _restored(parts.modules),
    ):
        try:
            work = StepWork(0, 0, parts.plan.batch_samples(0), iter(()))
            batches = [parts.prepare(micro, work) for micro in parts.train_loader.first(2)]
        except Exception:
            return  # reported where training reads it
        for name in parts.owners.parameters if parts.owners is not None and several else [""]:
            only = parts.owners.only(name) if parts.owners is not None and name else contextlib.nullcontext()
            with only:
                task = OfOptimizer(parts.task.task, name) if isinstance(parts.task, SeveralLosses) else parts.task
                _step(parts, task, *batches)


def _step(parts: Parts, task: Any, batch: Any, another: Any = None) -> None:
    modules, trained, place = parts.modules, parts.modules.trained(), _Place(parts.modules)
    state, values, weights = LeafState(modules), _FixedValues(modules), _norms(trained)
    _refuse_renormalized(modules, trained)
    initial = state.counts()
    seed_forward(parts.config.seed, 0, 0, parts.world.device)
    state.begin()
    with place.watched():
        try:
            loss, gradients = _computed(parts, task, batch, trained)
        except Exception as error:
            if any(text in str(error) for text in _NO_DETERMINISTIC_FORM):
                raise ConfigError.single("distributed.reproducibility", place.refusal(error)) from error
            return  # reported where training meets it
    try:
        state.check()
    except ValueError as error:
        raise ConfigError.single("distributed.reproducibility", str(error)) from None
    another = batch if another is None else another
    try:
        name = values.changed() or _differing_count(parts, task, state, initial, another, trained)
        if not name and _norms(trained) != weights:
            name = _moving_weight(parts, task, state, trained, another)
        repeats = bool(name) or _repeats(parts, task, state, batch, another, loss)
    except Exception:
        return  # of another forward: reported where training meets it
    if name:
        raise ConfigError.single("distributed.reproducibility", changed(name))
    if not repeats:
        raise ConfigError.single("distributed.reproducibility", _remembers(modules))
    found = dict(zip(trained, gradients, strict=True))
    if sparse := [
        name for name, gradient in found.items() if gradient is not None and gradient.layout != torch.strided
    ]:
        message = f"bitwise can't sum sparse gradients, and that of {sparse[0]} is one: set sparse=False in its module"
        raise ConfigError.single("distributed.reproducibility", message)
    unused = [name for name, gradient in found.items() if gradient is None]
    whole = isinstance(parts.task, WholeBatchTask)
    if unused and not whole and not parts.config.distributed.find_unused_parameters:
        raise ConfigError.single(
            "distributed.find_unused_parameters",
            f"{len(unused)} parameter(s) take no part in the loss of the first micro-batch: {', '.join(unused[:5])}. With "
            "distributed.reproducibility=bitwise each gradient is summed over all micro-batches: freeze or remove them, or set "
            "this to true",
        )


@contextlib.contextmanager
def _restored(modules: Modules) -> Iterator[None]:
    kept = BufferSnapshot(modules, frozen=True)
    try:
        yield
    finally:
        kept.restore()


def _refuse_renormalized(modules: Modules, trained: Mapping[str, nn.Parameter]) -> None:
    """An embedding with `max_norm` writes the rows that a forward looks up, in whichever step they become too long."""
    names = {id(parameter): name for name, parameter in trained.items()}
    for module in modules.modules():
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.max_norm is not None
            and id(module.weight) in names
        ):
            raise ConfigError.single("distributed.reproducibility", changed(f"{names[id(module.weight)]} (max_norm)"))


@torch.no_grad()
def _norms(trained: Mapping[str, nn.Parameter]) -> list[float]:
    return [float(norm) for norm in torch._foreach_norm(list(trained.values()))]


def _moving_weight(parts: Parts, task: Any, state: LeafState, trained: Mapping[str, nn.Parameter], batch: Any) -> str:
    """The name of a weight that a second forward changes once more; "" for none, as with a constraint that is met then."""
    before = {name: content_digest(parameter.detach()) for name, parameter in trained.items()}
    state.rewind()
    with parts.precision.autocast():
        task.step(parts.model, clone_batch(batch))
    return next((name for name, p in trained.items() if content_digest(p.detach()) != before[name]), "")


def _repeats(parts: Parts, task: Any, state: LeafState, batch: Any, another: Any, loss: Tensor) -> bool:
    """Whether a micro-batch has the same loss after another one, as it must have: a rank computes any of them before it."""
    for one in (another, batch):
        state.rewind()
        seed_forward(parts.config.seed, 0, 0, parts.world.device)
        with parts.precision.autocast():
            again = computed(task.step(parts.model, clone_batch(one))).loss
    return content_digest(again.detach().cpu()) == content_digest(loss.cpu())


def _remembers(modules: Modules) -> str:
    known = {(id(slot.owner), slot.key) for slot in modules.buffers_at if slot.value is not None}
    found = []
    for place, module in modules.named_modules():
        for owner in (module._buffers, vars(module)):
            new = [key for key, value in owner.items() if isinstance(value, Tensor) and (id(owner), key) not in known]
            found += [f"{place}.{key}" if place else key for key in new]
    what = f"; it may be {', '.join(found[:5])}, which it has made in the forward" if found else ""
    return (
        "a micro-batch has another loss after a forward of another one: the model, loss or task keeps something between forwards "
        f"that isn't restored (a tensor made in the forward, in a list or dict, or a generator of its own){what}. With "
        "distributed.reproducibility=bitwise it would depend on how many micro-batches a process computes: leave it out, or set "
        "distributed.reproducibility=fast"
    )


def _computed(
    parts: Parts, task: Any, batch: Any, trained: Mapping[str, nn.Parameter]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of a micro-batch, and its gradients, which reentrant checkpoints give to `.grad` alone."""
    with parts.precision.autocast():
        loss = computed(task.step(parts.model, clone_batch(batch))).loss
    try:
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in trained.values()]
    finally:
        for parameter in trained.values():
            parameter.grad = None


def _differing_count(
    parts: Parts,
    task: Any,
    state: LeafState,
    initial: dict[str, Any],
    another: Any,
    trained: Mapping[str, nn.Parameter],
) -> str:
    """The name of an integer that another micro-batch advances by another amount, or that can't be restored as what wrote it
    has left no trace; "" for none. A backward may advance it too (BatchNorm in a checkpoint)."""
    before = state.counts()
    state.rewind()
    if name := next((name for name, value in state.counts().items() if value != initial.get(name)), ""):
        return name
    if before == state.counts():
        return ""
    _computed(parts, task, another, trained)
    now = state.counts()
    return next((name for name in now if now[name] != before.get(name)), "")


class _FixedValues:
    """Values of what mustn't change, which show also a write through `.data`."""

    def __init__(self, modules: Modules):
        self._slots = LeafState(modules).fixed
        self._copies = [slot.value.detach().cpu().clone() for slot in self._slots]

    def changed(self) -> str:
        """The name of one that has; "" for none."""
        pairs = zip(self._slots, self._copies, strict=True)
        return next((slot.name for slot, copy in pairs if not _equal(slot.value, copy)), "")


def _equal(now: Any, before: Tensor) -> bool:
    """Bit by bit: a buffer may hold nan."""
    return isinstance(now, Tensor) and content_digest(now.detach().cpu()) == content_digest(before)


class _Place:
    """Which module computes at the moment, in the forward or in the backward."""

    def __init__(self, modules: Modules):
        self.modules = modules
        self._inside: list[tuple[str, nn.Module]] = []
        self._backward: tuple[str, nn.Module] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Modules report themselves inside; in the backward when the gradient of their output is there."""
        handles = []
        for name, module in self.modules.named_modules():
            here = name, module
            handles.append(module.register_forward_pre_hook(lambda *_, here=here: self._inside.append(here)))
            handles.append(module.register_forward_hook(partial(self._leave, here)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, here: tuple[str, nn.Module], _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        self._inside.pop()
        for tensor in tensors_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._enter_backward, here))

    def _enter_backward(self, here: tuple[str, nn.Module], _: Tensor) -> None:
        self._backward = here

    def refusal(self, error: Exception) -> str:
        """What to say of an operation without a deterministic form."""
        forward = [("", self.modules.model), *self._inside][-1]
        name, module = self._backward or forward
        where = f"{name or 'the model'} ({type(module).__name__}) in the {'backward' if self._backward else 'forward'}"
        operation = str(error).split(" does not have", maxsplit=1)[0].strip()
        return (
            f"torch has no deterministic form of {operation}, which is needed by {where}: replace that module, or set "
            "distributed.reproducibility=fast"
        )
