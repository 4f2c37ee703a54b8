"""The console: what it prints, on a terminal and in a log, and that it can't end a training."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from dist_train.text import format_number, format_seconds, two_columns
from dist_train.tracking.console import Console
from dist_train.tracking.live import Beside, Position, Table, bar_line, cells_of
from dist_train.tracking.logs import setup_logging
from dist_train.tracking.terminal import BottomLine, Stream

PROGRAM = str(Path(__file__).parent / "programs" / "console_run.py")


def environment(**more: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")}
    root = str(Path(__file__).parents[2])
    return base | {"PYTHONPATH": root, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"} | more


def on_terminal(folder: Path, close_after: float | None = None, **env: str) -> tuple[int, str]:
    """(exit code, what the terminal got) of PROGRAM run on a real pseudo terminal."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, PROGRAM], stdout=slave, stderr=slave, stdin=slave, cwd=folder, env=environment(**env)
    )
    os.close(slave)
    got, began = b"", time.monotonic()
    while True:
        if close_after is not None and len(got) > 0 and time.monotonic() - began > close_after:
            os.close(master)
            return child.wait(timeout=20), got.decode()
        if select.select([master], [], [], 0.1)[0]:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the child has ended
                break
            if not piece:
                break
            got += piece
            began = time.monotonic() if len(got) == len(piece) else began
    os.close(master)
    return child.wait(timeout=20), got.decode()


def plain(**streams: io.StringIO) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(True, out=out, err=err), out, err


def test_a_log_gets_one_plain_line_at_each_log_interval() -> None:
    console, out, _ = plain()
    console.begin(0, 380, 1, 20)
    assert console._at is not None
    console._at.began -= 60.0
    console.progress(60, 380, 3, {"loss": 0.43214, "lr": 0.08, "samples_per_s": 12345.4})
    console.evaluation("val", 60, {"loss": 0.5, "accuracy": 0.97222, "eval_samples": 1180})
    console.close()
    assert out.getvalue().splitlines() == [
        "epoch  3/20  step  60/380  loss 0.4321  lr 0.08  12,345 samples/s  eta 5:20",
        "val   step 60  loss 0.5000  accuracy 0.9722  (1,180 samples)",
    ]


def test_a_line_keeps_to_100_columns_and_leaves_out_the_last_metrics() -> None:
    console, out, _ = plain()
    metrics = {"loss": 1.0, "lr": 0.1} | {f"metric_number_{i}": 0.5 for i in range(9)} | {"samples_per_s": 10.0}
    console.progress(1, 1000, 1, metrics)
    console.close()
    line = out.getvalue().rstrip("\n")
    assert len(line) <= 100
    assert "loss 1.0000" in line
    assert "metric_number_0" in line
    assert "metric_number_8" not in line
    assert line.endswith("10 samples/s")


def test_the_time_left_counts_from_where_this_start_began() -> None:
    console, out, _ = plain()
    console.begin(1000, 1100)
    assert console._at is not None
    console._at.began -= 50.0
    console.progress(1050, 1100, 1, {})
    console.progress(1060, None, 1, {}, left=90.0)
    console.close()
    assert out.getvalue().splitlines()[0].endswith("eta 0:50")
    assert out.getvalue().splitlines()[1] == "epoch 1  step 1060  eta 1:30"


def test_blocks_are_aligned_and_fit_100_columns() -> None:
    long = "64 = 4 ranks x 16; " * 12
    lines = two_columns([("model", "DigitsCNN"), ("batch size", long), ("empty", ""), ("two", "a\nb")])
    assert max(map(len, lines)) <= 100
    assert lines[0] == "  model       DigitsCNN"
    assert lines[1].startswith("  batch size  64 = 4")
    assert lines[2].startswith("              ")
    assert lines[-2:] == ["  two         a", "              b"]
    path = "/a" * 80
    assert two_columns([("run", path)]) == [f"  run  {path}"]  # a path can be copied whole


def test_numbers_and_times_read_well() -> None:
    assert [format_number("loss", v) for v in (0.0, 0.43214, 12.5, 0.00001234, 1e9, float("nan"), float("inf"))] == [
        "0.0000", "0.4321", "12.5000", "1.234e-05", "1.000e+09", "nan", "inf",
    ]  # fmt: skip
    assert format_number("lr", 0.08) == "0.08"
    assert format_number("samples_per_s", 12345.4) == "12,345"
    assert format_number("samples_per_s", 0.25) == "0.25"
    assert format_number("skipped", 1234) == "1,234"
    assert [format_seconds(s) for s in (0, 12, 245, 9000, 273600)] == ["0:00", "0:12", "4:05", "2:30:00", "3d 04:00"]


def test_other_ranks_print_nothing_and_log_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = Console(False)
    console.warn("before the log's place was known")
    setup_logging(tmp_path / "logs" / "rank-3.log", 3)
    console.start_block([("model", "x")])
    console.begin(0, 10)
    console.progress(5, 10, 1, {"loss": 1.0})
    console.evaluation("val", 5, {"loss": 1.0})
    console.note("a note")
    console.warn("a warning")
    warnings.warn("from a library", stacklevel=1)
    logging.getLogger("dist_train").info("from a room")
    console.close()
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / "logs" / "rank-3.log").read_text()
    for text in ("WARNING before the log's place", "INFO a note", "WARNING a warning", "from a library", "from a room"):
        assert log.count(text) == 1
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z rank 3 ", line) for line in log.splitlines())


def test_rank_zeros_warnings_reach_terminal_and_log_once(tmp_path: Path) -> None:
    console, out, err = plain()
    setup_logging(tmp_path / "rank-0.log", 0)
    console.note("a note")
    console.warn("a warning")
    warnings.warn("from a library", stacklevel=1)
    logging.getLogger("dist_train").warning("from a room")
    console.close()
    assert out.getvalue() == "a note\n"
    assert [line.split(": ")[-1] for line in err.getvalue().splitlines()] == [
        "a warning",
        "from a library",
        "from a room",
    ]
    log = (tmp_path / "rank-0.log").read_text()
    assert log.count("a warning") == log.count("from a library") == log.count("from a room") == log.count("a note") == 1


def test_the_log_file_is_continued_and_a_second_run_in_one_process_moves_on(tmp_path: Path) -> None:
    for name in ("a.log", "b.log", "a.log"):
        console, _, _ = plain()
        setup_logging(tmp_path / name, 0)
        console.note(f"into {name}")
        console.close()
    assert (tmp_path / "a.log").read_text().count("into a.log") == 2
    assert (tmp_path / "b.log").read_text().count("into") == 1


def test_closing_gives_logging_and_warnings_back() -> None:
    before = warnings.showwarning, warnings.formatwarning
    console, _, _ = plain()
    assert warnings.formatwarning is not before[1]
    console.close()
    console.close()
    assert (warnings.showwarning, warnings.formatwarning) == before
    assert logging.getLogger("dist_train").handlers == []


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_gets_a_live_bar_and_a_row_for_each_evaluation(tmp_path: Path, color: bool) -> None:
    code, got = on_terminal(tmp_path, COLUMNS="140", **({} if color else {"NO_COLOR": "1"}))
    text = without_escapes(got)
    assert code == 0
    assert (tmp_path / "done.txt").exists()
    assert text.count("train/loss") == 1  # one header
    for epoch, mark in ((1, " *"), (2, " *"), (3, ""), (4, " *")):
        row = [
            f"{epoch}/4",
            f"{epoch}0",
            f"{20 / epoch / 10:.4f}",
            f"{0.2 / epoch:.4f}",
            f"{1 - 0.1 / epoch:.4f}",
            "0.1",
        ]
        assert re.search(r"[\r\n] +" + " +".join(map(re.escape, row)) + r" +0:0\d" + re.escape(mark) + "\r\n", text), (
            row
        )
    assert "epoch 1/4  " in text
    assert "samples/s" in text
    assert "left" in text
    assert "warning: something to know\r\n" in text
    assert "\ra line of the user's own\r\n" in text
    assert "step 10/40" not in text  # no plain lines beside the bar
    assert set(re.findall(r"(\d+)/40", text)) - {"0", "10", "20", "30", "40"}  # it moves between log intervals
    assert (re.search(r"\x1b\[\d+m", got) is not None) == color
    assert text.rstrip().endswith("test accuracy  0.98")


METRICS = {"loss": 1234567.25, "samples_per_s": 1234567890.0, "data_wait": 0.031, "peak_memory": 71.25, "mfu": 0.412}


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 120, 200])
def test_no_number_is_cropped_and_no_line_is_too_wide(columns: int) -> None:
    """With numbers of ten digits, nan, and names of sixty characters."""
    at = Position(lambda: 1234567890, str, 2345678901, epoch=100, epochs=1000, metrics=METRICS)
    at.until = at.began + 1e6
    at.evaluated = "val/" + "a" * 60, float("nan")
    bar = "".join(bar_line(at, 123.456, columns))
    assert len(bar) <= columns
    known = {"1,234,567,890/2,345,678,901", "epoch 100/1000", "0:00, 11d 13:46 left", "loss 1.235e+06", "123 it/s"}
    known |= {"1,234,567,890 samples/s", "3% data wait", "71.2 GiB", "41% mfu", f"val/{'a' * 60} nan", ""}
    assert set(re.split("  +", re.sub("[\u2501\u2500]+", "  ", bar))) <= known
    val = {"loss": float("nan"), "count": 1234567890, "m" * 60: -0.1234, "error": -1.5e-7}
    beside = Beside(100, {"loss": 1e10}, {"lr": 1.23456e-5}, "count", best=True)
    head, row = Table().lines(cells_of(at, 1234567890, val, beside), columns, best=True, color=False)
    assert max(len(head), len(row)) <= columns
    names, numbers = head.split(), row.split()
    full = {
        "epoch": "100/1000",
        "step": "1,234,567,890",
        "train/loss": "1.000e+10",
        "val/loss": "nan",
        "lr": "1.235e-05",
    }
    full |= {
        "val/count": "1,234,567,890",
        "time": "0:00",
        "val/error": "-1.500e-07",
        f"val/{'m' * 5}..{'m' * 9}": "-0.1234",
    }
    assert numbers[-1] == "*"
    short = {"train": full["train/loss"], "val": "nan", "count": full["val/count"], f"{'m' * 5}..{'m' * 9}": "-0.1234"}
    assert {name: (full | short)[name] for name in names} == dict(zip(names, numbers[:-1], strict=True))
    assert {"val/count", "count"} & set(names)  # the most important one
    assert ({"train/loss", "train"} & set(names) != set()) == (columns >= 60)
    assert (set(names) == set(full)) == (columns >= 120)


def test_without_evaluations_epochs_have_rows_but_no_more_than_one_in_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("CI", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    now, out = [time.monotonic()], Terminal()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(True, out=out, err=out)
    console.begin(0, None, evaluates=False)
    for step in range(1, 31):  # three seconds each, an epoch of two
        now[0] += 3
        console.progress(step, None, (step + 1) // 2, {"loss": 1 / step, "lr": 0.1}, 90.0 - 3 * step)
        console._drain()
    console.working("writing the model")
    console.end_block([("state", "completed")])
    console.close()
    lines = [re.split("[\r\n]", line)[-1] for line in without_escapes(out.getvalue()).replace("\r\n", "\n").split("\n")]
    assert [line.split()[:3] for line in lines if " 0.1 " in line] == [
        [str((step + 1) // 2), str(step), f"{1 / step:.4f}"] for step in range(2, 31, 2)
    ]
    assert sum("eta" in line for line in lines) == 0


def test_a_terminal_of_a_ci_job_gets_plain_lines(tmp_path: Path) -> None:
    code, got = on_terminal(tmp_path, CI="1")
    assert code == 0
    assert "\x1b" not in got
    assert "step 10/40  loss 0.1000  lr 0.1  12,346 samples/s" in got


def test_a_prompt_and_another_bar_hide_the_line_at_the_bottom_until_they_end() -> None:
    out = io.StringIO()
    line = BottomLine(Stream(out))
    line.show("the bar")
    line.pass_through(out, "name? ")
    line.show("the bar moves")
    assert out.getvalue().endswith("\r\x1b[Jname? ")
    line.pass_through(out, "Ann\n")
    assert out.getvalue().endswith("name? Ann\n\rthe bar moves\x1b[J\r")
    line.pass_through(out, "\r 100 %")
    line.pass_through(out, "\r      \r")
    assert out.getvalue().endswith("\r      \r\rthe bar moves\x1b[J\r")
    line.above("a row")
    assert out.getvalue().endswith("\r\x1b[Ja row\n\rthe bar moves\x1b[J\r")
    line.close()
    assert out.getvalue().endswith("\r\x1b[J")


def test_a_terminal_that_goes_away_does_not_end_the_training(tmp_path: Path) -> None:
    code, _ = on_terminal(tmp_path, close_after=0.2)
    assert code == 0
    assert (tmp_path / "done.txt").exists()


def test_a_reader_that_goes_away_does_not_end_the_training(tmp_path: Path) -> None:
    command = f'"{sys.executable}" "{PROGRAM}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180
    )
    assert done.stdout.splitlines() == ["  model  DigitsCNN", "0"]
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "done.txt").exists()


def test_a_stdout_that_is_closed_or_missing_does_not_end_the_training(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" "{PROGRAM}" >&- 2>&-'], cwd=tmp_path, env=environment(), timeout=30
    )
    assert done.returncode == 0
    assert (tmp_path / "done.txt").exists()


def test_a_locale_without_unicode_does_not_end_the_training(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "unicode"], cwd=tmp_path, capture_output=True, text=True, timeout=180,
        env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("  model  ??\n")
