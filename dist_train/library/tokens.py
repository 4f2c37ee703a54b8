"""Windows of token numbers for language models: from a memory-mapped file, or packed from documents."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.errors import DataError
from dist_train.data.plan import Indices
from dist_train.files import replacing

# llm.c's and modded-nanogpt's .bin files begin with 256 int32: this number, a version, how many tokens follow.
_HEADERS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
_HEADER_BYTES = 1024


class Tokens(Dataset[Any]):
    """Pairs (input, target) of int64 tensors (length,), the target one token further: windows of a long row of tokens.

    Args:
        tokens: a .bin file of bare numbers (as nanoGPT writes them, or with llm.c's header), a .npy file, or a 1-d array.
            Files are memory-mapped: only the windows that are read come into memory, shared by all processes of a machine.
        length: tokens of an input.
        stride: tokens from one window's start to the next; by default `length`, so that each token is one target. The rest at
            the end that fills no window is left out.
        random: each sample starts anywhere, new in each epoch (as nanoGPT's `get_batch`), drawn from torch's generator, which is
            seeded by seed, epoch and sample.
        samples: with `random`, the samples of an epoch; by default as many as there are windows one after the other.
        dtype: of a .bin without a header: uint16 or uint32.

    Raises:
        DataError: the file is missing, isn't of whole numbers, or holds fewer than length + 1 tokens.
    """

    def __init__(
        self,
        tokens: Any,
        length: int,
        *,
        stride: int | None = None,
        random: bool = False,
        samples: int | None = None,
        dtype: str = "uint16",
    ) -> None:
        if length < 1 or (stride is not None and stride < 1) or (samples is not None and samples < 1):
            raise DataError(
                f"Tokens: length, stride and samples are at least 1, found {length}, {stride} and {samples}"
            )
        if random and stride is not None:
            raise DataError("Tokens: random windows start anywhere, so they have no stride: leave it out")
        if samples is not None and not random:
            raise DataError(
                "Tokens: the number of samples follows from length and stride; with random: true it can be chosen"
            )
        self._source, self._dtype, self._tokens = tokens, dtype, _opened(tokens, dtype)
        self.length, self.stride, self.random = length, stride or length, random
        total = len(self._tokens)
        if total < length + 1:
            raise DataError(
                f"Tokens: {_named(tokens)}: expected at least {length + 1:,} tokens for one window, found {total:,}"
            )
        self._count = samples or (total - length - 1) // self.stride + 1

    @property
    def tokens(self) -> NDArray[Any]:
        """All of them: (N,), of the file's dtype; of a file a view of the disk."""
        if self._tokens is None:  # in a spawned loader worker
            self._tokens = _opened(self._source, self._dtype)
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        held = dict(self.__dict__)
        if isinstance(self._source, str | os.PathLike):
            held["_tokens"] = None  # pickling it would read the whole file
        return held

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -self._count <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        if self.random:
            start = int(torch.randint(len(self.tokens) - self.length, ()))
        else:
            start = (index % self._count) * self.stride
        window = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))
        return window[:-1], window[1:]

    @property
    def read_batch(self) -> Any:
        """Reads the windows of a batch at once, unless they are drawn."""
        return None if self.random else self._read

    def _read(self, indices: Indices) -> tuple[Tensor, Tensor]:
        batch = np.empty((len(indices), self.length + 1), dtype=np.int64)
        for row, start in zip(batch, (indices * self.stride).tolist(), strict=True):
            row[:] = self.tokens[start : start + self.length + 1]
        windows = torch.from_numpy(batch)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class PackedTokens(Tokens):
    """Documents joined to one row, each followed by `eos`, and cut into windows that cross their borders, without padding.

    Args:
        documents: lists of token numbers: in a list, a map-style dataset (`datasets.Dataset`, say), or a .jsonl file with one
            document on each line. They are read once, in their order, and kept in memory in two or four bytes a token; for more
            than fits there, `pack_tokens` writes a file for `Tokens`.
        eos: the token behind each document.
        column: where a document is a dict, its key.
        length, stride, random, samples: as for `Tokens`.

    Attributes:
        starts: (D + 1,) int64: where each document begins in the row, and the row's end.
    """

    def __init__(
        self,
        documents: Any,
        length: int,
        *,
        eos: int,
        column: str = "input_ids",
        stride: int | None = None,
        random: bool = False,
        samples: int | None = None,
    ) -> None:
        tokens, self.starts = _packed(documents, eos, column)
        super().__init__(tokens, length, stride=stride, random=random, samples=samples)

    def documents_in(self, index: int) -> range:
        """The documents of which window `index` (without `random`) holds a token.

        Raises:
            DataError: windows are drawn, so that an index has none of its own.
        """
        if self.random:
            raise DataError("PackedTokens: random windows hold other documents in each epoch")
        first = range(len(self))[index] * self.stride
        ends = np.searchsorted(self.starts, [first, first + self.length], side="right")
        return range(int(ends[0]) - 1, int(ends[1]))


def pack_tokens(documents: Any, path: str | os.PathLike[str], *, eos: int, column: str = "input_ids") -> int:
    """Write documents (as `PackedTokens` takes them) into a .npy file for `Tokens`: each followed by `eos`, uint16 or uint32.

    Their starts, (D + 1,) int64, are written beside it as `NAME.index.npy`.

    Returns:
        How many tokens there are.
    """
    target = Path(path)
    if target.suffix != ".npy":
        raise DataError(f"pack_tokens: expected a path that ends in .npy, found {target}")
    tokens, starts = _packed(documents, eos, column)
    for place, values in ((target.with_suffix(".index.npy"), starts), (target, tokens)):
        with replacing(place) as temporary, open(temporary, "wb") as file:
            np.save(file, values)
    return len(tokens)


def _packed(documents: Any, eos: int, column: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All tokens in one row, uint16 where they fit, and where each document begins."""
    joined, starts = array("I"), array("q", [0])
    end = array("I", [_checked_eos(eos)])
    for number, document in enumerate(_documents(documents)):
        if isinstance(document, dict):
            if column not in document:
                raise DataError(
                    f"document {number} has no {column!r}; it has {', '.join(map(str, document))}: set column"
                )
            document = document[column]
        values = np.asarray(document)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            what = f"{values.dtype} of shape {values.shape}"
            raise DataError(f"document {number}: expected a list of token numbers, found {what}; tokenize texts first")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**32:
            raise DataError(
                f"document {number}: tokens are numbers from 0 to {2**32 - 1}, found {values.min()}, {values.max()}"
            )
        joined.frombytes(values.astype(np.uint32).tobytes())
        joined.extend(end)
        starts.append(len(joined))
    tokens = np.frombuffer(joined, dtype=np.uint32) if joined else np.empty(0, np.uint32)
    small = not len(tokens) or int(tokens.max()) < 2**16
    return tokens.astype(np.uint16) if small else tokens, np.array(starts, dtype=np.int64)


def _checked_eos(eos: int) -> int:
    if isinstance(eos, bool) or not 0 <= eos < 2**32:
        raise DataError(f"eos: expected the number of a token, found {eos!r}")
    return eos


def _documents(documents: Any) -> Iterator[Any]:
    if isinstance(documents, str | os.PathLike):
        return _lines(Path(documents))
    if isinstance(documents, Iterable):
        return iter(documents)
    return (documents[index] for index in range(len(documents)))  # torch's datasets


def _lines(path: Path) -> Iterator[Any]:
    if not path.is_file() or path.suffix != ".jsonl":
        what = f"expected a .jsonl file, found {path}" if path.is_file() else f"no file {path}"
        raise DataError(f"documents: {what} (looked in {path.absolute().parent})")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: this line isn't JSON: {error}") from None


def _named(tokens: Any) -> str:
    return str(tokens) if isinstance(tokens, str | os.PathLike) else f"the array of {len(tokens):,}"


def _opened(tokens: Any, dtype: str) -> Any:
    """(N,) of whole numbers: the file memory-mapped, or the array."""
    if isinstance(tokens, str | os.PathLike):
        path = Path(tokens)
        if not path.is_file():
            raise DataError(f"Tokens: no file {path} (looked in {path.absolute().parent})")
        if path.suffix not in (".bin", ".npy"):
            raise DataError(f"Tokens: expected a .bin or .npy file, found {path}")
        tokens = _bin(path, dtype) if path.suffix == ".bin" else _npy(path)
    else:
        tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"Tokens: expected one row of whole numbers, found {tokens.dtype} of shape {tokens.shape}")
    return tokens


def _npy(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"Tokens: {path} can't be read: {error}") from error


def _bin(path: Path, dtype: str) -> Any:
    if dtype not in ("uint16", "uint32"):
        raise DataError(f"Tokens: expected dtype to be uint16 or uint32, found {dtype!r}")
    size, offset, kind = path.stat().st_size, 0, np.dtype(dtype)
    if size >= _HEADER_BYTES:
        magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
        if magic in _HEADERS:
            known, number = _HEADERS[magic]
            if version not in (1, known):
                raise DataError(
                    f"Tokens: {path} has a header of version {version}, of which the format isn't known here"
                )
            kind, offset = np.dtype(number), _HEADER_BYTES
            if size - offset != count * kind.itemsize:
                hint = f"its header promises {count:,} tokens of {kind}"
                raise DataError(f"Tokens: {path} is damaged: {hint}, but {size - offset:,} bytes follow")
    if (size - offset) % kind.itemsize or size == offset:
        raise DataError(f"Tokens: {path} has {size - offset:,} bytes, which are no {kind} numbers: is dtype right?")
    return np.memmap(path, dtype=kind.newbyteorder("<"), mode="r", offset=offset)
