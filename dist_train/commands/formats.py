"""The files that predictions are written to: CSV, JSON lines, Parquet, and torch's own.

Each format encodes columns on the rank that has predicted them, and writes them, one part after the other, on rank 0. Only
`pt` holds all of them in memory.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from dist_train.config.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.evaluation.predict import Column

    Columns = dict[str, Column]

MOST_VALUES = 2**31 - 1  # inside one column of one part: Arrow's offsets are 32-bit numbers
PARQUET = "parquet needs pyarrow, which isn't installed: pip install 'dist_train[parquet]', or pip install pyarrow"


class Format(Protocol):
    """How columns become a file."""

    def encode(self, columns: Columns) -> Any:
        """What `writing` takes, of consecutive samples. Raises ConfigError where the format can't hold them."""

    def writing(self, path: Path | None) -> contextlib.AbstractContextManager[Callable[[Any], None]]:
        """A context that gives the function to write with; None is the standard output."""


def format_of(name: str | None, output: str | None) -> Format:
    """The format asked for, else the one of the output's suffix, else CSV.

    Raises:
        ConfigError: it needs a file, or a package that isn't installed.
    """
    suffix = "" if output is None else Path(output).suffix[1:].lower()
    name = name or (suffix if suffix in FORMATS else "csv")
    if output is None and name in ("pt", "parquet"):
        raise ConfigError.single("--output", f"{name} can't be printed: give --output FILE.{name}")
    if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError.single("--format", PARQUET)
    return FORMATS[name]()


@contextlib.contextmanager
def _text(path: Path | None) -> Iterator[TextIO]:
    if path is not None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            yield file
        return
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Csv:
    """A column for each number; a tensor of (n, k) has k columns, `name_0` and so on."""

    def encode(self, columns: Columns) -> tuple[list[str], str]:
        """The names, and the rows as text."""
        flat: dict[str, Any] = {}
        for name, column in columns.items():
            flat |= _flat(name, column)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(zip(*flat.values(), strict=True))
        return list(flat), buffer.getvalue()

    @contextlib.contextmanager
    def writing(self, path: Path | None) -> Iterator[Callable[[tuple[list[str], str]], None]]:
        """Names once, then rows."""
        header: list[str] = []

        with _text(path) as file:

            def write(part: tuple[list[str], str]) -> None:
                if not header:
                    header.extend(part[0])
                    csv.writer(file, lineterminator="\n").writerow(header)
                if part[0] != header:
                    raise _unlike("csv", header, part[0])
                file.write(part[1])

            yield write


def _flat(name: str, column: Column) -> dict[str, list[Any]]:
    from torch import Tensor

    if isinstance(column, Tensor) and column.dim() <= 2:
        array = column.numpy()
        if array.ndim == 1:
            return {name: _texts(array)}
        return {f"{name}_{k}": _texts(array[:, k]) for k in range(array.shape[1])}
    if isinstance(column, list) and not any(isinstance(entry, Tensor) and entry.dim() for entry in column):
        return {name: [_texts(entry.numpy()[None])[0] if isinstance(entry, Tensor) else entry for entry in column]}
    shape = (
        f"({', '.join(['n', *map(str, column.shape[1:])])})" if isinstance(column, Tensor) else "tensors of any size"
    )
    raise ConfigError.single(
        "--format", f"csv holds (n,) and (n, k), but the task's {name} is {shape}: use --format jsonl, parquet or pt"
    )


def _texts(array: Any) -> list[Any]:
    """Numbers in the fewest digits that read back bitwise identical."""
    return array.tolist() if array.dtype.kind in "iu" else [str(value) for value in array]


class Jsonl:
    """An object for each sample, tensors as nested lists."""

    def encode(self, columns: Columns) -> str:
        """The lines."""
        parts = {name: _lists(name, column) for name, column in columns.items()}
        lines = (dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True))
        return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)

    @contextlib.contextmanager
    def writing(self, path: Path | None) -> Iterator[Callable[[str], Any]]:
        """Lines."""
        with _text(path) as file:
            yield file.write


def _lists(name: str, column: Column) -> list[Any]:
    """Per sample what JSON has for it."""
    from torch import Tensor

    if isinstance(column, Tensor) and column.dim() == 1:
        return _numbers(name, column)  # type: ignore[no-any-return]
    entries = [_numbers(name, entry) if isinstance(entry, Tensor) else entry for entry in column]
    if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
        raise _not_in_json(name, "inf or nan")
    return entries


def _numbers(name: str, tensor: Tensor) -> Any:
    """Nested lists; 32-bit floats in the fewest digits that read back bitwise identical."""
    array = tensor.numpy()
    if array.dtype.kind == "c":
        raise _not_in_json(name, "complex numbers")
    if array.dtype.kind != "f":
        return array.tolist()
    if not tensor.isfinite().all():
        raise _not_in_json(name, "inf or nan")
    return array.astype(str).astype(float).tolist()


def _not_in_json(name: str, what: str) -> ConfigError:
    return ConfigError.single(
        "--format", f"{name} holds {what}, which JSON has no word for: use --format pt or parquet"
    )


class Parquet:
    """A column for each name, tensors as nested lists; a row group for each eval batch."""

    def encode(self, columns: Columns) -> Any:
        """An Arrow table."""
        import pyarrow

        return pyarrow.table({name: _arrow(name, column) for name, column in columns.items()})

    @contextlib.contextmanager
    def writing(self, path: Path | None) -> Iterator[Callable[[Any], None]]:
        """Row groups; the first says which columns there are."""
        from pyarrow.parquet import ParquetWriter

        with contextlib.ExitStack() as stack:
            writers: list[Any] = []

            def write(table: Any) -> None:
                if not writers:
                    writers.append(stack.enter_context(ParquetWriter(path, table.schema)))
                if table.schema != writers[0].schema:
                    raise _unlike("parquet", _types(writers[0].schema), _types(table.schema))
                writers[0].write_table(table)

            yield write


def _types(schema: Any) -> list[str]:
    return [f"{field.name}: {field.type}" for field in schema]


def _arrow(name: str, column: Column) -> Any:
    """An Arrow array: numbers, texts, or lists as deep as the tensors have dims."""
    import numpy
    import pyarrow
    from torch import Tensor

    entries = list(column)
    if not isinstance(entries[0], Tensor):
        return pyarrow.array(entries)
    shapes = [tuple(entry.shape) for entry in entries]
    depths, dtypes = {len(shape) for shape in shapes}, {entry.dtype for entry in entries}
    if len(depths) > 1 or len(dtypes) > 1 or entries[0].is_complex():
        found = ", ".join(sorted({f"{entry.dtype} of {entry.dim()} dims" for entry in entries}))
        raise ConfigError.single(
            "--format", f"parquet holds real numbers of one dtype and depth in a column, but {name} has {found}: use pt"
        )
    if sum(map(math.prod, shapes)) > MOST_VALUES:
        raise ConfigError.single(
            "data.eval_batch_size", f"too many values in one part of {name} for parquet: make it smaller"
        )
    values = pyarrow.array(numpy.concatenate([entry.numpy().reshape(-1) for entry in entries]))
    for axis in reversed(range(depths.pop())):
        lengths = numpy.concatenate([numpy.full(math.prod(shape[:axis]), shape[axis], numpy.int64) for shape in shapes])
        offsets = numpy.concatenate([[0], lengths.cumsum()]).astype(numpy.int32)
        values = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values)
    return values


class Torch:
    """A dict by name, for `torch.load(file, weights_only=True)`: one tensor where all samples have one shape, else a list."""

    def encode(self, columns: Columns) -> Columns:
        """As they are; a sample's index is its place."""
        return {name: column for name, column in columns.items() if name != "index"}

    @contextlib.contextmanager
    def writing(self, path: Path | None) -> Iterator[Callable[[Columns], None]]:
        """All at the end."""
        import torch

        parts: list[Columns] = []

        def write(part: Columns) -> None:
            if parts and part.keys() != parts[0].keys():
                raise _unlike("pt", list(parts[0]), list(part))
            parts.append(part)

        yield write
        assert path is not None
        torch.save({name: _joined([part[name] for part in parts]) for name in parts[0]} if parts else {}, path)


def _joined(columns: list[Column]) -> Column:
    import torch
    from torch import Tensor

    tensors = [column for column in columns if isinstance(column, Tensor)]
    if len(tensors) == len(columns) and len({(column.shape[1:], column.dtype) for column in tensors}) == 1:
        return torch.cat(tensors)
    entries = itertools.chain.from_iterable(columns)
    return [
        entry.clone() if isinstance(entry, Tensor) else entry for entry in entries
    ]  # a view would be saved with its base


def _unlike(form: str, before: list[str], now: list[str]) -> ConfigError:
    other = [name for name in now if name not in before] or [name for name in before if name not in now] or now
    return ConfigError.single(
        "--format",
        f"{form} has one set of columns for all samples, but eval batches differ in {', '.join(other[:4])}: use --format jsonl",
    )


FORMATS: dict[str, Callable[[], Format]] = {"csv": Csv, "jsonl": Jsonl, "pt": Torch, "parquet": Parquet}
