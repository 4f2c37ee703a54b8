"""A record of which samples each rank trained on at each step (`debug.trace_samples`)."""

from __future__ import annotations

import json
from pathlib import Path

from dist_train.data.plan import Indices
from dist_train.files import append_whole, retried


class Trace:
    """`trace/attempt-<n>-rank-<r>.jsonl`: a line for each optimizer step, in the kernel's hands before its backward."""

    def __init__(self, folder: Path, attempt: int, rank: int):
        self._path = folder / f"attempt-{attempt}-rank-{rank}.jsonl"
        retried("create the directory", folder, lambda: folder.mkdir(parents=True, exist_ok=True))
        self._file = retried("create", self._path, lambda: open(self._path, "xb", buffering=0))  # noqa: SIM115

    def write(self, step: int, indices: Indices) -> None:
        """This rank's samples of optimizer step `step` (from 1)."""
        line = json.dumps({"step": step, "indices": indices.tolist()}).encode() + b"\n"
        retried("write", self._path, lambda: append_whole(self._file, line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
