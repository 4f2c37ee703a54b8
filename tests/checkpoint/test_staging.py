"""The copy of a state has its values, its layout and its sharing, and nothing else."""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections import Counter, OrderedDict, defaultdict
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from dist_train.checkpoint.staging import HostCopy


def through_a_file(tree: Any) -> tuple[Any, int]:
    file = io.BytesIO()
    torch.save(tree, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


def test_later_changes_of_the_state_do_not_reach_the_copy() -> None:
    tensor, numbers = torch.ones(5), [1, {"a": 2}]
    copy = HostCopy().take({"t": tensor, "n": numbers})
    tensor.zero_()
    numbers[1]["a"] = 3  # type: ignore[index]
    assert torch.equal(copy["t"], torch.ones(5))
    assert copy["n"] == [1, {"a": 2}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64,
                                   torch.uint8, torch.complex64, torch.float8_e4m3fn])  # fmt: skip
def test_every_dtype_keeps_its_bits(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (4, 3)).to(dtype)
    copy, _ = through_a_file(HostCopy().take([torch.ones(1, dtype=torch.uint8), tensor]))
    assert copy[1].dtype == dtype
    assert torch.equal(copy[1].view(torch.uint8), tensor.view(torch.uint8))


def test_tied_tensors_are_written_once_and_stay_tied() -> None:
    weight = torch.randn(1000)
    copy = HostCopy().take({"a": weight, "b": weight, "c": torch.nn.Parameter(weight)})
    loaded, size = through_a_file(copy)
    assert size < 2 * weight.nbytes
    loaded["a"][0] = 7
    assert loaded["b"][0] == loaded["c"][0] == 7


def test_different_views_of_one_buffer_share_it_in_the_copy() -> None:
    flat = torch.arange(1000.0)
    tree = {"head": flat[100:200].view(10, 10), "tail": flat[150:900], "column": flat[100:200].view(10, 10).t()}
    copy = HostCopy().take(tree)
    loaded, size = through_a_file(copy)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tree.items())
    assert size < 800 * 4 + 2500  # the stretch that is used, once
    loaded["head"].view(-1)[50] = -1
    assert loaded["tail"][0] == -1


def test_a_small_view_of_a_large_storage_takes_its_own_bytes_only() -> None:
    _, size = through_a_file(HostCopy().take({"t": torch.zeros(1_000_000)[:10]}))
    assert size < 5000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(4, 6)[:, ::2],
        torch.randn(3, 1).expand(3, 4),
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(4, 5).t(),
        torch.eye(3).to_sparse(),
    ],
    ids=["channels_last", "strided", "expanded", "scalar", "empty", "conjugate", "transposed", "sparse"],
)
def test_every_layout_keeps_its_values(tensor: torch.Tensor) -> None:
    loaded, _ = through_a_file(HostCopy().take([tensor]))
    assert loaded[0].size() == tensor.size()
    assert torch.equal(loaded[0].to_dense(), tensor.to_dense().resolve_conj())
    if tensor.layout == torch.strided and tensor.is_contiguous(memory_format=torch.channels_last):
        assert loaded[0].stride() == tensor.stride()


def test_the_buffer_is_kept_from_one_save_to_the_next() -> None:
    copier, tree = HostCopy(), {"a": torch.randn(100), "b": torch.randn(5, dtype=torch.float64)}
    first = copier.take(tree)["b"].data_ptr()
    assert copier.take(tree)["b"].data_ptr() == first
    assert copier.take({"a": torch.randn(3)})["a"].data_ptr()  # smaller: fits


def test_a_second_save_has_the_values_and_shapes_of_its_time() -> None:
    flat = torch.zeros(200)
    tree: dict[str, Any] = {
        "dense": torch.zeros(3, 4),
        "column": torch.zeros(4, 6)[:, ::2],
        "views": [flat[:100], flat[50:150]],
        "tied": torch.zeros(5),
        "empty": torch.zeros(0),
    }
    tree["again"] = tree["tied"]
    for plain_only in (False, True):  # with a tensor that needs a copy of its own, and without
        if plain_only:
            del tree["column"]
        copier = HostCopy()
        for value in range(3):
            for tensor in [tree["dense"], flat, tree["tied"], *([] if plain_only else [tree["column"]])]:
                tensor.fill_(value)
            copy = copier.take(tree)
            assert all(torch.equal(copy[name], tree[name]) for name in tree if name != "views")
            assert all(torch.equal(a, b) for a, b in zip(copy["views"], tree["views"], strict=True))
        tree["dense"] = torch.ones(7, 7)
        assert torch.equal(copier.take(tree)["dense"], torch.ones(7, 7))
        copier.release()
        assert torch.equal(copier.take(tree)["dense"], torch.ones(7, 7))


def test_containers_and_plain_values_come_back_as_they_were() -> None:
    tree = {
        "plain": [None, True, 3, 2.5, 1j, "text", b"bytes", (1, 2), {3, 4}, torch.float16, torch.Size([2])],
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "milestones": Counter([5, 5, 7]),  # MultiStepLR's state
        7: {"lr": 0.1},
    }
    copy = HostCopy().take({**tree, "numpy": np.float64(0.5), "default": defaultdict(int, {1: 2})})
    loaded, _ = through_a_file(copy)
    assert {key: loaded[key] for key in tree} == tree
    assert type(loaded["ordered"]) is OrderedDict
    assert type(loaded["numpy"]) is float
    assert type(loaded["default"]) is dict


def test_versions_of_modules_stay_with_their_state() -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    loaded, _ = through_a_file(HostCopy().take(state))
    assert loaded._metadata == state._metadata  # type: ignore[attr-defined]


class Color(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "leaf", [object(), Color.RED, np.zeros(3), lambda: 0, {(1, 2): 3}, torch.empty(2, device="meta"), frozenset()]
)
def test_what_could_not_be_loaded_is_refused_at_the_save(leaf: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot save optimizer\.state\[1\]\.x"):
        HostCopy().take({"optimizer": {"state": [0, {"x": leaf}]}})


def test_optimizers_and_schedulers_of_torch_can_be_saved() -> None:
    net = torch.nn.Linear(3, 2)
    lr = torch.optim.lr_scheduler
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        optimizer = kind(net.parameters(), lr=0.1)  # type: ignore[operator]
        schedulers = [
            lr.MultiStepLR(optimizer, [2, 2, 4]),
            lr.ReduceLROnPlateau(optimizer),
            lr.SequentialLR(
                optimizer,
                [
                    lr.LinearLR(optimizer),
                    lr.CosineAnnealingLR(optimizer, 5),
                ],
                [3],
            ),
        ]
        net(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        state = [optimizer.state_dict(), [s.state_dict() for s in schedulers]]
        saved, _ = through_a_file(HostCopy().take(state))
        for got, wanted in zip(tree_leaves(saved), tree_leaves(state), strict=True):
            assert torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_forked_process_gets_no_copy_of_the_buffer() -> None:
    copy = HostCopy().take({"t": torch.ones(5_000_000)})
    place = copy["t"].data_ptr()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # only a read of memory: nothing of Python's or torch's locks
        os.write(writer, ctypes.string_at(place + 4096, 4))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 4) == bytes(4)
    assert ctypes.string_at(place + 4096, 4) == np.float32(1).tobytes()
    os.close(reader)
    os.close(writer)


def test_pages_that_the_system_refuses_to_lock_are_reported_once_and_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refuses(address: int, size: int, flags: int) -> int:
        asked.append(size)
        return 2

    def first_kernel_after_it(*args: Any, **kwargs: Any) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=refuses))
    monkeypatch.setattr(torch, "ones", first_kernel_after_it)
    copier = HostCopy()
    buffers = [copier._reserve(size, lock=True) for size in (1000, 5000, 2000)]
    buffers[-1][:] = 7
    assert asked == [1000]
    assert [buffer.nbytes for buffer in buffers] == [1000, 5000, 5000]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "can't be page-locked (cudaHostRegister: error 2)" in line
    assert "ulimit -l" in line


@pytest.mark.gpu
def test_a_lock_that_cuda_refuses_harms_nothing_that_follows(caplog: pytest.LogCaptureFixture) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    copier, buffer = HostCopy(), np.zeros(1 << 22, np.uint8)
    copier._lock(buffer)
    unlock, copier._unlock = copier._unlock, None
    copier._lock(buffer)  # a second time is refused
    assert copier._unlock is None
    assert "can't be page-locked" in caplog.text
    assert float((torch.ones(4, device="cuda") + 1).sum()) == 8
    copy = copier.take({"t": torch.ones(1000, device="cuda")})
    assert torch.equal(copy["t"], torch.ones(1000))
    assert unlock is not None
    unlock()


@pytest.mark.gpu
def test_a_state_on_cuda_is_copied_into_locked_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    flat = torch.arange(1000.0, device="cuda")
    tree = {"t": torch.randn(64, 8, 3, 3, device="cuda").to(memory_format=torch.channels_last), "v": flat[5:50],
            "w": flat[30:70], "s": torch.tensor(3.0), "x": torch.randn(50, 40, device="cuda")[:, ::2]}  # fmt: skip
    copier = HostCopy()
    for _ in range(2):
        copy = copier.take(tree)
        flat += 0
        assert all(torch.equal(copy[name], tensor.cpu()) for name, tensor in tree.items())
        assert copy["t"].is_pinned()
    copier.release()
    assert all(torch.equal(copy[name], tensor.cpu()) for name, tensor in tree.items())
