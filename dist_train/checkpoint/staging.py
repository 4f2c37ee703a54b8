"""Copying a state to host memory: the only part of an asynchronous save that a training step waits for.

A state is a tree of dicts, lists and tuples whose leaves are tensors and plain Python values: exactly what
``torch.load(weights_only=True)`` gives back. Anything else is refused here, where it can still be fixed.

torch's ``StateDictStager`` (2.15) is eight times slower on CPU, saves the entire storage of a small view and wrong values of
a conjugated tensor, fails on sparse ones and where pages can't be locked, and accepts objects that can't be loaded.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
import logging
import mmap
import sys
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_PIECE = 16 << 20
_ALIGN = 64  # bytes; a multiple of every element's size
_WIPEONFORK = 18  # MADV_WIPEONFORK of Linux, for which Python has no name
log = logging.getLogger("dist_train")


class HostCopy:
    """Copies states into one host buffer that is reused, so that there is at most one extra copy of the state.

    Tensors that share memory (tied weights, views of a flat buffer) are copied once and share memory in the copy too; of
    a large storage only the range that the state uses is copied. For a state on CUDA the buffer is page-locked.
    """

    def __init__(self) -> None:
        self._buffer: np.ndarray | None = None
        self._unlock: weakref.finalize[..., Any] | None = None
        self._refused = False  # whether the system refuses to lock pages for this process
        # The layout of the last state, which is the same at the next save of the same state.
        self._layouts: list[object] = []
        self._copies: list[torch.Tensor] = []
        self._moves: list[tuple[torch.Tensor, torch.Tensor]] = []  # (bytes of the buffer, bytes of the state)

    def take(self, tree: Any) -> Any:
        """A copy of ``tree`` on the host, valid until the next call. Raises TypeError as `_map` does."""
        leaves: list[torch.Tensor] = []
        _map(tree, "", leaves.append)
        layouts = [_layout(leaf) for leaf in leaves]
        if layouts != self._layouts:
            self._lay_out([leaf.detach() for leaf in leaves])
            self._layouts = layouts
        for room, source in self._moves:
            if source.is_cuda:
                room.copy_(source, non_blocking=self._unlock is not None)
        _move([(room, source) for room, source in self._moves if not source.is_cuda])
        for device in {source.device for _, source in self._moves if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        copies = iter(self._copies)
        return _map(tree, "", lambda leaf: next(copies))

    def _lay_out(self, leaves: list[torch.Tensor]) -> None:
        """Assign each tensor its place in the buffer."""
        copies, moves = list(leaves), []
        shared: dict[tuple[torch.device, int], list[int]] = defaultdict(list)
        for index, leaf in enumerate(leaves):
            if _is_plain(leaf):
                shared[leaf.device, leaf.untyped_storage().data_ptr()].append(index)
            else:
                copies[index] = leaf.resolve_conj().resolve_neg().to("cpu", copy=True)
        spans = [(indices, *_span([leaves[index] for index in indices])) for indices in shared.values()]
        starts = [0, *itertools.accumulate(-(-nbytes // _ALIGN) * _ALIGN for _, _, nbytes in spans)]
        buffer = self._reserve(starts[-1], any(leaf.is_cuda for leaf in leaves))
        for (indices, begin, nbytes), start in zip(spans, starts):
            room, storage = torch.from_numpy(buffer[start : start + nbytes]), leaves[indices[0]].untyped_storage()
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, begin, (nbytes,), (1,))
            moves.append((room, source))
            for index in indices:
                t = leaves[index]
                at = room.untyped_storage(), int(t.storage_offset()) - begin // t.itemsize
                copies[index] = torch.empty(0, dtype=t.dtype).set_(*at, t.size(), t.stride())
        self._copies, self._moves = copies, moves

    def release(self) -> None:
        """Free the buffer. Trees that :meth:`take` returned stay valid."""
        if self._unlock is not None:
            self._unlock()
        self._buffer = self._unlock = None
        self._layouts, self._copies, self._moves = [], [], []

    def _reserve(self, nbytes: int, lock: bool) -> np.ndarray:
        lock = lock and not self._refused
        if self._buffer is None or self._buffer.nbytes < nbytes or (lock and self._unlock is None):
            self.release()
            self._buffer = _own_pages(max(nbytes, 1))
            if lock:
                self._lock(self._buffer)
        return self._buffer

    def _lock(self, buffer: np.ndarray) -> None:
        """Lock its pages, so that the device writes there directly; otherwise the copy is slower, but just as correct.

        Registering ordinary memory takes only its own size; torch rounds pinned memory up to powers of two.
        """
        cudart, address = torch.cuda.cudart(), buffer.ctypes.data
        code = int(cudart.cudaHostRegister(address, buffer.nbytes, 0))
        if code == 0:
            # Memory freed while registered would make the next user of its addresses fail, so this is called at the
            # latest when the array is destroyed, just before its memory is freed.
            self._unlock = weakref.finalize(buffer, cudart.cudaHostUnregister, address)
            return
        self._refused = True
        # CUDA keeps the error, and torch would raise it after the next kernel, whatever that is: clear it here.
        with contextlib.suppress(RuntimeError):
            torch.ones((), device="cuda")
        log.warning(
            "%.1f MB of host memory for saves can't be page-locked (cudaHostRegister: error %d): steps wait longer for the "
            "copy of a save; raise the limit (ulimit -l, docker run --ulimit memlock=-1)", buffer.nbytes / 1e6, code,
        )  # fmt: skip


def _own_pages(nbytes: int) -> np.ndarray:
    """Memory in pages of its own, which are zero in a forked process; a fork would copy locked pages, all at once."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    for advice in (_WIPEONFORK, getattr(mmap, "MADV_HUGEPAGE", 0)) if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # an old kernel, or one built without
            pages.madvise(advice)
    return np.frombuffer(pages, dtype=np.uint8)


def _span(tensors: list[torch.Tensor]) -> tuple[int, int]:
    """Offset and size in bytes of the range of their common storage that tensors use."""
    begins = [int(t.storage_offset()) * t.itemsize for t in tensors]
    extents = [(1 + sum((n - 1) * s for n, s in zip(t.size(), t.stride()))) * t.itemsize for t in tensors]
    size = max(t.itemsize for t in tensors)  # elements of every type must begin at a multiple of their size
    begin = min(begins) // size * size
    return begin, max(map(sum, zip(begins, extents))) - begin


def _move(moves: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy host memory, (to, from) each, on up to four threads.

    Hundreds of parallel `copy_` wait for torch's threads hundreds of times (362 ms instead of 87 ms); this waits once.
    """
    places = [(room.data_ptr(), source.data_ptr(), room.nbytes) for room, source in moves]
    pieces = [(to + at, source + at, min(_PIECE, n - at)) for to, source, n in places for at in range(0, n, _PIECE)]
    count = min(4, torch.get_num_threads())

    def work(share: list[tuple[int, int, int]]) -> None:
        for piece in share:
            ctypes.memmove(*piece)  # lets other threads run

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, [pieces[k::count] for k in range(count)]))


def _layout(tensor: torch.Tensor) -> object:
    """What the layout of the buffer depends on; a value equal to no other where that can't be reused."""
    if not _is_plain(tensor):
        return object()
    place = tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return place, tensor.dtype, tensor.size(), tensor.stride()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its values are the bytes of its storage, and it has some."""
    special = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return not special and tensor.numel() > 0


def _map(node: Any, place: str, replace: Callable[[torch.Tensor], Any]) -> Any:
    """A tree with its tensors replaced.

    Raises TypeError for a leaf or key that ``torch.load(weights_only=True)`` would not restore; names its place.
    """
    kind = type(node)
    if kind in _TENSORS:
        if node.device.type == "meta":
            raise TypeError(f"cannot save {place}: a tensor on the meta device has no values")
        return replace(node)
    if kind in _PLAIN:
        return node
    if isinstance(node, np.generic):
        return node.item()
    if kind in (dict, OrderedDict, defaultdict, Counter):
        for key in node:
            if type(key) not in _PLAIN:
                raise TypeError(f"cannot save {place}: the key {key!r} is a {type(key).__name__}, not a plain value")
        pairs = {key: _map(value, f"{place}.{key}".lstrip("."), replace) for key, value in node.items()}
        result: Any = pairs if kind is defaultdict else kind(pairs)  # type: ignore[call-overload]
        if hasattr(node, "_metadata"):  # versions of the modules, which load_state_dict reads
            result._metadata = copy.copy(node._metadata)
        return result
    if kind in (list, tuple, set):
        return kind(_map(value, f"{place}[{index}]", replace) for index, value in enumerate(node))
    raise TypeError(
        f"cannot save {place or 'the state'}: {kind.__module__}.{kind.__qualname__} is not a tensor, number, string, "
        "dict, list, tuple or set; a checkpoint must load without running code: return plain values from state_dict()"
    )
