"""What is drawn of a run's rows: which metrics, thinned lines, the best values, axes. The drawing is in charts.py and png.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from dist_train.config.fields import better_is_lower
from dist_train.text import format_number
from dist_train.tracking.records import FIELDS, Row

COLORS = {"train": "#4c78a8", "val": "#e4572e", "test": "#2a9d5c", "aside": "#7c8798"}
PANELS = 4  # metrics drawn beside the loss in curves.png at most
POINTS = 800  # of a line; more can't be seen
HUGE = 1e300  # counts as not finite: differences of such values overflow
TITLES = {
    "lr": "learning rate",
    "samples_per_s": "samples/s",
    "data_wait": "share of time waiting for data",
    "mfu": "model FLOPs utilization",
    "peak_memory": "peak memory, GiB",
}
# recorded for diagnosis; the report shows them
ASIDE = ("lr", "grad_norm", "samples_per_s", "data_wait", "mfu", "peak_memory")
SHARES = ("data_wait", "mfu")  # drawn from 0 to 100 %

Points = tuple[list[int], list[float]]


@dataclass
class Line:
    """Values over steps; nan where the line is interrupted. `means`: the same as averages, where the line is thinned.

    `hidden`: until a box of the page asks for it."""

    label: str
    color: str
    points: Points
    dots: bool = False
    means: Points | None = None
    best: tuple[int, float] | None = None
    hidden: bool = False


@dataclass
class Panel:
    """One chart.

    Attributes:
        low, high: the range of its axis, in powers of ten where `log`. share: values are shares, drawn from 0 to 100 %.
        aside: it isn't one of the model's metrics. broken: the first step without a finite value.
    """

    title: str
    lines: list[Line]
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    share: bool = False
    aside: bool = False
    broken: int | None = None

    def height(self, value: float) -> float:
        """Where a value lies between the bottom (0) and the top (1)."""
        value = math.log10(value) if self.log else value
        return (value - self.low) / (self.high - self.low)

    def shown(self, value: float) -> str:
        """A value in a caption."""
        return f"{value:.1%}" if self.share else f"{value:,.4g}" if self.aside else format_number("", value)

    def ticks(self) -> list[tuple[float, str]]:
        """(height, label) of the marks of its axis."""
        if self.log:
            stride = max(1, math.ceil((self.high - self.low) / 8))
            powers = range(math.floor(self.low / stride) * stride, math.ceil(self.high) + 1, stride)
            factors = (1,) if self.high - self.low > 2 else (1, 2, 5)
            values = [factor * 10.0**power for power in powers for factor in factors]
        else:
            values = ticks(self.low, self.high, 6)
        marks = [(self.height(value), f"{value:.0%}" if self.share else brief(value)) for value in values]
        return [(at, text) for at, text in marks if -1e-9 <= at <= 1 + 1e-9]


@dataclass
class Horizontal:
    """The axis that all charts of a page share: first and last step, and (step, epoch) between which epochs are interpolated."""

    first: int
    last: int
    epochs: list[tuple[int, float]] = field(default_factory=list)

    def share(self, step: float) -> float:
        """Where a step lies between the left end (0) and the right end (1)."""
        return (step - self.first) / max(1, self.last - self.first)

    def ticks(self) -> list[tuple[float, str]]:
        """(share, label) of its marks in steps."""
        return [(self.share(step), brief(step)) for step in ticks(self.first, self.last, 5, whole=True)]

    def epoch_ticks(self) -> list[tuple[float, str]]:
        """The same in epochs."""
        ends = [epoch for step, epoch in self.epochs if self.first <= step <= self.last] or [0.0]
        marks = [(self.share(self._step(epoch)), brief(epoch)) for epoch in ticks(min(ends), max(ends), 5)]
        return [(at, text) for at, text in marks if -1e-9 <= at <= 1 + 1e-9]

    def _step(self, epoch: float) -> float:
        for (step, start), (after, end) in pairwise(self.epochs):
            if epoch <= end:
                return step + (epoch - start) / max(end - start, 1e-12) * (after - step)
        return float(self.last)


class Rows(list[Row]):
    """Rows that are sorted by split and metric once, however many metrics are drawn of them."""

    @cached_property
    def columns(self) -> dict[tuple[str, str], Points]:
        """(steps, values) by (split, metric), in the order of the rows; see `series`."""
        found: dict[tuple[str, str], dict[int, float]] = {}
        for row in self:
            split, step = str(row.get("split")), row["step"]
            for name, value in row.items():
                if name not in FIELDS and isinstance(value, int | float):
                    value = value if -HUGE < value < HUGE else math.nan
                    found.setdefault((split, name), {})[step] = value
        columns = {}
        for key, points in found.items():
            steps = sorted(points)
            columns[key] = steps, [points[step] for step in steps]
        return columns


def indexed(rows: Sequence[Row]) -> Rows:
    """The same rows, sorted by split and metric if they aren't yet."""
    return rows if isinstance(rows, Rows) else Rows(rows)


def series(rows: Sequence[Row], split: str, name: str) -> Points:
    """(steps, values) of a split's metric; where a step occurs twice, the later row counts; nan for what isn't finite."""
    return indexed(rows).columns.get((split, name), ([], []))


def thinned(points: Points, most: int = POINTS) -> Points:
    """At most about `most` points: minimum and maximum of equal parts, in order, so that no spike is lost; both ends stay."""
    steps, values = points
    if len(steps) <= most:
        return points
    kept = {0, len(steps) - 1}
    for part in _parts(len(steps), most // 2):
        finite = [k for k in part if values[k] == values[k]]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else {part[0]}
        if len(finite) < len(part):
            kept.add(next(k for k in part if values[k] != values[k]))
    order = sorted(kept)
    return [steps[k] for k in order], [values[k] for k in order]


def averaged(points: Points, most: int = POINTS) -> Points | None:
    """The means of these parts, at their last steps; None where nothing need be thinned."""
    steps, values = points
    if len(steps) <= most:
        return None
    found: Points = ([], [])
    for part in _parts(len(steps), most // 2):
        finite = [values[k] for k in part if values[k] == values[k]]
        if finite:
            found[0].append(steps[part[-1]])
            found[1].append(math.fsum(finite) / len(finite))
    return found


def _parts(length: int, count: int) -> Iterator[range]:
    return (range(k * length // count, (k + 1) * length // count) for k in range(count))


def best_point(points: Points, lower: bool, losses: Mapping[int, float] | None = None) -> tuple[int, float] | None:
    """(step, value) of the best finite value; of equal ones that with the lowest loss, then the earliest."""
    sign, losses = 1 if lower else -1, losses or {}
    finite = [(step, value) for step, value in zip(*points, strict=True) if value == value]
    return min(finite, key=lambda point: (sign * point[1], losses.get(point[0], math.inf)), default=None)


def judging(config: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The config, and as `better` what the last start has recorded of metrics that their names misrepresent."""
    better = next((one.get("better") for one in reversed(attempts) if one.get("event") == "start"), None)
    return {**config, "better": better if isinstance(better, dict) else {}}


def lower_is_better(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a metric should fall: as `checkpoint.keep_best` says of its own, as they have said (`judging`), or by its name."""
    mode, _, metric = str((config.get("checkpoint") or {}).get("keep_best") or "").rpartition(" ")
    if mode in ("min", "max") and metric.removeprefix("val/") == name:
        return mode == "min"
    known: Mapping[str, str] = config.get("better") or {}
    fitting = [
        key for key in known if f"{name.removeprefix('raw_')}_".startswith(f"{key}_")
    ]  # `iou_cat` is one of `iou`'s
    return known[max(fitting, key=len)] == "min" if fitting else better_is_lower(name)


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics to draw beside the loss: those that an evaluation gave (else the train rows'), in order."""
    columns = indexed(rows).columns
    evaluated = [name for split, name in columns if split in ("val", "test")]
    names = dict.fromkeys(evaluated or [name for _, name in columns])
    return [n for n in names if not (n in ("loss", "eval_samples") or n.startswith("raw_") or is_aside(n))]


def is_aside(name: str) -> bool:
    """Whether a metric of train rows isn't one of the model's; of several optimizers each has its own (`lr/NAME`)."""
    return name.partition("/")[0] in ASIDE


def panel_title(name: str) -> str:
    """What a metric's panel is called."""
    head, slash, rest = name.partition("/")
    return TITLES.get(head, head) + slash + rest


def aside_names(rows: Sequence[Row]) -> list[str]:
    """What rows have of ASIDE, in that order; of several optimizers `lr/NAME` and so on."""
    found = filter(is_aside, dict.fromkeys(name for _, name in indexed(rows).columns))
    return sorted(found, key=lambda name: ASIDE.index(name.partition("/")[0]))


def lr_names(rows: Sequence[Row]) -> list[str]:
    """`lr`, or those of several optimizers."""
    return [name for name in aside_names(rows) if name.partition("/")[0] == "lr"] or ["lr"]


def best_of(rows: Sequence[Row], split: str, name: str, config: Mapping[str, Any]) -> tuple[int, float] | None:
    """(step, value) of a split's best value of a metric."""
    steps, losses = series(rows, split, "loss")
    known = {step: loss for step, loss in zip(steps, losses, strict=True) if loss == loss}
    return best_point(series(rows, split, name), lower_is_better(name, config), known)


def panel_of(rows: Sequence[Row], name: str, config: Mapping[str, Any]) -> Panel:
    """One metric of a run: train, val and test together; the best of val (of train where there is no val) marked."""
    rows = indexed(rows)
    lines, broken = dict[str, Line](), None
    for split in ("train", "val", "test") if not is_aside(name) else ("train",):
        points = series(rows, split, name)
        missing = next((step for step, value in zip(*points, strict=True) if value != value), None)
        broken = missing if broken is None else broken
        if any(value == value for value in points[1]):
            color = COLORS["aside" if is_aside(name) else split]
            dots = split == "test" or len(points[0]) == 1
            lines[split] = Line(split, color, thinned(points), dots, averaged(points))
    marked = next((split for split in ("val", "train") if split in lines and not is_aside(name)), None)
    if marked is not None:
        lines[marked].best = best_of(rows, marked, name, config)
    return fitted(panel_title(name), list(lines.values()), name, broken)


def fitted(title: str, lines: list[Line], name: str, broken: int | None = None) -> Panel:
    """A panel with the axis that its values need."""
    values = [value for line in lines for value in line.points[1] if value == value]
    panel = Panel(title, lines, aside=is_aside(name), broken=broken)
    if name.partition("/")[0] in SHARES:
        panel.share, values = True, [min(1.0, max(0.0, value)) for value in values]
        return panel
    if not values:
        return panel
    low, high = min(values), max(values)
    if name == "loss" and low > 0 and high > 50 * low:
        panel.log, low, high = True, math.log10(low), math.log10(high)
    elif is_aside(name):
        low = min(0.0, low)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    panel.low, panel.high = low - (room if low or panel.log else 0.0), high + room
    return panel


def horizontal_of(rows: Sequence[Row]) -> Horizontal:
    """The steps of rows, and what epochs they are."""
    steps = [row["step"] for row in rows] or [0]
    return Horizontal(min(steps), max(steps), _epochs(rows))


def _epochs(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """(step, epochs done there). Rows tell only which epoch a step is in: step / epoch is at most an epoch's length, and is it
    at the end of one. Where one length doesn't fit all (the batch size has changed), the last step of each epoch is its end."""
    pairs = {
        (row["step"], row["epoch"]) for row in rows if type(row.get("epoch")) is int and row["epoch"] > 0 < row["step"]
    }
    if not pairs:
        return []
    last = max(step for step, _ in pairs)
    length = max(step / epoch for step, epoch in pairs)
    if all(step > length * (epoch - 1) + 1e-6 for step, epoch in pairs):
        return [(0, 0.0), (last, last / length)]
    ends = {epoch: step for step, epoch in sorted(pairs)}
    return [(0, 0.0), *((step, float(epoch)) for epoch, step in sorted(ends.items()))]


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """About `most` round numbers from low to high."""
    raw = (high - low) / most
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= raw * (1 - 1e-9))
    size = max(1.0, size) if whole else size
    return [k * size for k in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def brief(value: float) -> str:
    """A number as short as a mark of an axis should be: 0.05, 12k, 1.5M, 2e-5."""
    size = abs(value)
    for least, unit in ((1e6, "M"), (1e4, "k")):
        if least <= size < 1e9:
            return f"{value / (1e6 if unit == 'M' else 1e3):.4g}{unit}"
    if size and (size < 1e-3 or size >= 1e9):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e+")
    return f"{round(value, 10):.6g}"
