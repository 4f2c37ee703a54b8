"""The files of digest/: appended to, cut back, torn, and read again."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from dist_train.tracking.digests import DigestFile, Digests, cut_back, encode_header, encode_step, file_name, rank_of

NAMES = ["loss", "gradient w", "weight w"]


def row(step: int, width: int = 3) -> np.ndarray:
    """Digests that look like themselves; negative as int64 where a digest has its highest bit."""
    return np.arange(width, dtype=np.int64) - 1 + 10 * step


def written(path: Path, first: int, last: int, start: int = 0, names: list[str] | None = None) -> None:
    """Another start, which resumes from `start` and writes the steps from `first` to `last`."""
    names = NAMES if names is None else names
    file = DigestFile(path, 0, names, start)
    for step in range(first, last + 1):
        file.write([(step, row(step, len(names)))], sync=step == last)
    file.close()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / file_name(0)
    written(path, 0, 5)
    found = Digests.parse(path.read_bytes())
    assert found.names == NAMES
    assert found.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.values[0].tolist() == [2**64 - 1, 0, 1], "as unsigned integers"
    assert found.values[4].tolist() == [39, 40, 41]


def test_a_resumed_run_writes_the_bytes_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    written(whole, 1, 9)
    written(resumed, 1, 6)
    with open(resumed, "ab") as file:
        file.write(b'{"step": 7, "digests": "0123')  # torn by a kill
    written(resumed, 5, 9, start=4)
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("end", range(0, 400, 7))
def test_a_file_torn_anywhere_is_read_and_continued(tmp_path: Path, end: int) -> None:
    path = tmp_path / "torn"
    written(path, 1, 5)
    data = path.read_bytes()[:end]
    path.write_bytes(data)
    complete = data[: data.rfind(b"\n") + 1]
    steps = Digests.parse(data).steps.tolist()
    assert steps == list(range(1, complete.count(b"\n")))
    written(path, len(steps) + 1, 5, start=len(steps))
    whole = tmp_path / "whole"
    written(whole, 1, 5)
    assert path.read_bytes() == whole.read_bytes()


def test_other_tensors_get_another_header_and_a_rank_may_have_gaps(tmp_path: Path) -> None:
    path = tmp_path / "file"
    written(path, 1, 3)
    written(path, 6, 7, start=5, names=["loss", "weight w", "weight v"])
    found = Digests.parse(path.read_bytes())
    assert found.names == [*NAMES, "weight v"]
    assert found.steps.tolist() == [1, 2, 3, 6, 7]
    assert found.values[-1].tolist() == [69, 0, 70, 71], "no value for the gradient"


def test_cutting_back_returns_the_tensors_of_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert cut_back(path, 3) is None
    written(path, 1, 5)
    assert cut_back(path, 9) == NAMES
    assert len(path.read_bytes().splitlines()) == 6
    assert cut_back(path, 2) == NAMES
    assert Digests.parse(path.read_bytes()).steps.tolist() == [1, 2]
    assert cut_back(path, 0) == NAMES
    assert path.read_bytes() == encode_header(0, NAMES)


def test_a_line_that_somebody_has_edited_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    written(path, 1, 2)
    with open(path, "ab") as file:
        file.write(b"hello\n" + encode_step(3, row(3)))
    with caplog.at_level(logging.WARNING):
        assert cut_back(path, 9) == NAMES
    assert "dropped" in caplog.text
    assert Digests.parse(path.read_bytes()).steps.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b"hello\n", "line 1"),
        (encode_step(1, row(1)), "line 1: expected the digests of 0 tensors, found 3"),
        (encode_header(0, NAMES) + encode_step(1, row(1, 2)), "line 2: expected the digests of 3 tensors, found 2"),
        (encode_header(0, NAMES) + encode_step(2, row(2)) + encode_step(2, row(2)), "line 3: expected a step after 2"),
        (b'{"format": 2, "tensors": []}\n', "line 1: format 2 is not 1"),
        (b"[1]\n", "line 1: neither"),
    ],
)
def test_what_isnt_such_a_file_is_an_error_with_its_line(lines: bytes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Digests.parse(lines)


def test_files_are_named_by_rank() -> None:
    assert file_name(3) == "digest/rank-0003.jsonl"
    assert [rank_of(name) for name in ("rank-0003.jsonl", "rank-12345.jsonl", "rank-1.log", ".tmp-rank-0003.jsonl")] == [
        3, 12345, None, None,
    ]  # fmt: skip
