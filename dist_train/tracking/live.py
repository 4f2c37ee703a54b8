"""The live view on a terminal, drawn by rich: one bar, and a table for each evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import rich.box
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

if TYPE_CHECKING:
    from dist_train.tracking.console import Console

REFRESH = 4  # times a second


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

    def evaluation(self, split: str, step: int, metrics: Mapping[str, float]) -> None:
        """A table: each metric now, and at the evaluation before."""
        from dist_train.tracking.console import format_number

        before = self._before.get(split, {})
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        table.add_column(f"{split} at step {step}", style="bold")
        table.add_column("now", justify="right")
        table.add_column("before", justify="right", style="dim")
        for name, value in metrics.items():
            table.add_row(name, format_number(name, value), format_number(name, before[name]) if name in before else "")
            if split == "val" and name != "loss" and not self._metric.startswith("val/" + name):
                self._metric = self._metric or f"val/{name}"
        self._before[split] = dict(metrics)
        self._rich.print(table)

    def _bar(self) -> rich.console.RenderableType:
        from dist_train.tracking.console import format_number, format_seconds

        step, total = self._console.step, self._total
        of = "" if self._epochs is None else f"/{self._epochs}"
        row: list[Any] = [f"epoch {self._epoch}{of}"]
        row.append(rich.progress_bar.ProgressBar(total=total, completed=step, width=None, pulse=total is None))
        row.append(f"{step}" if total is None else f"{step}/{total}")
        if "loss" in self._metrics:
            row.append(f"loss {format_number('loss', self._metrics['loss'])}")
        if self._metric:
            name = self._metric.removeprefix("val/")
            row.append(f"{self._metric} {format_number(name, self._before['val'][name])}")
        if "samples_per_s" in self._metrics:
            row.append(f"{format_number('samples_per_s', self._metrics['samples_per_s'])} samples/s")
        if self._left is not None:
            row.append(f"{format_seconds(self._left)} left")
        grid = rich.table.Table.grid(padding=(0, 1), expand=True)
        for i, _ in enumerate(row):
            grid.add_column(ratio=1 if i == 1 else None, no_wrap=True)
        grid.add_row(*row)
        return grid
