"""Tables in text files, for regression and classification."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_train.config.errors import did_you_mean
from dist_train.data.errors import DataError
from dist_train.library.arrays import Arrays
from dist_train.library.splits import split_indices

_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})


class _Table(NamedTuple):
    path: Path
    header: list[str]
    cells: np.ndarray
    """(rows, columns) str, empty where the value is missing."""
    lines: list[int]
    """The line of the file that each row ends in."""

    def words(self, names: Sequence[str]) -> np.ndarray:
        """(rows, names) str. Raises DataError for a name that isn't in the header."""
        for name in names:
            if name not in self.header:
                near = did_you_mean(name, self.header)
                raise DataError(f"{self.path} has no column {name!r}; it has {', '.join(self.header)}{near}")
        return self.cells[:, [self.header.index(name) for name in names]]

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """(rows, names) float64, NaN where the value is missing."""
        words = self.words(names)
        values = np.array([_number(word) for word in words.flat]).reshape(words.shape)
        for r, c in np.argwhere(np.isinf(values)):
            hint = "a column of words can be left out by ignore, or be the target with kind: classification"
            raise self.error(r, names[c], f"expected a number, found {words[r, c]!r}; {hint}")
        return values

    def refuse(self, names: Sequence[str], empty: np.ndarray, hint: str) -> None:
        """DataError for the first empty cell."""
        for r, c in np.argwhere(empty):
            others = f" (and {empty.sum() - 1} more empty cells)" if empty.sum() > 1 else ""
            raise self.error(r, names[c], f"no value{others}; {hint}")

    def error(self, row: int, name: str, message: str) -> DataError:
        return DataError(f"{self.path} line {self.lines[row]}, column {name!r}: {message}")


def _number(word: str) -> float:
    """NaN for no text, infinity for text that isn't a number."""
    try:
        return float(word or "nan")
    except ValueError:
        return math.inf


def _open(path: str | os.PathLike[str], delimiter: str) -> _Table:
    where = Path(path)
    if not where.is_file():
        raise DataError(f"CSV: no file {where} (looked in {where.absolute().parent})")
    return _read(where.resolve(), delimiter, where.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # train, val and test are usually parts of one file
def _read(path: Path, delimiter: str, modified: int) -> _Table:
    cells, lines = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for row in filter(None, reader):
                if len(row) != len(header):
                    found = f"expected {len(header)} columns as in the header, found {len(row)}"
                    raise csv.Error(f"{found}; is {delimiter!r} the delimiter?")
                cells.append(["" if word.lower() in _MISSING else word for word in map(str.strip, row)])
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text: {error}") from error
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from error
    if not header:
        raise DataError(f"{path} is empty; expected a first line with the names of the columns")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path} line 1: column {repeated[0]!r} occurs more than once")
    return _Table(path, header, np.array(cells, dtype=object).reshape(len(cells), len(header)), lines)


class CSV(Arrays):
    """A table with a header line: numbers in, one or more numbers or a class out.

    Give `train_path`, the file with the training rows, wherever something is learned from them (a split, scaling, means,
    classes). If `path` is that same file, it is split by `parts` and `split` says which part this is; any other `path` is
    used in full, treated as the training rows were. So the test data of a finished run can be replaced by a new file for
    prediction.

    Args:
        path: the file of these samples.
        target: name or names of what to predict. A file without them, or with empty cells in all of them, gives
            inputs alone, for prediction.
        features: columns to use, all others by default.
        ignore: columns that aren't features.
        split: "train", "val" or "test" of `train_path`; None takes all rows for training.
        train_path: the file with the training rows.
        parts: sizes of train, val and test, as fractions or counts.
        seed: of the split.
        kind: "regression" (targets float32, (N,) or (N, k)) or "classification" (int64, an index into `classes`, the
            sorted values of the training rows; the split is then stratified).
        standardize: scale features to mean 0 and standard deviation 1 over the training rows.
        standardize_target: the same for targets; `original_units` undoes it.
        missing: what to do about an empty cell (or NA, nan, null, ?): "error", "drop" the row, or take the "mean" of the
            training rows (of a feature; rows without a target are dropped).
        delimiter: between columns.

    Attributes:
        features, targets_named: names of the columns used.
        lines: line of the file of each sample.
        classes: names of the classes, for classification.

    Raises:
        DataError: names the file, line and column.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        target: str | Sequence[str],
        *,
        features: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        split: str | None = None,
        train_path: str | os.PathLike[str] | None = None,
        parts: Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        kind: str = "regression",
        standardize: bool = False,
        standardize_target: bool = False,
        missing: str = "error",
        delimiter: str = ",",
    ) -> None:
        if kind not in ("regression", "classification"):
            raise DataError(f"CSV: expected kind to be regression or classification, found {kind!r}")
        if missing not in ("error", "drop", "mean"):
            raise DataError(f"CSV: expected missing to be error, drop or mean, found {missing!r}")
        self.targets_named = [target] if isinstance(target, str) else list(target)
        self._classify, self._missing = kind == "classification", missing
        if self._classify and (len(self.targets_named) != 1 or standardize_target):
            raise DataError("CSV: a classification has one target, which isn't standardized")
        if train_path is None and (split or standardize or standardize_target or missing == "mean" or self._classify):
            hint = "give train_path, the file that holds them (the same as path, if one file is split into parts)"
            learned = "splits, standardizing, means and classes are learned from the training rows"
            raise DataError(f"CSV: {path}: {learned}: {hint}")
        table = _open(path, delimiter)
        training = table if train_path is None else _open(train_path, delimiter)
        training.words([*self.targets_named, *(features or ()), *ignore])  # refuses unknown names
        left_out = {*self.targets_named, *ignore}
        self.features = [name for name in features or training.header if name not in left_out]
        if not self.features:
            raise DataError(f"{training.path}: no feature remains of the columns {', '.join(training.header)}")

        x, y, rows = self._rows(training, training=True)
        assert y is not None
        mine = learned_from = np.arange(len(x))
        if split is not None:
            labels = y[:, 0] if self._classify else None
            mine, learned_from = (
                split_indices("CSV", name, len(x), parts, seed=seed, labels=labels) for name in (split, "train")
            )
        self._learn(x[learned_from], y[learned_from], standardize, standardize_target)
        if table.path == training.path:
            x, y, rows = x[mine], y[mine], rows[mine]
        else:
            x, y, rows = self._rows(table, training=False)
        if not len(x):
            raise DataError(f"CSV: {path}: no row remains for {split or 'training'}")
        self.lines = [table.lines[row] for row in rows]
        x = (np.where(np.isnan(x), self._fill, x) - self._x_mean) / self._x_std
        targets = None if y is None else self._targets(table, y, rows)
        super().__init__(torch.from_numpy(x).to(torch.get_default_dtype()), targets, classes=self.classes)

    def original_units(self, values: Tensor) -> Tensor:
        """Standardized targets or predictions, (N,), (N, 1) or (N, k), in the units of the file."""
        shape = (-1,) if values.dim() == 1 else (1, -1)
        mean, std = (torch.as_tensor(v, dtype=values.dtype, device=values.device) for v in (self._y_mean, self._y_std))
        return values * std.view(shape) + mean.view(shape)

    def _rows(self, table: _Table, training: bool) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Features (N, F) with NaN where a mean is to go, targets (N, k) or None, and the N rows that are kept."""
        x = table.numbers(self.features)
        empty = np.isnan(x)
        keep = np.ones(len(x), dtype=bool)
        if self._missing == "error":
            table.refuse(self.features, empty, "set missing: drop or mean, or ignore the column")
        elif self._missing == "drop":
            keep &= ~empty.any(axis=1)
        y = None
        if training or set(self.targets_named) <= set(table.header):
            y = table.words(self.targets_named) if self._classify else table.numbers(self.targets_named)
            absent = y == "" if self._classify else np.isnan(y)
            if absent.all() and not training:
                y = None
            elif self._missing == "error":
                table.refuse(self.targets_named, absent, "set missing: drop; to predict, leave out the whole column")
            else:
                keep &= ~absent.any(axis=1)
        return x[keep], None if y is None else y[keep], np.flatnonzero(keep)

    def _learn(self, x: np.ndarray, y: np.ndarray, standardize: bool, standardize_target: bool) -> None:
        self._fill = np.nansum(x, axis=0) / np.maximum((~np.isnan(x)).sum(axis=0), 1)
        self._x_mean, self._x_std = _moments(np.where(np.isnan(x), self._fill, x), standardize)
        self.classes = None
        if self._classify:
            self.classes = sorted(set(y[:, 0].tolist()), key=lambda word: (_number(word), word))
        else:
            self._y_mean, self._y_std = _moments(y, standardize_target)

    def _targets(self, table: _Table, y: np.ndarray, rows: np.ndarray) -> Tensor:
        if self.classes is None:
            scaled = torch.from_numpy((y - self._y_mean) / self._y_std).to(torch.get_default_dtype())
            return scaled[:, 0] if scaled.shape[1] == 1 else scaled
        index = {word: k for k, word in enumerate(self.classes)}
        for row, word in zip(rows, y[:, 0]):
            if word not in index:
                message = f"class {word!r} is in no training row; known are {', '.join(index)}"
                raise table.error(row, self.targets_named[0], message)
        return torch.tensor([index[word] for word in y[:, 0]])


def _moments(values: np.ndarray, wanted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column (1 for a constant one); 0 and 1 if they aren't wanted."""
    if not wanted:
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    deviation = values.std(axis=0)
    return values.mean(axis=0), np.where(deviation > 0, deviation, 1.0)
