"""What `dist_train.train` returns: a dict, which a notebook shows with curves, table and files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from dist_train.config.errors import visible
from dist_train.pages.charts import caption, drawing
from dist_train.pages.curves import Rows, horizontal_of, metric_names, panel_of
from dist_train.pages.notebook import GRID, STYLE
from dist_train.pages.report import BEST, best_rows, read_records
from dist_train.runtime.rundir import RunDir
from dist_train.text import format_seconds
from dist_train.tracking.records import read_rows

FILES = (
    "report.html",
    "curves.png",
    "model.pt",
    "config.yaml",
    "metrics.jsonl",
    "metrics.csv",
    "result.json",
    "tensorboard",
)


class Result(dict[str, Any]):
    """The content of result.json, or of a stopped run its state, reason, step, epoch and seconds.

    Attributes:
        location: the run's directory or URL.
    """

    def __init__(self, content: Mapping[str, Any], location: str) -> None:
        super().__init__(content)
        self.location = location

    def _repr_html_(self) -> str:
        """State, best and last values, curves, and the files that are there; Jupyter calls it."""
        try:
            return "".join(self._shown())
        except Exception as error:  # a run whose directory is gone, say: the dict itself is shown
            logging.getLogger("dist_train").warning(
                "no curves of %s: %s: %s", self.location, type(error).__name__, error
            )
            return f"<pre>{_plain(repr(dict(self)))}</pre>"

    def _shown(self) -> list[str]:
        run = RunDir(self.location)
        root = run.records()
        rows, config = Rows(read_rows(root / "metrics.jsonl")), read_records(root)[0]["judging"]
        facts = [f"{self.get('state')} at step {self.get('step', 0):,}", str(self.get("reason") or "")]
        facts += [format_seconds(self["seconds"])] if "seconds" in self else []
        parts = [f'<div style="{STYLE}"><b>{_plain(run.name)}</b> {_plain(", ".join(filter(None, facts)))}']
        table = list(best_rows(rows, config))
        if table:
            lines = [[cell if isinstance(cell, str) else f"{cell.text} \u2605" for cell in line] for line in table]
            cells = ["".join(f"<td>{_plain(text)}</td>" for text in line) for line in lines]
            head = "".join(f"<th>{name}</th>" for name in BEST)
            parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>")
        axis, names = horizontal_of(rows), ["loss", *metric_names(rows)] if rows else []
        panels = [panel_of(rows, name, config) for name in names[:6]]
        drawn = "".join(f"<div>{caption(panel)}{drawing(panel, axis)}</div>" for panel in panels)
        files = ", ".join(self._link(run, name) for name in FILES if run.storage.exists(name))
        return [*parts, f'<div style="{GRID}">{drawn}</div>', f"<div>{_plain(self.location)}: {files}</div></div>"]

    def _link(self, run: RunDir, name: str) -> str:
        """A link where a browser of notebooks can follow it: to a file below the notebook's directory."""
        here = Path.cwd()
        if not run.storage.is_local or not Path(self.location).is_relative_to(here):
            return name
        return f'<a href="{_plain(os.path.relpath(Path(self.location) / name, here))}" target="_blank">{name}</a>'


def _plain(text: str) -> str:
    return escape(visible(text, keep=""))
