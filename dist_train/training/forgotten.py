"""Whether a model that is built anew and has loaded a checkpoint computes what the trained one does."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.runtime.seeding import seed_forward
from dist_train.task.batch import tensors_in
from dist_train.task.task import as_step_output
from dist_train.training.state import load_weights

if TYPE_CHECKING:
    from dist_train.checkpoint.store import Found
    from dist_train.training.parts import Parts

PLAIN = (bool, str, list, tuple, dict, set, deque)  # numbers and tensors are saved (see `Modules`)


def forgotten(trained: Parts, fresh: Parts, found: Found, batch: Any) -> str:
    """What training has left in a model, its loss or its task that a checkpoint doesn't hold, in words; "" for nothing.

    Args:
        trained: as training has left it. fresh: as it was built. found: the checkpoint that the trained one has saved.
        batch: on the device.
    """
    load_weights(fresh.modules, found)
    modes = {name: module.training for name, module in trained.modules.named_modules()}
    for name, module in fresh.modules.named_modules():
        module.training = modes.get(name, module.training)
    ours, theirs = _outcome(trained, batch), _outcome(fresh, batch)
    if len(ours) == len(theirs) and all(map(_same, ours, theirs)):
        return ""
    names = ", ".join(_differing(trained, fresh)) or "an object that can't be looked into, or a generator of its own"
    return (
        "training leaves something behind that no checkpoint holds, so that a stopped run doesn't go on as it would have: "
        f"{names}. Make it a buffer, or a number that __init__ makes; draw from torch's, numpy's or Python's own generators"
    )


def _outcome(parts: Parts, batch: Any) -> list[Tensor]:
    """Loss and outputs of a forward as in training."""
    seed_forward(parts.config.seed, 0, 0, parts.world.device)
    with torch.no_grad(), parts.precision.autocast(), torch.compiler.set_stance("force_eager"):
        output = as_step_output(parts.task.step(parts.model, copy.deepcopy(batch)))
    return [output.loss.detach(), *(tensor.detach() for tensor in tensors_in(output.outputs))]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _differing(trained: Parts, fresh: Parts) -> Iterator[str]:
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
