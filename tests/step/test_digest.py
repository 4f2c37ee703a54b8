"""Digests of tensors, against a computation in plain Python of what their docstring says."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.step.digest import BLOCK, TensorDigests, factors

FULL = 2**64


def splitmix(number: int) -> int:
    """The output number `number` (from 0) of SplitMix64 seeded with 0, made odd."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 % FULL
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % FULL
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % FULL
    return mixed ^ mixed >> 31 | 1


def elements(tensor: Tensor) -> bytes:
    """The bytes of each element in the order of the indices, one after another."""
    if tensor.dtype == torch.bfloat16:  # NumPy has none: the upper half of a float32
        raw = [struct.pack("<f", value)[2:] for value in flattened(tensor.float().tolist())]
        return b"".join(raw)
    return np.array(tensor.resolve_conj().resolve_neg().tolist(), dtype=str(tensor.dtype)[6:]).tobytes()


def flattened(values: Any) -> list[float]:
    """Nested lists as one."""
    return [number for value in values for number in flattened(value)] if isinstance(values, list) else [values]


def reference(tensor: Tensor) -> int:
    """The digest, as an unsigned integer."""
    raw = elements(tensor) if tensor.numel() else b""
    kind = {1: "b", 2: "h"}.get(tensor.element_size(), "i")
    words = struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw)
    text = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
    start = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") | 1
    return (start + sum(w * splitmix(i % 256) * splitmix(256 + i // 256) for i, w in enumerate(words))) % FULL


def digest(*tensors: Tensor) -> list[int]:
    return [int(value) % FULL for value in TensorDigests()(tensors)]


def made(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2 if dtype == torch.bool else 120, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(
        dtype
    )


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def test_the_factors_are_those_of_splitmix64_and_odd() -> None:
    """Its first three outputs for the seed 0, as its authors' reference program prints them, with the last bit set."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(f) % FULL for f in factors(np.arange(3))] == [value | 1 for value in published]
    assert BLOCK == 256


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (256,), (3, 257), (2, 3, 4, 5)])
def test_each_dtype_and_shape_has_the_digest_of_plain_python(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = made(dtype, shape)
    assert digest(tensor) == [reference(tensor)]


def test_many_tensors_at_once_have_the_digests_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that cut tensors, join them and are filled exactly."""
    sizes = [0, 1, 255, 256, 257, 2000, 512, 0, 3, 1024, 1023, 1025, 5000]
    tensors = [made(DTYPES[k % len(DTYPES)], (size,), k) for k, size in enumerate(sizes)]
    expected = [reference(tensor) for tensor in tensors]
    assert digest(*tensors) == expected
    monkeypatch.setattr("dist_train.step.digest._CPU_CHUNK", 4 * BLOCK)
    together = TensorDigests()
    for _ in range(2):  # the second time with a layout that is kept
        assert [int(value) % FULL for value in together(tensors)] == expected
    assert digest(*tensors[::-1]) == expected[::-1]


def test_memory_format_and_strides_dont_matter() -> None:
    tensor = made(torch.float32, (4, 6, 5, 5))
    assert digest(tensor.to(memory_format=torch.channels_last)) == digest(tensor)
    wide = made(torch.float64, (8, 10))
    assert digest(wide[::2, 1::3]) == digest(wide[::2, 1::3].clone()) == [reference(wide[::2, 1::3])]
    assert digest(wide.t()) == [reference(wide.t().contiguous())] != digest(wide)
    assert digest(torch.ones(1).expand(6)) == digest(torch.ones(6))
    numbers = made(torch.complex64, (3, 4))
    assert digest(numbers.conj()) == [reference(numbers.conj().resolve_conj())] != digest(numbers)
    assert digest(numbers.conj().imag) == digest((-numbers.imag).clone())


def test_a_sparse_gradient_has_a_digest_of_its_rows_and_values() -> None:
    rows, values = torch.tensor([[4, 1, 4]]), made(torch.float32, (3, 2))
    sparse = torch.sparse_coo_tensor(rows, values, (6, 2))
    same = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.stack([values[1], values[0] + values[2]]), (6, 2))
    elsewhere = torch.sparse_coo_tensor(torch.tensor([[2, 4]]), torch.stack([values[1], values[0] + values[2]]), (6, 2))
    assert digest(sparse) == digest(same) != digest(elsewhere)


def test_the_number_of_threads_doesnt_matter() -> None:
    tensors = [made(torch.float32, (300, 1000)), made(torch.bfloat16, (70_000,))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(digest(*tensors))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_shape_and_dtype_count() -> None:
    zeros = [torch.zeros(6), torch.zeros(2, 3), torch.zeros(6, dtype=torch.int32), torch.zeros(0), torch.zeros(())]
    assert len(set(digest(*zeros))) == len(zeros)
    assert 0 not in digest(*zeros), "which stands for a tensor without a value"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(1, 700), st.randoms(use_true_random=False))
def test_any_flipped_bit_changes_the_digest(dtype: torch.dtype, size: int, draw: random.Random) -> None:
    tensor = made(dtype, (size,), draw.randrange(100))
    raw = tensor.clone().view(torch.uint8)
    before = digest(tensor)
    place = draw.randrange(len(raw))
    raw[place] ^= 1 if dtype == torch.bool else 1 << draw.randrange(8)
    flipped = raw.view(dtype)
    assert digest(flipped) != before
    raw[place] = tensor.view(torch.uint8)[place]
    assert digest(raw.view(dtype)) == before


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 600), st.randoms(use_true_random=False))
def test_a_permutation_changes_the_digest(size: int, draw: random.Random) -> None:
    tensor = torch.arange(1.0, size + 1)
    order = list(range(size))
    draw.shuffle(order)
    moved = order != list(range(size))
    assert (digest(tensor[order]) != digest(tensor)) is moved
    i, j = draw.sample(range(size), 2)
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j], tensor[i]
    assert digest(swapped) != digest(tensor)


def test_changes_that_cancel_out_in_a_plain_sum_change_the_digest() -> None:
    """Two signs, two powers of two far apart, and steps of one unit in the last place that add up to nothing."""
    tensor = made(torch.float32, (4096,))
    before, changed = digest(tensor), []
    for i, j in ((0, 1), (0, 256), (5, 2053), (256, 512)):
        signs = tensor.clone()
        signs[[i, j]] *= -1
        powers, exchanged = tensor.clone(), tensor.clone()
        powers[[i, j]], exchanged[[i, j]] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        assert digest(powers) != digest(exchanged)
        changed.append(digest(signs))
    for offsets in ((0, 1, 2, 3), (0, 256, 512, 768), (7, 263, 1031, 1287)):
        units = tensor.clone()
        units.view(torch.int32)[list(offsets)] += torch.tensor([1, -1, -1, 1], dtype=torch.int32)
        changed.append(digest(units))
    assert all(after != before for after in changed)
