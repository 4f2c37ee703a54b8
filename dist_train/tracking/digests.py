"""digest/rank-0000.jsonl and so on: what `debug.digest` records of each optimizer step on each rank.

A line {"format": 1, "rank": 0, "tensors": [...]} names the tensors of the lines below it: `loss`, `gradient NAME`, `weight NAME`
and `buffer NAME`. A line {"step": 12, "digests": "..."} has 16 hexadecimal digits for each of them; zeros: the tensor has had no
value (a frozen parameter's gradient). Steps count from 1 and only increase; some are missing where this rank, or `debug.digest`,
has been off for a while.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_train.files import append_whole, retried
from dist_train.tracking.records import parse_line

log = logging.getLogger("dist_train")
FOLDER = "digest"
FORMAT = 1
_NAME = re.compile(r"rank-(\d{4,})\.jsonl")
_STEP = re.compile(rb'\{"step": (\d+), "digests": "([0-9a-f]*)"\}\n')


def file_name(rank: int) -> str:
    """The path of a rank's file inside the run's directory."""
    return f"{FOLDER}/rank-{rank:04d}.jsonl"


def rank_of(name: str) -> int | None:
    """The rank of a file of that name in the folder; None for another file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def cut_back(path: Path, step: int) -> list[str] | None:
    """Drop the steps after `step` and a torn last line, durably, as `records.cut_back` does for rows.

    What follows a line that is no such record (somebody has edited the file) is dropped too, with a warning. Returns the names of
    the tensors in the last header that is left, None if there is none or no file.
    """
    if not path.exists():
        return None
    with retried("open", path, lambda: open(path, "r+b")) as file:
        end, names = 0, None
        for line in file:
            found = _STEP.fullmatch(line)
            if not line.endswith(b"\n") or (found and int(found[1]) > step):
                break
            try:
                names = names if found else _header(line)
            except ValueError as error:
                log.warning("%s: byte %d: %s; dropped, with what follows", path, end, error)
                break
            end += len(line)
        if end < file.seek(0, os.SEEK_END):
            retried("truncate", path, lambda: file.truncate(end))
            retried("sync", path, lambda: os.fsync(file.fileno()))
    return names


class DigestFile:
    """This rank's file, to append to; `names` are the tensors of each step.

    Steps after `step` are dropped first, the one that the run resumes from.
    """

    def __init__(self, path: Path, rank: int, names: Sequence[str], step: int):
        self._path, self._count = path, len(names)
        retried("create the directory", path.parent, lambda: path.parent.mkdir(parents=True, exist_ok=True))
        known = cut_back(path, step)
        self._file: io.FileIO = retried("open", path, lambda: open(path, "ab", buffering=0))  # noqa: SIM115
        if known != list(names):
            self._append(encode_header(rank, names))

    def write(self, steps: Sequence[tuple[int, np.ndarray]], *, sync: bool = False) -> None:
        """Append the digests, int64 (names,), of some steps; durably if `sync`. Raises StorageError."""
        assert all(len(digests) == self._count for _, digests in steps)
        self._append(b"".join(encode_step(step, digests) for step, digests in steps), sync)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, data: bytes, sync: bool = False) -> None:
        if data or sync:
            retried("write", self._path, lambda: append_whole(self._file, data, sync=sync))


def encode_header(rank: int, names: Sequence[str]) -> bytes:
    """The line that names the tensors."""
    return json.dumps({"format": FORMAT, "rank": rank, "tensors": list(names)}).encode() + b"\n"


def encode_step(step: int, digests: np.ndarray) -> bytes:
    """The line of a step."""
    return f'{{"step": {step}, "digests": "{digests.astype(">i8").tobytes().hex()}"}}\n'.encode()


def _header(line: bytes) -> list[str]:
    """Raises ValueError: the line is none, or of a newer format."""
    content = parse_line(line)
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), list):
        raise ValueError("neither the digests of a step nor the names of tensors")
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r} is not {FORMAT}, the one that this dist_train reads")
    return [str(name) for name in content["tensors"]]


@dataclass(frozen=True)
class Digests:
    """What one rank has recorded.

    Attributes:
        names: of the tensors, in the order of the file. steps: int64 (steps,), increasing.
        values: uint64 (steps, names); 0 where a tensor has had no value.
    """

    names: list[str]
    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def parse(cls, data: bytes) -> Digests:
        """The content of a file; a torn last line is ignored.

        Raises:
            ValueError: a line isn't one of these records; says which.
        """
        places: dict[str, int] = {}
        columns: list[int] = []
        steps: list[int] = []
        pieces: list[tuple[list[int], int, bytearray]] = []  # columns, first row, values of the steps below one header
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n") and number == len(lines):
                break
            try:
                if found := _STEP.fullmatch(line):
                    _check_step(int(found[1]), len(found[2]), steps, columns)
                    steps.append(int(found[1]))
                    pieces[-1][2].extend(bytes.fromhex(found[2].decode()))
                    continue
                columns = [places.setdefault(name, len(places)) for name in _header(line)]
                pieces.append((columns, len(steps), bytearray()))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
        values = np.zeros((len(steps), len(places)), np.uint64)
        for columns, first, raw in pieces:
            block = np.frombuffer(bytes(raw), ">u8").reshape(-1, max(len(columns), 1))
            values[first : first + len(block), columns] = block
        return cls(list(places), np.array(steps, np.int64), values)


def _check_step(step: int, digits: int, steps: Sequence[int], columns: Sequence[int]) -> None:
    if digits != 16 * len(columns):
        raise ValueError(f"expected the digests of {len(columns)} tensors, found {digits / 16:g}")
    if step >= 1 << 63:
        raise ValueError(f"expected a step, found {step}")
    if steps and step <= steps[-1]:
        raise ValueError(f"expected a step after {steps[-1]}, found {step}")
