"""metrics.jsonl: rows are valid JSON, and a resumed run has no duplicate or torn lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.tracking import records
from dist_train.tracking.logger import Logger
from dist_train.tracking.records import cut_back, make_row, read_rows


def write(path: Path, *rows: tuple[str, int]) -> None:
    log = Logger(path)
    for split, step in rows:
        log.row(split, step, 1, step * 64, {"loss": 1 / step if step else 3.0})
    log.close("completed")


def steps(path: Path) -> list[tuple[str, int]]:
    return [(row["split"], row["step"]) for row in read_rows(path)]


def test_a_row_has_the_fields_of_the_contract_in_their_order(tmp_path: Path) -> None:
    log = Logger(tmp_path / "metrics.jsonl")
    log.row("train", 7, 2, 448, {"loss": 0.5, "lr": 0.1, "skipped": 3})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())  # readable before the file is closed
    log.close("completed")
    assert list(row) == ["time", "step", "epoch", "samples", "split", "loss", "lr", "skipped"]
    assert row["time"].endswith("Z")
    assert len(row["time"]) == len("2026-03-01T12:00:00.123Z")
    assert (row["step"], row["epoch"], row["samples"], row["split"]) == (7, 2, 448, "train")
    assert row["skipped"] == 3
    assert isinstance(row["skipped"], int)


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Logger(path)
    log.row("train", 1, 1, 64, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    log.close("completed")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row["loss"] is None
    assert row["grad_norm"] is None
    back = read_rows(path)[0]
    assert math.isnan(back["loss"])
    assert math.isnan(back["grad_norm"])
    assert back["lr"] == 0.1


def test_floats_come_back_to_the_bit(tmp_path: Path) -> None:
    log = Logger(tmp_path / "m")
    log.row("val", 1, 1, 1, {"loss": 0.1 + 0.2, "tiny": 5e-324})
    log.close("completed")
    assert read_rows(tmp_path / "m")[0]["loss"] == 0.1 + 0.2
    assert read_rows(tmp_path / "m")[0]["tiny"] == 5e-324


def test_a_metric_named_like_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match="a metric may not be called 'step'"):
        make_row("train", 1, 1, 64, {"step": 3.0})


def test_cutting_back_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("train", 50), ("train", 100), ("val", 100), ("train", 150))
    with open(path, "ab") as file:
        file.write(b'{"time": "2026", "step": 20')
    assert cut_back(path, 100) > 0
    assert steps(path) == [("train", 50), ("train", 100), ("val", 100)]
    assert path.read_bytes().endswith(b"}\n")
    assert cut_back(path, 100) == 0  # nothing left to do: the file isn't touched


def test_a_torn_line_alone_is_dropped_even_if_its_step_would_stay(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, ("train", 50))
    with open(path, "ab") as file:
        file.write(b'{"step": 60, "split": "train"}')  # whole JSON, but no newline: the write was cut off
    cut_back(path, 100)
    assert steps(path) == [("train", 50)]
    write(path, ("train", 60))
    assert steps(path) == [("train", 50), ("train", 60)]


def test_a_split_that_will_be_evaluated_again_goes_at_the_step_itself(tmp_path: Path) -> None:
    path = tmp_path / "m"
    rows = ("val", 50), ("train", 100), ("val", 100), ("test", 100)
    write(path, *rows)
    cut_back(path, 100, pending=("test",))
    assert steps(path) == list(rows[:3])
    cut_back(path, 100, pending=("val",))
    assert steps(path) == list(rows[:2])


def test_a_test_row_with_the_best_checkpoints_step_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    rows = ("train", 50), ("val", 90), ("train", 100), ("val", 100), ("train", 150), ("val", 150), ("test", 100)
    write(path, *rows)
    cut_back(path, 150)
    assert steps(path) == list(rows)
    cut_back(path, 150, pending=("test",))
    assert steps(path) == list(rows[:-1])
    write(path, ("test", 100))
    cut_back(path, 100, pending=("val",))  # the checkpoint of step 150 was corrupted
    assert steps(path) == list(rows[:3])


def test_a_fresh_start_drops_everything_but_the_evaluation_before_training(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, ("val", 0), ("train", 50))
    cut_back(path, 0)
    assert steps(path) == [("val", 0)]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert cut_back(tmp_path / "m", 5) == 0
    assert read_rows(tmp_path / "m") == []


def test_zeros_from_a_power_failure_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, ("train", 50))
    with open(path, "ab") as file:
        file.write(bytes(200))
    cut_back(path, 60)
    assert steps(path) == [("train", 50)]
    assert b"\0" not in path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    at=st.lists(st.integers(0, 12), max_size=25).map(sorted),
    cut=st.integers(0, 13),
    torn=st.integers(0, 40),
    block=st.sampled_from([1, 64, 300]),
)
def test_cutting_back_equals_filtering_whatever_the_block_size(
    tmp_path_factory: pytest.TempPathFactory, at: list[int], cut: int, torn: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    write(path, *(("train", step) for step in at))
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"time": "2026-01-01T00:00:00Z", "step": 1'[:torn])
    usual, records._BLOCK = records._BLOCK, block
    try:
        cut_back(path, cut)
    finally:
        records._BLOCK = usual
    assert steps(path) == [("train", step) for step in at if step <= cut]
    assert whole.startswith(path.read_bytes())


def test_cutting_back_reads_only_the_end_of_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    write(path, *(("train", step) for step in range(1, 5001)))
    parsed = []
    parse = records.parse
    monkeypatch.setattr(records, "parse", lambda line: parsed.append(1) or parse(line))
    cut_back(path, 4990)
    assert path.stat().st_size > 4 * records._BLOCK
    assert len(parsed) < 1000
    monkeypatch.undo()
    assert steps(path)[-1] == ("train", 4990)
