"""Whether a fresh model that has loaded a checkpoint computes what the trained one does: if not, a resumed run differs.

`doctor` compares after three steps of a dry run. A fresh start compares copies before its own first step, on the first
micro-batch: no sample is read out of turn (a dataset may keep a generator of its own), streams work too, and live objects,
which can't be built twice, can be copied.
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

from dist_train.runtime.seeding import seed_forward, undisturbed_generators
from dist_train.task.batch import copied, tensors_in
from dist_train.task.samplewise import cut
from dist_train.task.task import StepOutput, as_step_output
from dist_train.training.model import ModelParts, Saved, load_weights

if TYPE_CHECKING:
    from dist_train.step.modules import Modules

# A check at the start that is larger or slower is skipped: bytes and objects to copy, numbers of a batch times parameters,
# and seconds of a step. The default model takes 25 ms, some of which the run's own first step saves.
BYTES, OBJECTS, WORK, SECONDS = 16 << 20, 20_000, 1e10, 0.02
SAMPLES, STEPS, LR = 8, 3, 1e-3
PLAIN = (bool, int, float, str, list, tuple, dict, set, deque, np.ndarray)  # told apart by their representation
_log = logging.getLogger("dist_train")


def _copied(parts: ModelParts) -> ModelParts:
    """With modules and a task of its own."""
    modules, task = copy.deepcopy((parts.modules, parts.task))
    return replace(parts, modules=modules, task=task)


def _forward(parts: ModelParts, batch: Any, step: int = 0) -> StepOutput:
    """Loss and outputs of a forward as in training, never compiled."""
    seed_forward(parts.config.seed, step, 0, parts.world.device)
    with parts.precision.autocast(), torch.compiler.set_stance("force_eager"):
        return as_step_output(parts.task.step(parts.model, copied(batch)))


def _train(parts: ModelParts, batch: Any, step: int) -> None:
    """A step of gradient descent that touches nothing but this model's parameters: no hooks, no `.grad`."""
    loss, parameters = _forward(parts, batch, step).loss, list(parts.modules.trained().values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.add_(gradient, alpha=-LR)


def forgotten(trained: ModelParts, fresh: ModelParts, found: Saved, batch: Any) -> str:
    """What training has left in a model, its loss or its task that a checkpoint doesn't hold, in words; "" for nothing.

    Args:
        trained: as training has left it. fresh: as it was built. found: the checkpoint that the trained one has saved.
        batch: on the device.
    """
    load_weights(fresh.modules, found)
    modes = {name: module.training for name, module in trained.modules.named_modules()}
    for name, module in fresh.modules.named_modules():
        module.training = modes.get(name, module.training)
    ours, theirs = _values(trained, batch), _values(fresh, batch)
    if len(ours) == len(theirs) and all(map(_same, ours, theirs)):
        return ""
    names = ", ".join(_differing(trained, fresh)) or "an object that can't be looked into, or a generator of its own"
    return (
        "training leaves something behind that no checkpoint holds, so that a stopped run doesn't go on as it would have: "
        f"{names}. Make it a buffer, or a number that __init__ makes; draw from torch's, numpy's or Python's own generators"
    )


def forgotten_at_start(start: ModelParts, batch: Any, length: int) -> str:
    """The same before the first step of a run, on copies of `start` that train on some of the `length` samples of `batch`.

    "" too where it would cost much, or where it can't be told. It raises nothing, leaves everything as it is (generators
    included), and runs on one rank alone: collectives inside a forward end it.
    """
    try:
        some = cut(batch, length, slice(0, SAMPLES))
        if not (_is_little_work(start, some) and _is_cheap_to_copy([start.modules, start.task])):
            return ""
        others = torch.distributed.is_available() and torch.distributed.is_initialized()
        with undisturbed_generators(start.world.device), _NoCollectives() if others else nullcontext():
            return _compare(start, some)
    except Exception as error:  # the user's code: whatever is wrong with it shows in training
        _log.debug(
            "whether a resumed run equals one that never stopped wasn't checked: %s: %s", type(error).__name__, error
        )
        return ""


def _compare(start: ModelParts, batch: Any) -> str:
    trained = _copied(start)
    if not {*map(id, _owned(trained))}.isdisjoint(map(id, _owned(start))):
        return ""  # by a __deepcopy__ of its own: it would be the run's that is trained here
    for step in range(STEPS):
        began = time.thread_time()
        _train(trained, batch, step)
        limit = SECONDS if step else 5 * SECONDS  # the first one loads kernels; of a GPU's the run pays for it anyway
        if time.thread_time() - began > limit and (step or start.world.device.type == "cpu"):
            return ""
    found = _Held(trained.modules)
    if not (told := forgotten(trained, _copied(start), found, batch)):
        return ""
    # Kernels that add up in any order, or the clock: then two that have loaded the same differ as well.
    other = _copied(start)
    load_weights(other.modules, found)
    return "" if forgotten(other, _copied(start), found, batch) else told


class _Held:
    """What a checkpoint would hold of a model, in memory."""

    location = "memory"

    def __init__(self, modules: Modules):
        states = {"model": modules.model.state_dict(), "task": modules.task_state(), "ranks": [modules.unsaved()]}
        self._states = copy.deepcopy(states)
        self.parts = list(states)

    def load(self, part: str) -> Any:
        return self._states[part]


class _NoCollectives(TorchDispatchMode):
    """Other ranks aren't here: a collective would meet with one of their first step."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError(f"{func} is called in a forward")
        return func(*args, **(kwargs or {}))


def _is_little_work(start: ModelParts, batch: Any) -> bool:
    parameters = sum(parameter.numel() for parameter in start.modules.parameters())
    return parameters * sum(tensor.numel() for tensor in tensors_in(batch)) <= WORK


def _is_cheap_to_copy(todo: list[Any]) -> bool:
    """Whether all that a deep copy of these would visit is little, and safe to be copied.

    Not safe are functions that close over something (a copy's hook would write into the original's list), and objects that
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
        output = _forward(parts, batch)
    return [output.loss.detach(), *(tensor.detach() for tensor in tensors_in(output.outputs))]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _differing(trained: ModelParts, fresh: ModelParts) -> Iterator[str]:
    """Attributes that show the difference."""
    pairs: list[tuple[str, Any, Any]] = [
        (name, module, other)
        for (name, module), (_, other) in zip(
            trained.modules.named_modules(), fresh.modules.named_modules(), strict=False
        )
    ]
    for name, one, other in [*pairs, ("task", trained.task, fresh.task)]:
        for key in sorted(_attributes(one).keys() | _attributes(other).keys()):
            if key in _OF_MODULES:
                continue
            a, b = (_attributes(holder).get(key) for holder in (one, other))
            if _told_apart(a, b):
                yield f"{name}.{key}".strip(".")


def _told_apart(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return not (isinstance(one, Tensor) and isinstance(other, Tensor) and _same(one.detach(), other.detach()))
    return isinstance(one, PLAIN) and repr(one) != repr(other)


_OF_MODULES = vars(nn.Module()).keys()


def _attributes(holder: Any) -> dict[str, Any]:
    return getattr(holder, "__dict__", {})
