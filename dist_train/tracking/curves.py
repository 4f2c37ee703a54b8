"""curves.png: loss, metrics and learning rate of a run, drawn by matplotlib without a display."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.tracking.records import FIELDS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"train": "#4c78a8", "val": "#e4572e", "test": "#2a9d5c", "lr": "#6b7280"}
PANELS = 4  # metrics drawn beside the loss at most
POINTS = 1500  # of a line; more can't be seen
# recorded for diagnosis; the report shows them
ASIDE = ("lr", "grad_norm", "samples_per_s", "data_wait")


def series(rows: Sequence[Row], split: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric of one split; where a step occurs twice, the later row counts; thinned for drawing."""
    points = {row["step"]: float(row[name]) for row in rows if row.get("split") == split and name in row}
    steps = sorted(points)
    stride = math.ceil(len(steps) / POINTS) if len(steps) > POINTS else 1
    kept = steps[::-1][::stride][::-1]  # the last one stays
    return kept, [points[step] for step in kept]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics to draw beside the loss: those that an evaluation gave (else the train rows'), in order."""
    evaluated = [row for row in rows if row.get("split") in ("val", "test")]
    names = dict.fromkeys(key for row in evaluated or rows for key in row)
    return [n for n in names if n not in FIELDS and n != "loss" and n not in ASIDE and not n.startswith("raw_")]


def draw_curves(rows: Sequence[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws loss (train, val, test), the metrics and the learning rate over the steps into a PNG, atomically.

    rows: as records.read_rows gives them; any subset of splits will do, none as well. title: the run's name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = ["loss", *metric_names(rows)[:PANELS], "lr"]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines + 0.5), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=14, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, name in zip(axes, panels, strict=False):
        _panel(axis, rows, name)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(part, format="png")
    os.replace(part, path)


def _panel(axis: Axes, rows: Sequence[Row], name: str) -> None:
    """One metric's panel: a line a split, a point where there is only one value (test)."""
    positive: list[float] = []
    for split in ("train", "val", "test"):
        if name == "lr" and split != "train":
            continue
        steps, values = series(rows, split, name)
        good = [value for value in values if math.isfinite(value)]
        if not good:
            continue
        positive += good
        color = COLORS["lr" if name == "lr" else split]
        style: dict[str, Any] = {"color": color, "label": split, "linewidth": 1.3 if split == "train" else 1.8}
        if split == "test" or len(values) == 1:
            style.update(marker="D" if split == "test" else "o", linestyle="none", zorder=5)
        elif len(values) <= 40 and split == "val":
            style.update(marker="o", markersize=3.5)
        axis.plot(steps, values, **style)
        if split != "train":
            axis.annotate(
                f"{good[-1]:.4g}", (steps[-1], values[-1]), color=color, fontsize=8.5, textcoords="offset points",
                xytext=(-4, 6), ha="right",
            )  # fmt: skip
    title = {"lr": "learning rate"}.get(name, name)
    axis.set_title(title.replace("$", r"\$"), loc="left", fontsize=11)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.grid(True, color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if not positive:
        axis.text(0.5, 0.5, "no values", ha="center", va="center", color="#9ca3af", transform=axis.transAxes)
    elif name == "loss" and min(positive) > 0 and max(positive) > 50 * min(positive):
        axis.set_yscale("log")
    elif name == "lr":
        axis.set_ylim(bottom=0)
    if name != "lr" and positive:
        axis.legend(frameon=False, fontsize=9)
