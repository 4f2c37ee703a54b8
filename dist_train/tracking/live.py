"""The live view on a terminal, drawn by rich: one bar, and a table for each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from dist_train.tracking.text import format_number, format_seconds

BAR = 12  # columns of the bar at least


class Live(Progress):
    """The bar at the bottom of the terminal; everything else is printed above it.

    step: tells at each refresh how far the run is.
    """

    def __init__(self, stream: Any, step: Callable[[], int], total: int | None, epoch: str) -> None:
        self._step = step
        self._before: dict[str, Mapping[str, float]] = {}
        texts, bar = Column(no_wrap=True, overflow="ellipsis"), Column(ratio=1, min_width=BAR)
        super().__init__(
            TextColumn("{task.fields[epoch]} ", table_column=texts),
            BarColumn(None, table_column=bar),
            TextColumn(" {task.completed:,.0f}{task.fields[of]}{task.fields[figures]}", table_column=texts.copy()),
            console=Console(file=stream, force_terminal=True, highlight=False),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self.add_task("", epoch="", of="", figures="")
        self.show(total, epoch, {}, None)
        self.start()
        self.console.show_cursor(True)  # a process that is killed must not leave the terminal without its cursor

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, at each refresh."""
        for task in self.task_ids:
            self.update(task, completed=self._step())
        return super().get_renderables()

    def show(self, total: int | None, epoch: str, metrics: Mapping[str, float], left: float | None) -> None:
        """New figures, the most important first: what doesn't fit beside the bar isn't shown."""
        figures = [f"loss {format_number('loss', metrics['loss'])}"] if "loss" in metrics else []
        figures += [] if left is None else [f"{format_seconds(left)} left"]
        for name, value in self._before.get("val", {}).items():
            if name != "loss":
                figures.append(f"val/{name} {format_number(name, value)}")
                break
        if "samples_per_s" in metrics:
            figures.append(f"{format_number('samples_per_s', metrics['samples_per_s'])} samples/s")
        of = "" if total is None else f"/{total:,}"
        room = self.console.width - len(epoch) - 2 * len(of) - BAR - 4
        shown = ""
        while figures and len(shown) + 2 + len(figures[0]) <= room:
            shown += "  " + figures.pop(0)
        self.update(self._task, total=total, epoch=epoch, of=of, figures=shown)

    def say(self, text: str, style: str | None = None) -> None:
        """Text above the bar, as it is (no markup)."""
        self.console.print(Text(text), style=style)

    def evaluation(self, split: str, step: int, metrics: Mapping[str, float], samples: str) -> None:
        """A table: each metric now, and at the evaluation before."""
        before = self._before.get(split, {})
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column(f"{split} at step {step:,}{samples}", min_width=20, no_wrap=True)
        table.add_column("now", justify="right", style="bold", min_width=8)
        table.add_column("before", justify="right", style="dim", min_width=8)
        for name, value in metrics.items():
            table.add_row(name, format_number(name, value), format_number(name, before[name]) if name in before else "")
        self._before[split] = dict(metrics)
        self.console.print(Padding(table, (1, 0, 0, 2)))
