"""metrics.jsonl: the record of a run, one JSON object a line.

A row is {"time", "step", "epoch", "samples", "split", **metrics}. `time` is ISO 8601 in UTC, `step` counts from 1 (0 is
"before training"). Every line is strictly valid JSON: a metric that isn't finite is written as null (JSON has no NaN;
pandas, jq and DuckDB read null as a missing number), which `read_rows` returns as NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dist_train.config.fields import RECORD_FIELDS as FIELDS
from dist_train.files import retried, utc_now

Row = dict[str, Any]
_BLOCK = 1 << 16
_encode = json.JSONEncoder(allow_nan=False).encode


def make_row(split: str, step: int, epoch: int | float, samples: int, metrics: Mapping[str, Any]) -> Row:
    """A row to be written; metrics become plain int or float. ValueError for a metric named like a field."""
    row: Row = {"time": utc_now(), "step": int(step), "epoch": epoch, "samples": int(samples), "split": split}
    for name, value in metrics.items():
        if name in FIELDS:
            raise ValueError(f"a metric may not be called {name!r}: {', '.join(FIELDS)} are fields of every row")
        row[name] = value if type(value) is float or type(value) is int else float(value)
    return row


def finite(value: Any) -> Any:
    """A copy of plain data that is valid JSON: a float that isn't finite becomes None, in dicts and lists as well."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encode(row: Row) -> bytes:
    """The row's line, newline included; what isn't finite is null."""
    try:
        return _encode(row).encode() + b"\n"
    except ValueError:  # nan or inf, which are rare
        return _encode(finite(row)).encode() + b"\n"


def parse_line(line: bytes) -> Any:
    """The content of a line of JSONL; None if it is empty, or torn by a kill (the next writer began a new line).

    Raises:
        ValueError, RecursionError: it is something else.
    """
    text = line.rstrip(b"\n")
    torn = text.startswith(b'{"') and not text.endswith(b"}")
    return None if torn or not text else json.loads(text)


def parse(line: bytes) -> Row | None:
    """The row in a complete line, its newline included, or None if there is none."""
    try:
        row = parse_line(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def cut_back(path: str | os.PathLike[str], step: int, pending: Collection[str] = ()) -> int:
    """Drop the rows after `step` and a torn last line, durably, so that a run resumed there writes no row twice.

    `pending` names splits that will be evaluated again at `step` itself: their rows at that step are dropped too, with
    whatever follows. Rows are in the order of their steps, so one truncation does it, which is atomic and costs the same
    however long the file is. Returns the number of bytes dropped; 0 if there is no file.
    """
    if not Path(path).exists():
        return 0
    with retried("open", path, lambda: open(path, "r+b")) as file:
        size = end = file.seek(0, os.SEEK_END)
        back, settled = 0, False
        while back < size and not settled:
            back = min(size, max(_BLOCK, 2 * back))
            at, end, seen = file.seek(size - back), size, 0
            lines = file.read().splitlines(keepends=True)
            if back < size:  # the first piece is the end of a line
                at += len(lines.pop(0))
            for line in lines:
                row = parse(line)
                # Only train rows prove that nothing before is dropped: a test row has the step of the best checkpoint.
                if row is not None and row["step"] < step and row.get("split") == "train":
                    end, settled = size, True
                elif end == size and (row is None or row["step"] > step or _again(row, step, seen, pending)):
                    end = at
                seen = max(seen, row["step"]) if row is not None else seen
                at += len(line)
        if end < size:
            retried("truncate", path, lambda: file.truncate(end))
            retried("sync", path, lambda: os.fsync(file.fileno()))
    return size - end


def _again(row: Row, step: int, seen: int, pending: Collection[str]) -> bool:
    return row.get("split") in pending and (row["step"] == step or row["step"] < seen)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """All complete rows in the order of the file, null metrics as NaN; [] if there is no file."""
    if not os.path.isfile(path):  # opening a FIFO would block
        return []
    with open(path, "rb") as file:
        rows = [row for row in map(parse, file) if row is not None]
    for row in rows:
        row.update({key: math.nan for key, value in row.items() if value is None})
    return rows
