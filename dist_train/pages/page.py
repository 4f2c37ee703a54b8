"""curves.png and report.html in a run's directory, from its records alone: without torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.pages.curves import Rows
from dist_train.pages.png import draw_curves
from dist_train.pages.report import read_records, write_report
from dist_train.runtime.rundir import RunDir
from dist_train.tracking.records import read_rows


def write_curves(run: RunDir, rows: Rows) -> None:
    """Write curves.png on rank 0. Never raises: a missing picture is no reason to fail."""
    try:
        config = read_records(run.records())[0]["judging"]
        draw_curves(rows, run.path("curves.png"), title=run.name, config=config)
        run.upload(("curves.png",))
    except Exception as error:
        logging.getLogger("dist_train").warning("there is no new curves.png: %s: %s", type(error).__name__, error)


def write_page(run: RunDir, **shown: Any) -> Path:
    """Write curves.png and report.html on rank 0; see `write_report`."""
    rows = Rows(read_rows(run.records() / "metrics.jsonl"))
    write_curves(run, rows)
    run.check_owner()
    path = write_report(run.root, rows=rows, **shown)
    run.upload((path.name,))
    return path


def write_records(run: RunDir, warn: Callable[[str], None]) -> Path | None:
    """As `write_page`, without pictures of what the model does. Never raises: None and a warning where it can't be written."""
    try:
        return write_page(run)
    except Exception as error:
        warn(f"there is no report.html: {type(error).__name__}: {error}")
        return None
