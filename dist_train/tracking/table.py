"""metrics.csv: the rows of metrics.jsonl as a spreadsheet opens them. A copy: metrics.jsonl is the record.

A line for each row of metrics.jsonl: step, epoch, samples, time, then a column for each metric by its full name (train/loss,
val/accuracy, ...), empty where the row hasn't got it. It is written from metrics.jsonl before each checkpoint is published and at
the end of a start, so that after a kill it holds the rows up to the last checkpoint, and none twice after a resume.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from dist_train.files import replacing
from dist_train.tracking.records import Row, parse

FIRST = ("step", "epoch", "samples", "time")


class Table:
    """Keeps metrics.csv beside a metrics.jsonl that only grows.

    New lines are appended; the first time, and for a metric that wasn't there before, the file is written anew and renamed.
    """

    def __init__(self, records: Path) -> None:
        self._records, self._path = records, records.with_suffix(".csv")
        self._columns: list[str] = []
        self._read = 0  # bytes of the records that the file holds

    def update(self) -> None:
        """Bring the file up to date. Raises OSError."""
        read, self._read = self._read, 0  # after a failure all of it is written again
        with open(self._records, "rb") as file:
            file.seek(read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        rows = [_named(row) for row in map(parse, new.splitlines(keepends=True)) if row is not None]
        columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row)]))
        if read and columns == self._columns:
            with open(self._path, "ab", buffering=0) as file:
                file.write(_lines(columns, rows))
        else:
            if read:
                with open(self._records, "rb") as file:
                    lines = file.read(read + len(new)).splitlines(keepends=True)
                rows = [_named(row) for row in map(parse, lines) if row is not None]
            names = sorted(columns[len(FIRST) :], key=lambda name: not name.startswith("train/"))
            columns = [*FIRST, *names] if columns else []
            with replacing(self._path) as temporary:
                temporary.write_bytes(_lines(columns, [dict(zip(columns, columns, strict=True)), *rows]))
        self._columns, self._read = columns, read + len(new)


def _named(row: Row) -> dict[str, Any]:
    fields = {name: row.get(name) for name in FIRST}
    return fields | {f"{row['split']}/{name}": value for name, value in row.items() if name not in (*FIRST, "split")}


def _lines(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator=os.linesep).writerows(rows)
    return text.getvalue().encode()
