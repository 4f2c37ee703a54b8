"""Randomness as a function: seeds derived from what is being computed, never from what ran before.

The generator objects are seeded directly: `torch.manual_seed` also visits every CUDA device and costs about 100 us a
call, `torch.default_generator.manual_seed` 1.2 us, and `seed_sample` is called once for every sample.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_MASK = 0xFFFFFFFFFFFFFFFF

# One purpose, one stream: the numbers are part of what makes two runs equal, so they never change.
ORDER, SAMPLE, FORWARD, AUGMENT, SPLIT, DRAW = 1, 2, 3, 4, 5, 6


def mix(*values: int) -> int:
    """Hash integers, each modulo 2**64, into 64 well-mixed bits, the same on every platform, forever.

    Folds the values, in order, with the splitmix64 finalizer (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014).
    """
    return _mix(0, *values)


def _mix(state: int, *values: int) -> int:
    """Fold more values into the hash of those before."""
    for value in values:
        z = ((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        state = z ^ (z >> 31)
    return state


_begun = functools.lru_cache(mix)


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and `random`: what a constructor draws follows from the run's seed alone."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed torch (CPU), numpy's global state and `random` for reading sample `index` in `epoch`; about 9 us.

    Where an epoch's samples are drawn with replacement, `index` is the draw's place in the epoch (`MicroBatch.keys`).
    """
    _seed(mix(SAMPLE, seed, epoch, index), None)


def seed_forward(seed: int, step: int, position: int, device: torch.device, *, torch_alone: bool = False) -> None:
    """Seed everything for the forward of one micro-batch (dropout, LayerDrop and the like), on the CPU and on `device`.

    `step` is the global optimizer step and `position` the place of the micro-batch's first sample in the global
    batch, so that the draws don't depend on the rank that happens to compute it.

    Args:
        torch_alone: leave numpy and `random` as they are: nothing in the forward can draw from them.
    """
    value = _mix(_begun(FORWARD, seed), step, position)
    _seed_torch(value, device) if torch_alone else _seed(value, device)


def seed_augment(seed: int, epoch: int, index: int, place: int, device: torch.device) -> None:
    """Seed everything for the augmentation at `place` in its list, on a micro-batch that begins with sample `index`."""
    _seed(mix(AUGMENT, seed, epoch, index, place), device)


def _seed(value: int, device: torch.device | None) -> None:
    np.random.seed(value >> 32)
    random.seed(value)
    _seed_torch(value, device)


def _seed_torch(value: int, device: torch.device | None) -> None:
    torch.default_generator.manual_seed(value)
    if device is not None and device.type == "cuda":
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[ordinal].manual_seed(value)


@contextlib.contextmanager
def undisturbed_generators(device: torch.device | None = None, holder: Any = None) -> Iterator[None]:
    """Whatever is seeded and drawn inside, on the CPU and on `device`, leaves the caller's random numbers as they were.

    Args:
        holder: an object (a dataset) whose own generators are left as they were, too.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    own = [(generator, copy.deepcopy(_state(generator))) for generator in _generators_in(holder)]
    try:
        with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for generator, state in own:
            _set_state(generator, state)


_LEAVES = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.Tensor, np.ndarray, str, bytes)
MAX_ITEMS, MAX_OBJECTS = 1000, 10_000  # longer collections are data; a search ends after so many objects


def _generators_in(holder: Any) -> list[Any]:
    """The generators among an object's attributes, and among theirs."""
    found: list[Any] = []
    seen, todo = set[int](), [holder]
    while todo and len(seen) < MAX_OBJECTS:
        item = todo.pop()
        if id(item) in seen or isinstance(item, _LEAVES):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            found.append(item)
        elif len(parts := gc.get_referents(item)) <= MAX_ITEMS:
            todo += parts
    return found


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
