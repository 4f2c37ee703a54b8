"""Copying a state to host memory: the only part of an asynchronous save that a training step waits for.

A state is a tree of dicts, lists and tuples whose leaves are tensors and plain Python values: exactly what
``torch.load(weights_only=True)`` gives back. Anything else is refused here, while the run can still be mended, and not
at the resume.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_ALIGN = 64  # bytes; a multiple of every element's size


class HostCopy:
    """Copies states into one host buffer that is kept, so that there is at most one extra copy of the state.

    Tensors that share memory (tied weights, views of a flat buffer) are copied once and share memory in the copy too; a
    small view of a large storage takes only its own bytes. For a state on CUDA the buffer is page-locked.
    """

    def __init__(self) -> None:
        self._buffer: np.ndarray | None = None
        self._locked = False

    def take(self, tree: Any) -> Any:
        """A copy of ``tree`` on the host, valid until the next call.

        Raises:
            TypeError: a leaf that ``torch.load(weights_only=True)`` would not give back; names its place.
        """
        leaves: list[torch.Tensor] = []
        _map(tree, "", leaves, None)
        copies: list[torch.Tensor | None] = [None] * len(leaves)
        shared: dict[tuple[str, int], list[int]] = {}
        for index, leaf in enumerate(leaves):
            if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_conj() or leaf.is_neg() or not leaf.numel():
                copies[index] = leaf.resolve_conj().resolve_neg().to("cpu", copy=True)
            else:
                shared.setdefault((str(leaf.device), leaf.untyped_storage().data_ptr()), []).append(index)
        spans = [_Span([leaves[index] for index in indices]) for indices in shared.values()]
        devices = {leaf.device for leaf in leaves if leaf.is_cuda}
        buffer = self._reserve(sum(span.room for span in spans), bool(devices))
        start = 0
        for span, indices in zip(spans, shared.values()):
            for index, copied in zip(indices, span.copy_to(buffer[start : start + span.nbytes], self._locked)):
                copies[index] = copied
            start += span.room
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return _map(tree, "", [], iter(copies))  # type: ignore[arg-type]

    def release(self) -> None:
        """Give the buffer back. Trees that :meth:`take` returned stay valid."""
        if self._buffer is not None and self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.ctypes.data)
        self._buffer, self._locked = None, False

    def _reserve(self, nbytes: int, lock: bool) -> np.ndarray:
        if self._buffer is None or self._buffer.nbytes < nbytes or (lock and not self._locked):
            self.release()
            self._buffer = np.empty(max(nbytes, 1), dtype=np.uint8)
            if lock:
                # Registering an ordinary buffer takes just its bytes; torch's own pinned memory comes in powers of two.
                # Without the lock (a limit on locked memory, say) the copy is slower, and right all the same.
                failed = torch.cuda.cudart().cudaHostRegister(self._buffer.ctypes.data, self._buffer.nbytes, 0)
                self._locked = int(failed) == 0
        return self._buffer


class _Span:
    """The bytes of one storage between the first and the last that tensors of a state use.

    A lone tensor that skips bytes (a strided slice, an expanded one) is made contiguous first.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        first = tensors[0]
        if all(_layout(tensor) == _layout(first) for tensor in tensors) and not _is_dense(first):
            tensors = [first.contiguous()] * len(tensors)
        begins = [int(t.storage_offset()) * t.itemsize for t in tensors]
        size = max(t.itemsize for t in tensors)
        self.tensors = tensors
        self.begin = min(begins) // size * size
        self.nbytes = max(begin + _extent(t) * t.itemsize for begin, t in zip(begins, tensors)) - self.begin
        self.room = -(-self.nbytes // _ALIGN) * _ALIGN

    def copy_to(self, room: np.ndarray, non_blocking: bool) -> list[torch.Tensor]:
        """Copy into ``room``; returns the tensors' copies."""
        source = torch.empty(0, dtype=torch.uint8, device=self.tensors[0].device)
        source.set_(self.tensors[0].untyped_storage(), self.begin, (self.nbytes,), (1,))
        memory = torch.from_numpy(room)
        if source.is_cuda:
            memory.copy_(source, non_blocking=non_blocking)
        else:
            room[:] = source.numpy()  # hundreds of parallel copies by torch cost more in waiting for threads
        copies = []
        for tensor in self.tensors:
            offset = int(tensor.storage_offset()) - self.begin // tensor.itemsize
            empty = torch.empty(0, dtype=tensor.dtype)
            copies.append(empty.set_(memory.untyped_storage(), offset, tensor.size(), tensor.stride()))
        return copies


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride()))


def _is_dense(tensor: torch.Tensor) -> bool:
    dimensions = sorted((s, n) for n, s in zip(tensor.size(), tensor.stride()) if n > 1)
    return all(s == math.prod(n for _, n in dimensions[:i]) for i, (s, _) in enumerate(dimensions))


def _map(node: Any, place: str, leaves: list[torch.Tensor], copies: Iterator[torch.Tensor] | None) -> Any:
    """Rebuild a tree; collects its tensors in ``leaves``, and takes their places from ``copies`` if given."""
    kind = type(node)
    if kind in _TENSORS:
        if node.device.type == "meta":
            raise TypeError(f"cannot save {place}: a tensor on the meta device has no values")
        leaves.append(node.detach())
        return node if copies is None else next(copies)
    if kind in _PLAIN:
        return node
    if isinstance(node, np.generic):
        return node.item()
    if kind in (dict, OrderedDict, defaultdict, Counter):
        for key in node:
            if type(key) not in _PLAIN:
                raise TypeError(f"cannot save {place}: the key {key!r} is a {type(key).__name__}, not a plain value")
        pairs = [(key, _map(value, f"{place}.{key}".lstrip("."), leaves, copies)) for key, value in node.items()]
        result: Any = dict(pairs) if kind is defaultdict else kind(dict(pairs))  # type: ignore[call-overload]
        if hasattr(node, "_metadata"):  # versions of the modules, which load_state_dict reads
            result._metadata = copy.deepcopy(node._metadata)
        return result
    if kind in (list, tuple, set):
        return kind(_map(value, f"{place}[{index}]", leaves, copies) for index, value in enumerate(node))
    raise TypeError(
        f"cannot save {place or 'the state'}: {kind.__module__}.{kind.__qualname__} is not a tensor, number, string, "
        "dict, list, tuple or set; a checkpoint must load without running code: return plain values from state_dict()"
    )
