"""Notebooks: whether this code runs in one, and what a cell shows while it trains: a bar, rows and curves."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from typing import Any

from dist_train.config.errors import mask, visible
from dist_train.pages.charts import caption, drawing
from dist_train.pages.curves import Rows, horizontal_of, panel_of
from dist_train.tracking.live import Beside, Position, bar_line, cells_of
from dist_train.tracking.records import Row

ROWS = 12  # the last ones that are shown
PAUSE, SHARE = 0.5, 0.02  # seconds between two updates at least, and the share of the time that they may take
KEPT = 2000  # points of the curves; beyond that every second one goes
STYLE = "font:13px/1.5 system-ui,sans-serif;max-width:900px"
GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:10px"


def shell() -> Any:
    """IPython's shell if this code runs in one, a notebook's kernel or `ipython`; else None. Imports nothing."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def notebook_live(position: Position) -> NotebookLive | None:
    """What a cell of a notebook shows of a training; None where this isn't one, or is a process that it has started."""
    if not hasattr(shell(), "kernel") or multiprocessing.parent_process() is not None:
        return None
    return NotebookLive(position)


class NotebookLive:
    """The output of a cell, updated while training runs: bar, rows of evaluations, loss and the metric that is watched.

    Updates come from the console's thread, and after evaluations from training's. None raises: without them training runs on.
    """

    def __init__(self, position: Position) -> None:
        self._at = position
        self._heads: dict[str, None] = {}
        self._rows: list[tuple[dict[str, str], bool]] = []
        self._points: list[Row] = []
        self._watched = "loss"
        self._best: float | None = None  # of the watched metric
        self._judging: dict[str, Any] = {}  # as `panel_of` takes it
        self._seen: tuple[float, tuple[int, int], Mapping[str, float]] = (
            0.0,
            (-1, 0),
            {},
        )  # when, and what was shown then
        self._took = 0.0
        self._handle: Any = None
        self._on = True
        self._lock = threading.Lock()
        self._update()

    def refresh(self) -> None:
        """Show what has changed since the last time, unless that was a moment ago."""
        pause = max(PAUSE, self._took / SHARE)
        if time.monotonic() - self._seen[0] >= pause and (self._at.step(), len(self._rows)) != self._seen[1]:
            self._update()

    def row(self, step: int, val: Mapping[str, float], beside: Beside) -> None:
        """An evaluation on `val`, or without one a part of training."""
        if beside.main in val:
            self._at.evaluated, self._watched = (f"val/{beside.main}", val[beside.main]), beside.main
            self._judge(val[beside.main], beside)
        cells = {name: text for name, (_, text) in cells_of(self._at, step, val, beside).items()}
        self._heads |= dict.fromkeys(cells)
        self._rows.append((cells, beside.best))
        found = (("train", beside.train), ("val", val))
        self._points += [{"step": step, "split": split, **metrics} for split, metrics in found if metrics]
        self.refresh()

    def _judge(self, value: float, beside: Beside) -> None:
        """Learn from what the trainer calls the best which way is better, as a metric's name may say otherwise."""
        if self._best is not None and value == value != self._best:
            mode = "min" if (value < self._best) == beside.best else "max"
            self._judging = {"better": {beside.main: mode}}
        self._best = value if beside.best else self._best

    def stop(self) -> None:
        """Leave it as it is at the end; the evaluation or the saving that was last isn't going on any more."""
        self._at = replace(self._at, doing=str)
        self._update()

    def _update(self) -> None:
        with self._lock:
            step, metrics = self._at.step(), self._at.metrics
            if "loss" in metrics and metrics is not self._seen[2]:
                self._points.append({"step": step, "split": "train", "loss": metrics["loss"]})
            if len(self._points) > KEPT:
                train, val = (
                    [point for point in self._points if point["split"] == split] for split in ("train", "val")
                )
                self._points = [*train[::2], *val[::2]]
            began, self._seen = time.thread_time(), (time.monotonic(), (step, len(self._rows)), metrics)
            try:
                self._show()
                self._took = time.thread_time() - began
            except Exception as error:
                self._on = False
                logging.getLogger("dist_train").warning("no live output: %s: %s", type(error).__name__, error)

    def _show(self) -> None:
        if not self._on:
            return
        from IPython.display import display

        if self._handle is None:
            self._handle = display(self._content(), raw=True, display_id=True)
        else:
            self._handle.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        step, at = self._at.step(), self._at
        rate = (step - at.first) / max(at.elapsed, 1e-9)
        before, _, after = bar_line(at, rate, 160)
        text = (before + after.lstrip("\u2500")).strip()
        most = f'value="{step}" max="{at.total}"' if at.total else ""
        html = [f'<div style="{STYLE}"><progress {most} style="width:100%"></progress><div>{_plain(text)}</div>']
        html += [self._table(), f'<div style="{GRID}">{"".join(self._curves())}</div></div>']
        return {"text/plain": text, "text/html": "".join(html)}

    def _table(self) -> str:
        if not self._rows:
            return ""
        head = "".join(f"<th>{_plain(name)}</th>" for name in self._heads)
        lines = []
        for cells, best in self._rows[-ROWS:]:
            texts = [cells.get(name, "") for name in self._heads]
            style, star = (' style="font-weight:bold"', "\u2605") if best else ("", "")
            lines.append(f"<tr{style}>{''.join(f'<td>{_plain(text)}</td>' for text in [*texts, star])}</tr>")
        return f"<table><tr>{head}<th></th></tr>{''.join(lines)}</table>"

    def _curves(self) -> list[str]:
        rows = Rows(self._points)
        names = dict.fromkeys(
            name for name in ("loss", self._watched) if any(name == found for _, found in rows.columns)
        )
        axis = horizontal_of(rows)
        if axis.first == axis.last:
            return []
        panels = [panel_of(rows, name, self._judging) for name in names]
        return [f"<div>{caption(panel)}{drawing(panel, axis)}</div>" for panel in panels]


def _plain(text: str) -> str:
    return escape(visible(mask(text), keep=""))
