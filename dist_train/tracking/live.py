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

from dist_train.text import format_number, format_seconds

BAR = 12  # columns of the bar at least


class Live(Progress):
    """The bar at the bottom of the terminal; everything else is printed above it.

    step: returns the steps done, read at each refresh.
    """

    def __init__(self, stream: Any, step: Callable[[], int], total: int | None, epoch: str) -> None:
        self._step = step
        self._before: dict[str, Mapping[str, float]] = {}
        self._shown: tuple[str, str, list[str]] = ("", "", [])  # epoch, total and values, the most important first
        texts, self._bar = Column(no_wrap=True, overflow="ellipsis"), Column(ratio=1, min_width=BAR)
        super().__init__(
            TextColumn("{task.fields[epoch]} ", table_column=texts),
            BarColumn(None, table_column=self._bar),
            TextColumn(" {task.completed:,.0f}{task.fields[of]}{task.fields[values]}", table_column=texts.copy()),
            console=Console(file=stream, force_terminal=True, highlight=False),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self.add_task("", epoch="", of="", values="")
        self.show(total, epoch, {}, None)
        self.start()
        self.console.show_cursor(True)  # a killed process must not leave the cursor hidden

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, fitted to the terminal at each refresh."""
        for task in self.task_ids:
            self.update(task, completed=self._step(), **self._fitting())  # the terminal may have been resized
        return super().get_renderables()

    def show(self, total: int | None, epoch: str, metrics: Mapping[str, float], left: float | None) -> None:
        """Update the values, the most important first; what doesn't fit beside the bar is left out."""
        values = [f"loss {format_number('loss', metrics['loss'])}"] if "loss" in metrics else []
        values += [] if left is None else [f"{format_seconds(left)} left"]
        for name, value in self._before.get("val", {}).items():
            if name != "loss":
                values.append(f"val/{name} {format_number(name, value)}")
                break
        if "samples_per_s" in metrics:
            values.append(f"{format_number('samples_per_s', metrics['samples_per_s'])} samples/s")
        self._shown = (epoch, "" if total is None else f"/{total:,}", values)
        self.update(self._task, total=total, **self._fitting())

    def _fitting(self) -> dict[str, Any]:
        """The fields of the bar that fit."""
        epoch, of, values = self._shown
        # Dropped as a unit, least important first: values, some of the bar, the epoch, the total.
        done = max(len(of) - 1, len(f"{self._step():,}") + 1)
        room = self.console.width - done - len(of) - 4
        epoch = epoch if len(epoch) <= room else ""
        room -= len(epoch)
        self._bar.min_width = max(1, min(BAR, room))
        if room < 0:
            of = ""
        shown = ""
        for value in values:
            if len(shown) + 2 + len(value) > room - BAR:
                break
            shown += "  " + value
        return {"epoch": epoch, "of": of, "values": shown}

    def say(self, text: str, style: str | None = None) -> None:
        """Print text above the bar, without markup."""
        self.console.print(Text(text), style=style)

    def evaluation(self, split: str, step: int, metrics: Mapping[str, float], samples: str) -> None:
        """Print a table: each metric now and at the previous evaluation."""
        before = self._before.get(split, {})
        rows: list[tuple[str, ...]] = [
            (name, format_number(name, value), format_number(name, before[name]) if name in before else "")
            for name, value in metrics.items()
        ]
        title = f"{split} at step {step:,}{samples}"
        label, now, then = (max([least, *(len(row[k]) for row in rows)]) for k, least in enumerate((len(title), 8, 8)))
        if label + now + then + 6 > self.console.width:  # never crop a number; long names wrap
            rows, then = [row[:2] for row in rows], 0
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column(title, min_width=min(8, label), overflow="fold")
        table.add_column("now", justify="right", style="bold", min_width=now, no_wrap=True)
        if then:
            table.add_column("before", justify="right", style="dim", min_width=then, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._before[split] = dict(metrics)
        self.console.print(Padding(table, (1, 0, 0, 2)))
