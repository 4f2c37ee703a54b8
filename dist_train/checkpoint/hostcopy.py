"""Copying a state to host memory: the only part of an asynchronous save that a training step waits for.

A state is a tree of dicts, lists and tuples whose leaves are tensors and plain Python values: exactly what
``torch.load(weights_only=True)`` gives back. Anything else is refused here, while the run can still be mended, and not
at the resume.
"""

from __future__ import annotations

import copy
import ctypes
import math
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_PIECE = 16 << 20
_ALIGN = 64  # bytes; a multiple of every element's size


class HostCopy:
    """Copies states into one host buffer that is kept, so that there is at most one extra copy of the state.

    Tensors that share memory (tied weights, views of a flat buffer) are copied once and share memory in the copy too; a
    small view of a large storage takes only its own bytes. For a state on CUDA the buffer is page-locked.
    """

    def __init__(self) -> None:
        self._buffer: np.ndarray | None = None
        self._locked = False
        self._unlock: weakref.finalize[..., Any] | None = None
        # The arrangement of the last state; the same state has the same one at the next save.
        self._layouts: list[tuple[object, ...]] | None = None
        self._copies: list[torch.Tensor] = []
        self._moves: list[tuple[int, int, int]] = []  # on the CPU: to, from, bytes
        self._loads: list[tuple[torch.Tensor, int, int]] = []  # from a GPU: to, which tensor's storage, its first byte

    def take(self, tree: Any) -> Any:
        """A copy of ``tree`` on the host, valid until the next call.

        Raises:
            TypeError: a leaf that ``torch.load(weights_only=True)`` would not give back; names its place.
        """
        leaves: list[torch.Tensor] = []
        _map(tree, "", leaves, None)
        layouts = [(leaf.device, leaf.untyped_storage().data_ptr(), *_layout(leaf)) if _is_plain(leaf) else (object(),)
                   for leaf in leaves]  # fmt: skip
        if layouts != self._layouts:
            self._layouts = layouts if self._arrange(leaves) else None
        for room, index, begin in self._loads:
            room.copy_(_bytes(leaves[index], begin, room.nbytes), non_blocking=self._locked)
        _move(self._moves)
        for device in {leaf.device for leaf in leaves if leaf.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return _map(tree, "", [], iter(self._copies))

    def _arrange(self, leaves: list[torch.Tensor]) -> bool:
        """Give each tensor its place in the buffer; returns whether this holds for the next save too."""
        again, copies = True, list(leaves)
        shared: dict[tuple[torch.device, int], list[int]] = {}
        for index, leaf in enumerate(leaves):
            if _is_plain(leaf):
                shared.setdefault((leaf.device, leaf.untyped_storage().data_ptr()), []).append(index)
            else:
                again, copies[index] = False, leaf.resolve_conj().resolve_neg().to("cpu", copy=True)
        spans = [_Span([leaves[index] for index in indices]) for indices in shared.values()]
        buffer = self._reserve(sum(span.room for span in spans), any(leaf.is_cuda for leaf in leaves))
        start, self._moves, self._loads = 0, [], []
        for span, indices in zip(spans, shared.values()):
            room = torch.from_numpy(buffer[start : start + span.nbytes])
            source = span.tensors[0]
            if source is not leaves[indices[0]]:
                again, leaves[indices[0]] = False, source  # a contiguous copy, for this save only
            if source.is_cuda:
                self._loads.append((room, indices[0], span.begin))
            else:
                self._moves.append((room.data_ptr(), source.untyped_storage().data_ptr() + span.begin, span.nbytes))
            for index, copied in zip(indices, span.tensors_in(room.untyped_storage())):
                copies[index] = copied
            start += span.room
        self._copies = copies
        return again

    def release(self) -> None:
        """Give the buffer back. Trees that :meth:`take` returned stay valid."""
        if self._unlock is not None:
            self._unlock()
        self._unlock = None
        self._buffer, self._locked, self._layouts = None, False, None
        self._copies, self._moves, self._loads = [], [], []

    def _reserve(self, nbytes: int, lock: bool) -> np.ndarray:
        if self._buffer is None or self._buffer.nbytes < nbytes or (lock and not self._locked):
            self.release()
            self._buffer = np.empty(max(nbytes, 1), dtype=np.uint8)
            if lock:
                # Registering an ordinary buffer takes just its bytes; torch's own pinned memory comes in powers of two.
                # Without the lock (a limit on locked memory, say) the copy is slower, and right all the same.
                failed = torch.cuda.cudart().cudaHostRegister(self._buffer.ctypes.data, self._buffer.nbytes, 0)
                self._locked = int(failed) == 0
                if self._locked:
                    # Memory that is freed while registered would make the next user of its addresses fail: called when the
                    # array dies at the latest, just before its memory is given back.
                    self._unlock = weakref.finalize(self._buffer, _unregister, self._buffer.ctypes.data)
        return self._buffer


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class _Span:
    """The bytes of one storage between the first and the last that tensors of a state use.

    A lone tensor that skips bytes (a strided slice, an expanded one) is made contiguous first.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        first = tensors[0]
        alone = len(tensors) == 1 or all(_layout(tensor) == _layout(first) for tensor in tensors)
        if alone and not first.is_contiguous() and not _is_dense(first):
            tensors = [first.contiguous()] * len(tensors)
        self.tensors = tensors
        spans = [
            (int(t.storage_offset()) * t.itemsize, _extent(t) * t.itemsize) for t in tensors[: 1 if alone else None]
        ]
        size = max(tensor.itemsize for tensor in tensors)
        self.begin = min(begin for begin, _ in spans) // size * size
        self.nbytes = max(begin + length for begin, length in spans) - self.begin
        self.room = -(-self.nbytes // _ALIGN) * _ALIGN

    def tensors_in(self, copy: torch.UntypedStorage) -> Iterator[torch.Tensor]:
        """The tensors as they lie in a copy of the span."""
        for tensor in self.tensors:
            offset = int(tensor.storage_offset()) - self.begin // tensor.itemsize
            yield torch.empty(0, dtype=tensor.dtype).set_(copy, offset, tensor.size(), tensor.stride())


def _move(moves: list[tuple[int, int, int]]) -> None:
    """Copy memory: (to, from, bytes) each, shared out over up to four threads.

    Hundreds of parallel copies by torch wait for its threads hundreds of times; this waits once.
    """
    pieces = [(to + at, source + at, min(_PIECE, n - at)) for to, source, n in moves for at in range(0, n, _PIECE)]
    count = min(4, torch.get_num_threads(), len(pieces))

    def work(share: list[tuple[int, int, int]]) -> None:
        for piece in share:
            ctypes.memmove(*piece)  # lets other threads run

    threads = [threading.Thread(target=work, args=(pieces[k::count],)) for k in range(1, count)]
    for thread in threads:
        thread.start()
    work(pieces[:: max(count, 1)])
    for thread in threads:
        thread.join()


def _bytes(tensor: torch.Tensor, begin: int, nbytes: int) -> torch.Tensor:
    """A stretch of a tensor's storage."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), begin, (nbytes,), (1,))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its values are the bytes of its storage, and there are some."""
    special = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return not special and tensor.numel() > 0


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()


def _extent(tensor: torch.Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.numel()
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
        if copies is not None:
            return next(copies)
        leaves.append(node.detach())
        return node
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
            result._metadata = copy.copy(node._metadata)
        return result
    if kind in (list, tuple, set):
        return kind(_map(value, f"{place}[{index}]", leaves, copies) for index, value in enumerate(node))
    raise TypeError(
        f"cannot save {place or 'the state'}: {kind.__module__}.{kind.__qualname__} is not a tensor, number, string, "
        "dict, list, tuple or set; a checkpoint must load without running code: return plain values from state_dict()"
    )
