"""What a terminal shows of a training: one bar at the bottom, and one row for each evaluation above it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dist_train.text import format_number, format_seconds
from dist_train.tracking.terminal import BottomLine, cells, columns, painted

REFRESH_SECONDS = 0.25
RATE_SECONDS = 5.0  # that steps per second are the mean of
BAR = 8  # columns of the bar at least
NAME = 20  # columns of a metric's name at most
NUMBER, LR = 6, 9  # columns of a number at least, so that rows seldom grow; of 0.0001234


@dataclass
class Position:
    """Where training is, for whatever draws it.

    Attributes:
        step: returns the steps done. doing: returns what goes on instead of training steps; "" for those.
        total: steps of the run, if known. first: the step that this start began after. before: seconds of earlier starts.
        metrics: of the last train row. until: when a duration in time ends. evaluated: the watched metric's last name and value.
    """

    step: Callable[[], int]
    doing: Callable[[], str] = str
    total: int | None = None
    first: int = 0
    epoch: int = 0
    epochs: int | None = None
    before: float = 0.0
    began: float = field(default_factory=time.monotonic)
    metrics: Mapping[str, float] = field(default_factory=dict)
    until: float | None = None
    evaluated: tuple[str, float] | None = None

    @property
    def elapsed(self) -> float:
        """Seconds of this start."""
        return time.monotonic() - self.began

    def left(self, step: int) -> float | None:
        """Seconds to go after `step`, by the steps so far or by the clock; None where nothing is known."""
        if self.until is not None:
            return max(0.0, self.until - time.monotonic())
        if self.total is None or step <= self.first:
            return None
        return self.elapsed / (step - self.first) * (self.total - step)


@dataclass(frozen=True)
class Beside:
    """What is shown beside the metrics of an evaluation.

    Attributes:
        epoch: from 1. train: metrics of the training batches since the evaluation before, `loss` first. lr: of the last step.
        main: the metric that is watched. best: whether it is the best so far.
    """

    epoch: int = 0
    train: Mapping[str, float] = field(default_factory=dict)
    lr: Mapping[str, float] = field(default_factory=dict)
    main: str = "loss"
    best: bool = False


def cells_of(at: Position, step: int, val: Mapping[str, float], beside: Beside) -> dict[str, tuple[int, str]]:
    """The columns of a row in their order on the screen: (importance, 0 being the highest; text)."""
    epoch = f"{beside.epoch}" if at.epochs is None else f"{beside.epoch}/{at.epochs}"
    found = {"epoch": (2, epoch), "step": (5, f"{step:,}")}
    for name, value in beside.train.items():
        found[f"train/{name}"] = (3 if name == "loss" else 7, format_number(name, value))
    first = [name for name in dict.fromkeys(("loss", beside.main)) if name in val]
    for name in first:
        found[f"val/{name}"] = (0 if name == beside.main else 1, format_number(name, val[name]))
    found |= {name: (6, format_number(name, value)) for name, value in beside.lr.items()}
    found["time"] = (4, format_seconds(at.before + at.elapsed))
    return found | {f"val/{name}": (8, format_number(name, val[name])) for name in val if name not in first}


class Table:
    """Rows of numbers under one header; of a narrow terminal whole columns are left out, and no number is ever cropped."""

    def __init__(self) -> None:
        self._head: list[str] = []
        self._widths: dict[str, int] = {}  # of the numbers of each column

    def lines(self, found: Mapping[str, tuple[int, str]], width: int, *, best: bool, color: bool) -> list[str]:
        """A row of `cells_of`, below a header where its columns aren't those of the row before; `best`: it gets a mark."""
        for name, (_, text) in found.items():
            self._widths[name] = max(self._widths.get(name, LR if name.startswith("lr") else NUMBER), len(text))
        labels = {name: _cropped(name) for name in found}
        taken = [*labels.values()]
        labels = {name: label if taken.count(label) == 1 else name for name, label in labels.items()}
        shown = self._fitting(found, labels, width)
        if not {"train/loss", "val/loss"} & {*found} <= {*shown}:  # under short names more of them fit
            labels = {name: _short(label) for name, label in labels.items()}
            shown = self._fitting(found, labels, width)
        sizes = {name: max(self._widths[name], cells(labels[name])) + 2 for name in shown}
        head, lines = [labels[name] for name in shown], []
        if head != self._head:
            lines.append(painted("".join(f"{labels[name]:>{size}}" for name, size in sizes.items()), "bold", color))
        self._head = head
        text = "".join(f"{found[name][1]:>{size}}" for name, size in sizes.items())
        return [*lines, text + (f" {painted('*', 'green', color)}" if best else "")]

    def _fitting(self, found: Mapping[str, tuple[int, str]], labels: Mapping[str, str], width: int) -> list[str]:
        room, taken = width - 2, set[str]()  # for the mark
        for name in sorted(found, key=lambda name: found[name][0]):
            room -= max(self._widths[name], cells(labels[name])) + 2
            if room < 0 and taken:
                break
            taken.add(name)
        return [name for name in found if name in taken]


def _cropped(name: str) -> str:
    """Its beginning and its end, which tell `val/iou_of_a_class` from the other classes'."""
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}..{name[1 - NAME // 2 :]}"


def _short(label: str) -> str:
    part, _, name = label.partition("/")
    return part if name == "loss" else name if part == "val" else label


def bar_line(at: Position, rate: float, width: int) -> list[str]:
    """The bar in three pieces, the middle one its filled part: as much as fits `width` columns, the most important first."""
    step, metrics, elapsed = at.step(), at.metrics, at.elapsed
    left = at.left(step)
    total = "" if at.total is None else f"/{at.total:,}"
    times = format_seconds(elapsed) + ("" if left is None else f", {format_seconds(left)} left")
    epoch = "" if not at.epochs else f"epoch {min(max(at.epoch, 1), at.epochs)}/{at.epochs}"
    speed = "" if not rate else f"{rate:.3g} it/s" if rate >= 1 else f"{1 / rate:.3g} s/it"
    values = {  # in their order on the screen, with their importance
        f"{step:,}{total}": 0,
        times: 1,
        at.doing(): 2,
        _metric(metrics, "loss", "loss {}"): 3,
        "" if at.evaluated is None else f"{at.evaluated[0]} {format_number(*at.evaluated)}": 5,
        speed: 6,
        _metric(metrics, "samples_per_s", "{} samples/s"): 7,
        "" if "data_wait" not in metrics else f"{metrics['data_wait']:.0%} data wait": 8,
        "" if "peak_memory" not in metrics else f"{metrics['peak_memory']:.1f} GiB": 9,
        "" if "mfu" not in metrics else f"{metrics['mfu']:.0%} mfu": 10,
    }
    room, taken = width - BAR - 1, set[str]()
    for text, _ in sorted([*values.items(), (epoch, 4)], key=lambda item: item[1]):
        if text and cells(text) + 2 <= room:
            room -= cells(text) + 2
            taken.add(text)
    before = f"{epoch}  " if epoch in taken else ""
    after = "".join(f"  {text}" for text in values if text in taken)
    size = max(0, BAR + room)
    share = step / at.total if at.total else 0.0 if left is None else elapsed / max(elapsed + left, 1e-9)
    filled = round(min(1.0, share) * size)
    return [before, "━" * filled, "─" * (size - filled) + after]


def _metric(metrics: Mapping[str, float], name: str, form: str) -> str:
    return form.format(format_number(name, metrics[name])) if name in metrics else ""


class LiveView(Protocol):
    """What the console tells of a training to whatever shows it."""

    def refresh(self) -> None:
        """About four times a second, from a thread of its own."""

    def row(self, step: int, val: Mapping[str, float], beside: Beside) -> None:
        """An evaluation on `val`, or without one a part of training."""

    def stop(self) -> None:
        """At the end of the training steps."""


class Live:
    """Draws the bar about four times a second in a thread of its own, and rows above it."""

    def __init__(self, line: BottomLine, position: Position) -> None:
        self._line, self._position, self._table = line, position, Table()
        self._steps = deque([(position.began, position.first)], maxlen=int(RATE_SECONDS / REFRESH_SECONDS))
        self._ascii = not _encodes(line.stream, "━─")
        self.refresh()

    def refresh(self) -> None:
        """Draw the bar as it is now, on a terminal that may have been resized."""
        now, at = time.monotonic(), self._position
        (since, first), step = self._steps[0], at.step()
        self._steps.append((now, step))
        pieces = bar_line(at, (step - first) / max(now - since, 1e-9), columns(self._line.stream) - 1)
        if self._ascii:
            pieces = [piece.replace("━", "#").replace("─", "-") for piece in pieces]
        size = sum(map(cells, pieces))
        pieces[1] = painted(pieces[1], "cyan", self._line.color)
        self._line.show("".join(pieces), size)

    def row(self, step: int, val: Mapping[str, float], beside: Beside) -> None:
        """A row of the table, for an evaluation on `val`, or without one for a part of training."""
        if beside.main in val:
            self._position.evaluated = f"val/{beside.main}", val[beside.main]
        found = cells_of(self._position, step, val, beside)
        width, color = columns(self._line.stream), self._line.color
        self._line.above("\n".join(self._table.lines(found, width, best=beside.best, color=color)))

    def say(self, text: str, style: str = "") -> None:
        """Print text above the bar."""
        self._line.above(painted(text, style, self._line.color))

    def stop(self) -> None:
        """Remove the bar."""
        self._line.show("")


def _encodes(stream: object, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
