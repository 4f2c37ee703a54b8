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
from dist_train.tracking.logs import setup_logging

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
    console._began = (0, time.monotonic() - 60.0)
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
    console._began = (1000, time.monotonic() - 50.0)
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


def test_a_terminal_gets_a_live_bar_and_a_table_for_each_evaluation(tmp_path: Path) -> None:
    code, got = on_terminal(tmp_path)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", got)
    assert code == 0
    assert (tmp_path / "done.txt").exists()
    assert "epoch 1/4" in text
    assert "40/40" in text
    assert "12,346 samples/s" in text
    assert "left" in text
    for step in (10, 20, 30, 40):
        assert text.count(f"val at step {step}") == 1
    assert "warning: something to know" in text
    assert "a line of the user's own" in text
    assert "epoch 1  step 10/40" not in text  # no plain lines beside the bar
    assert set(re.findall(r"(\d+)/40", text)) - {"0", "10", "20", "30", "40"}  # it moves between log intervals
    assert got.rfind("\x1b[?25h") > got.rfind("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_narrow_terminal_leaves_out_metrics_and_cuts_none(columns: int) -> None:
    from dist_train.tracking.live import Live

    out = io.StringIO()
    live = Live(out, lambda: 190, 380, "epoch 1/20")
    live.console.width = columns
    live.evaluation("val", 190, {"loss": 0.5, "accuracy": 0.97}, "")
    live.show(380, "epoch 3/20", {"loss": 0.432, "samples_per_s": 12345.6}, 75.0)
    live.stop()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).splitlines()[-1]
    assert len(last) <= columns
    assert re.match("epoch 3/20  \u2501{6}", last)
    assert last.split("  ", 2)[2].startswith("190/380")
    assert ("0.9700" in last) == (columns == 80)
    assert "\u2026" not in last


@pytest.mark.parametrize("columns", [24, 40, 60])
def test_no_number_is_cropped_on_a_narrow_terminal(columns: int) -> None:
    from dist_train.tracking.live import Live

    out = io.StringIO()
    live = Live(out, lambda: 1234567, 12345678, "epoch 100/200")
    live.console.width = columns
    out.truncate(out.seek(0))
    live.refresh()
    figures = {"loss": 1234.5678, "a_metric_with_a_very_long_name_indeed": -0.1234, "count": 123456789}
    for step in (1234567, 1234568):
        live.evaluation("test", step, figures, " (1,234,567 samples)")
    live.show(12345678, "epoch 101/200", {"loss": 0.432}, 75.0)
    live.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "\u2026" not in text
    lines = text.splitlines()
    assert max(map(len, re.split(r"[\r\n]", text))) <= columns
    assert all(sum(number in line for line in lines) >= 2 for number in ("1234.5678", "-0.1234", "123,456,789"))
    assert "1,234,567" in lines[-1]
    assert ("/12,345,678" in lines[-1]) == (columns > 24)


@pytest.mark.parametrize("name", ["NO_COLOR", "CI"])
def test_a_terminal_with_no_color_or_ci_gets_plain_lines(tmp_path: Path, name: str) -> None:
    code, got = on_terminal(tmp_path, **{name: "1"})
    assert code == 0
    assert "\x1b" not in got
    assert "step 10/40  loss 0.1000  lr 0.1  12,346 samples/s" in got
    assert (tmp_path / "modules.txt").read_text() == "False\n"  # rich isn't even imported


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
