"""metrics.csv: the rows of metrics.jsonl as Python's csv reads them, whatever happens to a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from dist_train.tracking import table
from dist_train.tracking.logger import Logger
from dist_train.tracking.records import cut_back, read_rows
from dist_train.tracking.table import FIRST


def from_csv(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if text} for row in csv.DictReader(file)]


def from_jsonl(folder: Path) -> list[dict[str, str]]:
    rows: list[dict[str, Any]] = []
    for row in read_rows(folder / "metrics.jsonl"):
        split = row.pop("split")
        rows.append({name if name in FIRST else f"{split}/{name}": value for name, value in row.items()})
    return [{name: str(value) for name, value in row.items() if value == value} for row in rows]  # nan is empty


def test_the_table_has_every_row_over_kills_resumes_and_new_metrics(tmp_path: Path) -> None:
    logger = Logger(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        logger.row("train", step, 1, 8 * step, {"loss": 1 / step, "lr": 0.1})
    logger.row("val", 3, 1, 24, {"loss": float("nan"), 'odd, "name"': 12345678901})
    logger.flush()
    assert from_csv(tmp_path) == from_jsonl(tmp_path)
    inode = (tmp_path / "metrics.csv").stat().st_ino
    logger.row("train", 4, 2, 32, {"loss": 0.25, "lr": 0.1})
    assert len(from_csv(tmp_path)) == 4, "of the last checkpoint"
    logger.flush()
    assert from_csv(tmp_path) == from_jsonl(tmp_path)
    assert (tmp_path / "metrics.csv").stat().st_ino == inode, "the line was appended"
    logger.row("train", 5, 2, 40, {"loss": 0.2, "grad_norm": 3.5})
    logger.flush()
    assert from_csv(tmp_path) == from_jsonl(tmp_path)
    head = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert head == 'step,epoch,samples,time,train/loss,train/lr,train/grad_norm,val/loss,"val/odd, ""name"""'

    cut_back(tmp_path / "metrics.jsonl", 3)  # it was killed, and resumes from step 3
    again = Logger(tmp_path / "metrics.jsonl")
    again.row("train", 4, 2, 32, {"loss": 0.125, "lr": 0.1})
    again.close("completed")
    assert [row["step"] for row in from_csv(tmp_path)] == ["1", "2", "3", "3", "4"]
    assert from_csv(tmp_path) == from_jsonl(tmp_path)


def test_a_table_that_cannot_be_written_is_no_failure_and_is_whole_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(columns: Any, rows: Any) -> bytes:
        raise OSError(28, "No space left on device")

    logger = Logger(tmp_path / "metrics.jsonl")
    logger.row("train", 1, 1, 8, {"loss": 1.0})
    logger.flush()
    logger.row("train", 2, 1, 16, {"loss": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(table, "_lines", full)
        logger.flush()
    assert "metrics.csv isn't up to date: [Errno 28]" in caplog.text
    logger.close("completed")
    assert from_csv(tmp_path) == from_jsonl(tmp_path)
