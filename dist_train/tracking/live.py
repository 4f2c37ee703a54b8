"""The live view on a terminal, drawn by rich: one bar, and a table for each evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import rich.box
import rich.console
import rich.live
import rich.padding
import rich.progress_bar
import rich.table
import rich.text

from dist_train.tracking.text import format_number, format_seconds

if TYPE_CHECKING:
    from dist_train.tracking.console import Console

REFRESH = 4  # times a second
BAR = 12  # columns of the bar at least


class Live:
    """The bar at the bottom of the terminal; everything else is printed above it."""

    def __init__(
        self, console: Console, stream: Any, step: int, total: int | None, epoch: int, epochs: int | None
    ) -> None:
        self._console, self._total, self._epoch, self._epochs = console, total, epoch, epochs
        self._metrics: dict[str, float] = {}
        self._left: float | None = None
        self._metric = ""
        self._before: dict[str, Mapping[str, float]] = {}
        self._rich = rich.console.Console(file=stream, force_terminal=True, highlight=False, soft_wrap=False)
        self._live = rich.live.Live(get_renderable=self._bar, console=self._rich, refresh_per_second=REFRESH)
        self._live.start()
        self._rich.show_cursor(True)  # a process that is killed must not leave the terminal without its cursor

    def update(self, total: int | None, epoch: int, metrics: Mapping[str, float], left: float | None) -> None:
        """New figures; drawn at the next refresh."""
        self._total, self._epoch, self._metrics, self._left = total, epoch, dict(metrics), left

    def print(self, text: str, style: str | None = None) -> None:
        """Text above the bar, as it is (no markup)."""
        self._rich.print(rich.text.Text(text), style=style)

    def stop(self) -> None:
        """The bar is drawn a last time and stays."""
        self._live.stop()

    def evaluation(self, split: str, step: int, metrics: Mapping[str, float], samples: str) -> None:
        """A table: each metric now, and at the evaluation before."""
        before = self._before.get(split, {})
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column(f"{split} at step {step:,}{samples}", min_width=20, no_wrap=True)
        table.add_column("now", justify="right", style="bold", min_width=8)
        table.add_column("before", justify="right", style="dim", min_width=8)
        for name, value in metrics.items():
            table.add_row(name, format_number(name, value), format_number(name, before[name]) if before else "")
        if split == "val":
            self._metric = next(iter([name for name in metrics if name != "loss"]), "")
        self._before[split] = dict.fromkeys(metrics, math.nan) | dict(metrics)
        self._rich.print(rich.padding.Padding(table, (1, 0, 0, 2)))

    def _parts(self) -> tuple[list[str], list[str]]:
        """The texts left and right of the bar, the most important first."""
        step, total, metrics = self._console.step, self._total, self._metrics
        left = [f"epoch {self._epoch}" + ("" if self._epochs is None else f"/{self._epochs}")]
        right = [f"{step:,}" if total is None else f"{step:,}/{total:,}"]
        if "loss" in metrics:
            right.append(f"loss {format_number('loss', metrics['loss'])}")
        if self._left is not None:
            right.append(f"{format_seconds(self._left)} left")
        if self._metric:
            right.append(f"val/{self._metric} {format_number(self._metric, self._before['val'][self._metric])}")
        if "samples_per_s" in metrics:
            right.append(f"{format_number('samples_per_s', metrics['samples_per_s'])} samples/s")
        return left, right

    def _bar(self) -> rich.console.RenderableType:
        """One line for any width: what doesn't fit is left out, the least important first."""
        left, right = self._parts()
        width = max(20, self._rich.width) - 1
        while len(right) > 1 and sum(len(part) + 2 for part in left + right) + BAR > width:
            right.pop()
        room = width - sum(len(part) + 2 for part in left + right)
        grid = rich.table.Table.grid(padding=(0, 2, 0, 0))
        cells: list[rich.console.RenderableType] = [left[0]]
        if room >= BAR:
            total = self._total
            bar = rich.progress_bar.ProgressBar(
                total=total, completed=self._console.step, width=min(60, room), pulse=total is None
            )
            cells.append(bar)
        cells += right
        for _ in cells:
            grid.add_column(no_wrap=True)
        grid.add_row(*cells)
        return grid
