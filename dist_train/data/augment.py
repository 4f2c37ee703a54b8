"""Batched augmentation on the device, in which every sample draws its own numbers.

What a sample draws is a function of (seed, epoch, sample index, position in the list of augmentations), never of the
batch, rank or device that it is in: a counter-based generator (splitmix64) in integer arithmetic, bitwise identical on
CPU and CUDA. The few numbers per sample (shifts, boxes, coins) are drawn on the host, which knows the indices
anyway, and are copied to the device at once: that takes less time than launching the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.data.errors import DataError
from dist_train.data.plan import Indices
from dist_train.runtime.seeding import AUGMENT, mix, seed_augment
from dist_train.task.batch import shapes_of

Keys = NDArray[np.int64]
Domain = Literal["pixels", "any", "floats"]

# splitmix64 (see runtime/seeding.py), its constants as the int64 that both numpy and torch compute with.
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _finalize(z: Any) -> Any:
    """splitmix64's finalizer, in place, on an array or a tensor: products wrap, and shifts are made logical by a mask."""
    z ^= (z >> 30) & 0x3FFFFFFFF
    z *= _FIRST
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= _SECOND
    z ^= (z >> 31) & 0x1FFFFFFFF
    return z


def sample_keys(seed: int, epoch: int, indices: Indices) -> Keys:
    """One 64-bit key per sample: (B,) int64."""
    return _finalize(indices ^ np.uint64(mix(AUGMENT, seed, epoch)).astype(np.int64))  # type: ignore[no-any-return]


class Draws:
    """The random numbers of one augmentation for the samples of a batch: new ones at each call, as of any generator.

    Args:
        keys: (B,) int64 from `sample_keys`.
        op: position of the augmentation in the list.
        device: where the images are.
        drawn: how many numbers were drawn before.
    """

    def __init__(self, keys: Keys, op: int, device: torch.device, drawn: int = 0) -> None:
        self.device = device
        self._keys, self._op, self._drawn = keys, op, drawn

    def head(self, rows: int) -> Draws:
        """Draws for the first `rows` samples, from this position on."""
        return Draws(self._keys[:rows], self._op, self.device, self._drawn)

    def host(self, n: int) -> Tensor:
        """Uniform numbers in [0, 1): (B, n) float32 on the CPU."""
        # numpy: on small arrays it is five times as fast as torch
        return torch.from_numpy(self._bits(self._keys, np.arange(n), n).astype(np.float32)).mul_(2.0**-24)

    def uniform(self, n: int) -> Tensor:
        """The same numbers made on the device, for large n: (B, n) float32."""
        keys = self.send(torch.from_numpy(self._keys))
        bits: Tensor = self._bits(keys, torch.arange(n, device=self.device), n)
        return bits.to(torch.float32).mul_(2.0**-24)

    def send(self, values: Tensor) -> Tensor:
        """A small host tensor on the device, without waiting for it."""
        if self.device.type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)

    def _bits(self, keys: Any, counters: Any, n: int) -> Any:
        """24 bits each, exact in float32; each augmentation of a list has its own range of counters."""
        counters += (self._op << 40) + self._drawn + 1
        counters *= _GOLDEN
        self._drawn += n
        return (_finalize(keys[:, None] + counters) >> 40) & 0xFFFFFF


class Augment:
    """One step of augmentation. Subclass it for your own: `__call__(inputs, targets, draws) -> (inputs, targets)`.

    inputs are (B, ...) on the device, targets (B,) or (B, classes). Draw from `draws` only.

    Attributes:
        neighbours: rows that it takes from the end of the batch and doesn't return. An augmentation that mixes
            samples sets 1: it then gets one row more than it returns, and row i may use row i + 1. The loader reads
            the neighbours, which are the next samples of the *global* batch, so that the pairs don't depend on how
            the batch is split.
        domain: which images it works on. "pixels": as they are read, uint8 or floats in [0, 1], before `data.normalize`.
            "floats": after it. "any": both; it is then applied where it stands.
    """

    neighbours = 0
    domain: Domain = "floats"

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augment a batch."""
        raise TypeError(f"{type(self).__name__} must define __call__(inputs, targets, draws)")


class Augmentation:
    """A list of augmentations, applied in order to (inputs, targets) batches.

    Args:
        augments: instances of `Augment` or callables of the same form; or any library's callables of (inputs, targets) or of
            inputs alone (timm's Mixup, torchvision's v2, kornia). Those draw from torch's, numpy's and Python's generators,
            which are seeded before each call, and see one micro-batch. Without an attribute `domain` they are "floats".
        normalize: `data.normalize`, called with the inputs: before the first augmentation whose domain is "floats", after
            all of them if there is none. The draws don't depend on it.

    Raises:
        DataError: an augmentation of pixels stands where the images are already normalized.
    """

    def __init__(self, augments: Sequence[Any], normalize: Callable[[Tensor], Tensor] | None = None) -> None:
        self.augments = [(augment, _takes(augment), _draws_alone(augment)) for augment in augments]
        self.neighbours = sum(getattr(augment, "neighbours", 0) for augment in augments)
        self._normalize, self._normalize_at = normalize, -1 if normalize is None else _first_of_floats(augments)

    def __call__(self, batch: Any, *, seed: int, epoch: int, indices: Indices) -> tuple[Tensor, Tensor]:
        """Augment one micro-batch; returns (inputs, targets) without the neighbours' rows.

        Args:
            batch: (inputs, targets) on the device, len(indices) rows each.
            seed, epoch: of the run and of the step.
            indices: the samples, or what else tells them apart (`MicroBatch.random_keys`), on the host; includes the neighbours.

        Raises:
            DataError: the batch isn't a pair of tensors, or its images have a form that an augmentation can't take.
        """
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
            raise DataError(
                f"data.augment works on batches (inputs, targets) of two tensors, found {shapes_of(batch)}; augment in the "
                f"dataset's transform instead, or name a single part in data.inputs"
            )
        inputs, targets = batch
        strided = inputs.dim() == 4 and not inputs.is_contiguous()
        last = strided and inputs.is_contiguous(memory_format=torch.channels_last)
        keys = sample_keys(seed, epoch, indices)
        for op, (augment, takes, draws_alone) in enumerate(self.augments):
            if op == self._normalize_at:
                inputs = self._normalize(inputs)  # type: ignore[misc]  # it isn't None: it has a position
            if not draws_alone:
                seed_augment(seed, epoch, int(indices[0]), op, inputs.device)
            given = (inputs, targets, Draws(keys, op, inputs.device))[:takes]
            got = augment(*given)
            inputs, targets = (got, targets) if isinstance(got, Tensor) else got
            keys = keys[: len(inputs)]
        if self._normalize is not None and self._normalize_at == len(self.augments):
            inputs = self._normalize(inputs)
        # indexing changes the memory layout of rows; the model gets the one that the batch had
        return inputs.contiguous(memory_format=torch.channels_last) if last else inputs, targets


def domain_of(augment: Any) -> Domain:
    """`Augment.domain`; "floats" for other callables."""
    domain: Domain = getattr(augment, "domain", "floats")
    if domain not in get_args(Domain):
        raise DataError(
            f"{_name(augment)}: expected domain to be one of {', '.join(get_args(Domain))}, found {domain!r}"
        )
    return domain


def _first_of_floats(augments: Sequence[Any]) -> int:
    """The position before which images are normalized: that of the first augmentation of floats, else the end."""
    domains = [domain_of(augment) for augment in augments]
    first = domains.index("floats") if "floats" in domains else len(domains)
    if "pixels" in domains[first:]:
        late = first + domains[first:].index("pixels")
        raise DataError(
            f"data.augment.{late}: {_name(augments[late])} works on images before data.normalize, but "
            f"data.augment.{first}, {_name(augments[first])}, on normalized ones: put {_name(augments[late])} before it"
        )
    return first


def _name(augment: Any) -> str:
    return getattr(augment, "__name__", type(augment).__name__)


def _draws_alone(augment: Any) -> bool:
    """Whether it draws from `draws` alone, as our own do: torch's, numpy's and Python's generators needn't be seeded."""
    members = getattr(augment, "augments", ())  # of OneOf
    return type(augment).__module__.startswith("dist_train.vision.") and all(map(_draws_alone, members))


def _takes(augment: Any) -> int:
    """How many of (inputs, targets, draws) a callable wants."""
    if isinstance(augment, Augment):
        return 3
    parameters = signature(augment.forward if isinstance(augment, torch.nn.Module) else augment).parameters
    if "draws" in parameters:
        return 3
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return 2
    needed = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD]
    return min(3, max(1, sum(p.default is p.empty for p in needed)))
