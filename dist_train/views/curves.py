"""curves.png: loss, metrics and learning rate of a run, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import visible
from dist_train.files import replacing
from dist_train.tracking.records import FIELDS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"train": "#4c78a8", "val": "#e4572e", "test": "#2a9d5c", "lr": "#6b7280"}
PANELS = 4  # metrics drawn beside the loss at most
POINTS = 1500  # of a line; more can't be seen
TITLES = {
    "lr": "learning rate",
    "samples_per_s": "samples/s",
    "data_wait": "share of time waiting for data",
    "mfu": "model FLOPs utilization",
    "peak_memory": "peak memory, GiB",
}
# for names in other scripts, where one is installed
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei"]
# recorded for diagnosis; the report shows them
ASIDE = ("lr", "grad_norm", "samples_per_s", "data_wait", "mfu", "peak_memory")


def series(rows: Sequence[Row], split: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a split's metric; where a step occurs twice, the later row counts; thinned for drawing."""
    points = {row["step"]: float(row[name]) for row in rows if row.get("split") == split and name in row}
    steps = sorted(points)
    stride = math.ceil(len(steps) / POINTS) if len(steps) > POINTS else 1
    kept = steps[::-1][::stride][::-1]  # the last one stays
    return kept, [points[step] for step in kept]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics to draw beside the loss: those that an evaluation gave (else the train rows'), in order."""
    evaluated = [row for row in rows if row.get("split") in ("val", "test")]
    names = dict.fromkeys(key for row in evaluated or rows for key in row)
    return [n for n in names if not (n in (*FIELDS, "loss", "eval_samples") or n.startswith("raw_") or is_aside(n))]


def is_aside(name: str) -> bool:
    """Whether a metric of train rows isn't one of the model's; of several optimizers each has its own (`lr/NAME`)."""
    return name.partition("/")[0] in ASIDE


def panel_title(name: str) -> str:
    """What a metric's panel is called."""
    head, slash, rest = name.partition("/")
    return TITLES.get(head, head) + slash + rest


def aside_names(rows: Sequence[Row]) -> list[str]:
    """What rows have of ASIDE, in that order; of several optimizers `lr/NAME` and so on."""
    found = filter(is_aside, dict.fromkeys(key for row in rows for key in row))
    return sorted(found, key=lambda name: ASIDE.index(name.partition("/")[0]))


def lr_names(rows: Sequence[Row]) -> list[str]:
    """`lr`, or those of several optimizers."""
    return [name for name in aside_names(rows) if name.partition("/")[0] == "lr"] or ["lr"]


def draw_curves(rows: Sequence[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws loss (train, val, test), the metrics and the learning rate over the steps into a PNG, atomically.

    rows: as records.read_rows gives them; any subset of splits will do, none as well. title: the run's name.
    """
    panels = ["loss", *metric_names(rows)[:PANELS], *lr_names(rows)]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(5.2 * columns, 3.6 * lines + 0.5)
    if title:
        figure.suptitle(plain(title), fontsize=14, fontweight="bold", x=0.01, ha="left", fontfamily=FONTS)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, name in zip(axes, panels, strict=False):
        draw_panel(axis, rows, name)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    with replacing(Path(path)) as part:
        part.write_bytes(render(figure, "png"))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """The figure as "png" or "svg" (whose text stays text)."""
    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    out = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(out, format=kind)
    return out.getvalue()


def draw_panel(axis: Axes, rows: Sequence[Row], name: str) -> None:
    """One metric's panel: one line per split, a point where there is only one value (test)."""
    drawn: list[float] = []
    for split in ("train", "val", "test") if not is_aside(name) else ("train",):
        steps, values = series(rows, split, name)
        good = [value for value in values if math.isfinite(value)]
        if len(good) < len(values):
            step = next(s for s, v in zip(steps, values, strict=True) if not math.isfinite(v))
            style: dict[str, Any] = {"color": "#b91c1c", "fontsize": 8.5, "ha": "right"}
            axis.axvline(step, color=style["color"], linewidth=1, linestyle=":")
            axis.text(step, 0.03, f"not finite at {step} ", transform=axis.get_xaxis_transform(), **style)
        if not good:
            continue
        drawn += good
        label = split if split == "train" else f"{split}  {good[-1]:.4g}"
        style = {"color": COLORS["lr" if is_aside(name) else split], "label": label, "linewidth": 1.4}
        if split == "test" or len(good) == 1:
            style |= {"marker": "D" if split == "test" else "o", "linestyle": "none", "zorder": 5}
        elif split == "val":
            style |= {"linewidth": 1.8, "marker": "o" if len(values) <= 40 else "", "markersize": 3.5}
        axis.plot(steps, values, **style)
    dress(axis, panel_title(name))
    if not drawn:
        axis.text(0.5, 0.5, "no values", ha="center", va="center", color="#9ca3af", transform=axis.transAxes)
    elif is_aside(name):
        axis.set_ylim(bottom=0)
    else:
        axis.legend(frameon=False, fontsize=9)
    if name == "loss" and drawn and min(drawn) > 0 and max(drawn) > 50 * min(drawn):
        axis.set_yscale("log")


def dress(axis: Axes, title: str, x: str = "step") -> None:
    """What all panels share."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(plain(title), loc="left", fontsize=11)
    axis.set_xlabel(x, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axis.tick_params(labelsize=8.5)
    axis.grid(True, color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def plain(text: str) -> str:
    """Text that matplotlib doesn't take for mathematics, and can draw."""
    return visible(text, keep="").replace("$", r"\$")
