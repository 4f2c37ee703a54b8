"""A digest of 64 bits for each tensor, and the reducer that hands on what it has reduced (`debug.digest`).

A digest is a sum of integers modulo 2^64, so its value doesn't depend on the order in which a kernel adds: the same bits give the
same digest on any device and with any number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.data.plan import MicroBatch
from dist_train.objective.objective import Item, StepSums
from dist_train.reduction.reduce import Reducer

BLOCK = 256  # words with a factor of their own; each block of a tensor has another factor
# Words that are multiplied at once: on the CPU what its cache holds, elsewhere what takes 32 MiB as int64.
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 22
_LAYOUTS = 16  # that are kept


def factors(numbers: np.ndarray) -> np.ndarray:
    """An odd pseudo-random factor of 64 bits for each number: SplitMix64 (Steele, Lea and Flood 2014), as int64."""
    with np.errstate(over="ignore"):
        mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def constant(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """What a tensor's digest begins with, as an int64: zeros of another shape or dtype have another digest."""
    text = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) | 1


class TensorDigests:
    """Digests of lists of tensors; keeps what depends on their shapes alone.

    A tensor is read as words in the order of its indices, whatever its strides: integers with sign of 1, 2 or 4 bytes, by the
    size of an element; larger elements are several words of 4 bytes, complex ones their real and then their imaginary part; of
    a sparse tensor, coalesced, the words of its indices and then those of its values. Word `i` counts
    `factors(i % BLOCK) * factors(BLOCK + i // BLOCK)` times, which is odd, so no change of a single bit goes unnoticed; the sum,
    added to `constant(dtype, shape)`, is the digest.
    """

    def __init__(self) -> None:
        self._layouts: dict[Any, _Layout] = {}

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """int64 (n,) of n >= 1 tensors, on the device that all of them are on; doesn't wait for it."""
        words = [_words(tensor) for tensor in tensors]
        key = words[0].device, *((tensor.dtype, tensor.shape, len(w)) for tensor, w in zip(tensors, words, strict=True))
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) == _LAYOUTS:  # sparse gradients have another one in each step
                self._layouts.clear()
            layout = self._layouts[key] = _Layout.of(tensors, words)
        if not layout.chunks:
            return layout.constants.clone()
        sums = []
        for pieces in layout.chunks:
            parts = [(words[k] if k >= 0 else layout.zeros)[start:end] for k, start, end in pieces]
            stream = parts[0] if len(parts) == 1 else torch.cat(parts)
            sums.append(layout.block_sums(stream.view(-1, BLOCK)))
        blocks = sums[0] if len(sums) == 1 else torch.cat(sums)
        return layout.constants.index_add(0, layout.owner, blocks * layout.of_block)


@dataclass(frozen=True)
class _Layout:
    """How tensors of certain shapes are cut into blocks.

    Attributes:
        chunks: what is multiplied at once: (tensor, first word, end); tensor -1 is zeros, which fill a last block.
        owner: int64 (blocks,), the tensor of each block. of_block: int64 (blocks,), its factor.
        in_block: int64 (BLOCK,), the factor of each place. constants: int64 (n,), one for each tensor.
        wide: int64 (blocks of the longest chunk, BLOCK), room for its words.
    """

    chunks: list[list[tuple[int, int, int]]]
    owner: Tensor
    of_block: Tensor
    in_block: Tensor
    constants: Tensor
    zeros: Tensor
    wide: Tensor

    def block_sums(self, words: Tensor) -> Tensor:
        """int64 (blocks,) of words (blocks, BLOCK)."""
        room = self.wide[: len(words)]
        if words.device.type == "cpu":  # one pass less; other devices have no such kernel for integers
            return torch.mv(room.copy_(words), self.in_block)
        return torch.mul(words, self.in_block, out=room).sum(1)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], words: Sequence[Tensor]) -> _Layout:
        device, numbers, owners = words[0].device, [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        most = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
        chunks: list[list[tuple[int, int, int]]] = [[]]
        room = most
        for k, length in enumerate(map(len, words)):
            blocks = -(-length // BLOCK)
            numbers.append(np.arange(blocks) + BLOCK)
            owners.append(np.full(blocks, k))
            for start in range(0, blocks * BLOCK, most):
                padded = min(blocks * BLOCK - start, most)
                if padded > room:
                    chunks.append([])
                    room = most
                room -= padded
                end = min(start + padded, length)
                chunks[-1].append((k, start, end))
                if end - start < padded:
                    chunks[-1].append((-1, 0, padded - (end - start)))
        constants = np.array([constant(tensor.dtype, tensor.shape) for tensor in tensors], np.int64)
        arrays = np.concatenate(owners), factors(np.concatenate(numbers)), factors(np.arange(BLOCK)), constants
        owner, of_block, in_block, first = (torch.tensor(array, device=device) for array in arrays)
        zeros = torch.zeros(BLOCK, dtype=torch.int8, device=device)
        longest = max(sum(end - start for _, start, end in chunk) for chunk in chunks)
        wide = torch.empty(longest // BLOCK, BLOCK, dtype=torch.int64, device=device)
        return cls([chunk for chunk in chunks if chunk], owner, of_block, in_block, first, zeros, wide)


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bits as one row of integers, in the order of its indices."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return torch.cat([_words(tensor._indices()), _words(tensor._values())])
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.resolve_neg().reshape(-1).contiguous()
    return flat.view({1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32))


class WatchedReducer:
    """A `Reducer` that hands on what it has reduced.

    Args:
        inner: does the work.
        reduced: called when each `.grad` is the sum over all ranks, with the step's sums.
    """

    def __init__(self, inner: Reducer, reduced: Callable[[StepSums], None]):
        self.inner, self.reduced = inner, reduced

    def warm_up(self, item: Item, rewind: Callable[[], object]) -> None:
        self.inner.warm_up(item, rewind)

    def forward_backward(self, item: Item, micro: MicroBatch, *, scale: float) -> None:
        self.inner.forward_backward(item, micro, scale=scale)

    def finish(self) -> StepSums:
        sums = self.inner.finish()
        self.reduced(sums)
        return sums

    def close(self) -> None:
        self.inner.close()


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Those that there are, by name."""
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
