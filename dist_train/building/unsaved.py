"""State that training changes and no checkpoint holds: a fresh model with a checkpoint's weights then computes something else.

`doctor` compares after three steps of a dry run. A fresh start compares copies before its own first step, on the first
micro-batch: no extra sample is read (a dataset may have a generator of its own), streams work too, and live objects, which
can't be built twice, can be copied.
"""

from __future__ import annotations

import copy
import gc
import logging
import sys
import time
import types
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.building.model import ModelParts, Saved, load_weights
from dist_train.data.digest import content_digest
from dist_train.runtime.compiler import defer_compiler, uncompiled
from dist_train.runtime.seeding import seed_forward, undisturbed_generators
from dist_train.task.batch import clone_batch, tensors_in
from dist_train.task.samplewise import rows_of
from dist_train.task.terms import Computed, computed

if TYPE_CHECKING:
    from dist_train.objective.modules import Modules

# Above these the check at the start is skipped: bytes and objects to copy, elements of a batch times parameters, seconds of
# a step. The default model takes 25 ms, some of which the run's own first step saves.
BYTES, OBJECTS, WORK, SECONDS = 16 << 20, 20_000, 1e10, 0.02
SAMPLES, STEPS, LR = 8, 3, 1e-3
PLAIN = (bool, int, float, str, list, tuple, dict, set, deque, np.ndarray, Tensor)  # attributes that may be named
_OF_MODULES = vars(nn.Module()).keys()


def copied(parts: ModelParts) -> ModelParts:
    """A copy with modules and a task of its own."""
    modules, task = copy.deepcopy((parts.modules, parts.task))
    return replace(parts, modules=modules, task=task)


def training_forward(parts: ModelParts, batch: Any, step: int = 0) -> Computed:
    """Loss and outputs of a forward as in training, never compiled."""
    seed_forward(parts.config.seed, step, 0, parts.world.device)
    with parts.precision.autocast(), uncompiled():
        return computed(parts.task.step(parts.model, clone_batch(batch)))


def _train(parts: ModelParts, batch: Any, step: int) -> None:
    """A step of gradient descent that touches nothing but this model's parameters: no hooks, no `.grad`."""
    loss, parameters = training_forward(parts, batch, step).loss, list(parts.modules.trained().values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.add_(gradient, alpha=-LR)


def unsaved_state(trained: ModelParts, fresh: ModelParts, found: Saved, batch: Any) -> str:
    """What training has changed in a model, its loss or its task that a checkpoint doesn't hold, as a warning; "" for nothing.

    Args:
        trained: after training. fresh: as it was built. found: the checkpoint of the trained one.
        batch: on the device.
    """
    load_weights(fresh.modules, found)
    modes = {name: module.training for name, module in trained.modules.named_modules()}
    for name, module in fresh.modules.named_modules():
        module.training = modes.get(name, module.training)
    ours, theirs = _values(trained, batch), _values(fresh, batch)
    if len(ours) == len(theirs) and all(map(_same, ours, theirs)):
        return ""
    names = ", ".join(_differing(trained, fresh)) or "an object that can't be inspected, or a generator of its own"
    return (
        "training changes state that no checkpoint holds, so that a resumed run differs from one that never stopped: "
        f"{names}. Make it a buffer, or a number that __init__ makes; draw from torch's, numpy's or Python's own generators"
    )


def unsaved_at_start(start: ModelParts, batch: Any, length: int) -> str:
    """As `unsaved_state`, before the first step of a run: copies of `start` train on some of the `length` samples of `batch`.

    "" also where that would cost much or proves nothing. It never raises, changes nothing (generators included), and runs on
    one rank alone: a collective inside a forward ends it.
    """
    try:
        some = rows_of(batch, length, slice(0, SAMPLES))
        if not (_is_little_work(start, some) and is_cheap_to_copy([start.modules, start.task])):
            return ""
        others = torch.distributed.is_available() and torch.distributed.is_initialized()
        with undisturbed_generators(start.world.device), NoCollectives() if others else nullcontext():
            return _compare(start, some)
    except Exception as error:  # the user's code: whatever is wrong with it shows in training
        text = "whether checkpoints hold all state wasn't checked: %s: %s"
        logging.getLogger("dist_train").debug(text, type(error).__name__, error)
        return ""


def _compare(start: ModelParts, batch: Any) -> str:
    trained = copied(start)
    if not {*map(id, _owned(trained))}.isdisjoint(map(id, _owned(start))):
        return ""  # by a __deepcopy__ of its own: the run's model would be trained here
    for step in range(STEPS):
        began = time.thread_time()
        _train(trained, batch, step)
        limit = SECONDS if step else 5 * SECONDS  # the first one loads kernels, which on a GPU the run must do anyway
        if time.thread_time() - began > limit and (step or start.world.device.type == "cpu"):
            return ""
    found = _Held(trained.modules)
    if not (warning := unsaved_state(trained, copied(start), found, batch)):
        return ""
    # Where kernels sum in any order, or the clock is read, two models that have loaded the same differ as well.
    other = copied(start)
    load_weights(other.modules, found)
    return "" if unsaved_state(other, copied(start), found, batch) else warning


class _Held:
    """What a checkpoint would hold of a model, in memory."""

    location = "memory"

    def __init__(self, modules: Modules):
        states = {"model": modules.model.state_dict(), "task": modules.task_state(), "ranks": [modules.unsaved()]}
        self._states = copy.deepcopy(states)
        self.parts = list(states)

    def load(self, part: str) -> Any:
        return self._states[part]


class NoCollectives(TorchDispatchMode):
    """The other ranks don't take part: a collective would be matched with one of their first step."""

    def __enter__(self) -> Any:
        defer_compiler(type(self))
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError(f"{func} is called in a forward")
        return func(*args, **(kwargs or {}))


def _is_little_work(start: ModelParts, batch: Any) -> bool:
    parameters = sum(parameter.numel() for parameter in start.modules.parameters())
    return parameters * sum(tensor.numel() for tensor in tensors_in(batch)) <= WORK


def is_cheap_to_copy(todo: list[Any]) -> bool:
    """Whether all that a deep copy of these would visit is small, and safe to copy.

    Unsafe are functions that close over something (a copy's hook would write into the original's list), and objects that
    clean up when they are deleted.
    """
    seen, size = set[int](), 0
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if value.__closure__:
                return False
            continue
        size += _bytes(value)
        if size > BYTES or len(seen) > OBJECTS or hasattr(type(value), "__del__"):
            return False
        todo += gc.get_referents(value)
    return True


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # a view's whole memory is copied
        return value.untyped_storage().nbytes()
    return value.nbytes if isinstance(value, Tensor | np.ndarray) else sys.getsizeof(value)


def _owned(parts: ModelParts) -> Iterator[Any]:
    yield from parts.modules.modules()
    yield from parts.modules.parameters()
    yield from (slot.value for slot in parts.modules.buffers_at if slot.value is not None)


def _values(parts: ModelParts, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        output = training_forward(parts, batch)
    return [output.loss.detach(), *(tensor.detach() for tensor in tensors_in(output.outputs))]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _differing(trained: ModelParts, fresh: ModelParts) -> Iterator[str]:
    """Names of the attributes that differ."""
    modules = zip(trained.modules.named_modules(), fresh.modules.named_modules(), strict=False)
    pairs: list[tuple[str, Any, Any]] = [(name, module, other) for (name, module), (_, other) in modules]
    for name, one, other in [*pairs, ("task", trained.task, fresh.task)]:
        ours, theirs = getattr(one, "__dict__", {}), getattr(other, "__dict__", {})
        for key in sorted((ours.keys() | theirs.keys()) - _OF_MODULES):
            values = ours.get(key), theirs.get(key)
            if any(isinstance(value, PLAIN) for value in values) and len(set(map(content_digest, values))) > 1:
                yield f"{name}.{key}".strip(".")
