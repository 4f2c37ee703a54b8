"""curves.png: loss, metrics and learning rate of a run, drawn by Pillow: matplotlib alone takes longer to import."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config.errors import visible
from dist_train.files import replacing
from dist_train.pages.curves import (
    PANELS,
    Horizontal,
    Line,
    Panel,
    horizontal_of,
    indexed,
    lr_names,
    metric_names,
    panel_of,
)
from dist_train.tracking.records import Row

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

WIDTH, HEIGHT = 572, 396  # of a panel, in pixels
LEFT, TOP, RIGHT, BOTTOM = 66, 62, 20, 44  # around the plot
FINE = 3  # drawn so many times larger, then averaged
INK, GRAY, GRID, RED = "#1f2937", "#6b7280", "#e5e7eb", "#b91c1c"
# Of these the first that is installed is used for texts that DejaVu Sans lacks.
_OTHER = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
)


def draw_curves(
    rows: Sequence[Row], path: str | os.PathLike[str], title: str = "", config: Mapping[str, Any] | None = None
) -> None:
    """Draws loss (train, val, test), the metrics and the learning rate over the steps into a PNG, atomically.

    rows: as records.read_rows gives them; any subset of splits will do, none as well. title: the run's name. config: of the
    run, which says what is best.
    """
    from PIL import Image, ImageDraw

    rows = indexed(rows)
    names = ["loss", *metric_names(rows)[:PANELS], *lr_names(rows)]
    columns = min(3, len(names))
    above = 40 if title else 0
    size = WIDTH * columns, HEIGHT * math.ceil(len(names) / columns) + above
    image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
    draw, axis = ImageDraw.Draw(image), horizontal_of(rows)
    if title:
        _write(draw, (16, 14), title, 18, INK)
    for k, name in enumerate(names):
        corner = k % columns * WIDTH, k // columns * HEIGHT + above
        _draw_panel(draw, corner, panel_of(rows, name, config or {}), axis)
    with replacing(Path(path)) as part:
        image.reduce(FINE).save(part, "PNG")


def _draw_panel(draw: ImageDraw, corner: tuple[int, int], panel: Panel, axis: Horizontal) -> None:
    x0, y0 = corner[0] + LEFT, corner[1] + TOP
    width, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        return x0 + axis.share(step) * width, y0 + (1 - panel.height(value)) * tall

    _write(draw, (corner[0] + 16, corner[1] + 12), panel.title, 15, INK)
    for at, text in panel.ticks():
        y = y0 + (1 - at) * tall
        _stroke(draw, [(x0, y), (x0 + width, y)], GRID, 0.8)
        _write(draw, (x0 - 8, y), text, 12, GRAY, "rm")
    for at, text in axis.ticks():
        _write(draw, (x0 + at * width, y0 + tall + 6), text, 12, GRAY, "ma")
    _write(draw, (x0 + width, y0 + tall + 22), "step", 12, GRAY, "ra")
    _stroke(draw, [(x0, y0), (x0, y0 + tall), (x0 + width, y0 + tall)], GRAY, 1)
    if panel.broken is not None:
        x = x0 + axis.share(panel.broken) * width
        _stroke(draw, [(x, y0), (x, y0 + tall)], RED, 1)
        side = "r" if x > x0 + width / 2 else "l"
        _write(
            draw,
            (x - 5 if side == "r" else x + 5, y0 + tall - 14),
            f"not finite at {panel.broken:,}",
            12,
            RED,
            f"{side}m",
        )
    at = corner[0] + 16.0
    for line in panel.lines:
        _draw_line(draw, line, [place(*point) for point in zip(*line.points, strict=True)])
        if line.means is not None:
            _stroke(draw, [place(*point) for point in zip(*line.means, strict=True)], line.color, 1.6)
        if line.best is not None:
            _ring(draw, place(*line.best), 6, line.color)
        at = _write(draw, (at, corner[1] + 36), _key(line, panel), 12, line.color) + 14
    if not panel.lines:
        _write(draw, (x0 + width / 2, y0 + tall / 2), "no values", 14, GRAY, "mm")


def _key(line: Line, panel: Panel) -> str:
    last = next(value for value in reversed(line.points[1]) if value == value)
    best = f" (best {panel.shown(line.best[1])} at {line.best[0]:,})" if line.best is not None else ""
    return f"{line.label} {panel.shown(last)}{best}"


def _draw_line(draw: ImageDraw, line: Line, places: Sequence[tuple[float, float]]) -> None:
    run: list[tuple[float, float]] = []
    for place in [*places, (0.0, math.nan)]:
        if place[1] == place[1]:
            run.append(place)
            if line.dots or len(places) <= 40:
                _dot(draw, place, 4 if line.dots else 2.2, line.color)
            continue
        if len(run) > 1 and not line.dots:
            _stroke(draw, run, line.color if line.means is None else _pale(line.color), 1.6)
        run = []


def _stroke(draw: ImageDraw, places: Sequence[tuple[float, float]], color: str, width: float) -> None:
    draw.line([(x * FINE, y * FINE) for x, y in places], color, round(width * FINE), "curve")


def _pale(color: str) -> str:
    """Mixed with white."""
    return "#" + "".join(f"{(int(color[k : k + 2], 16) + 3 * 255) // 4:02x}" for k in (1, 3, 5))


def _dot(draw: ImageDraw, place: tuple[float, float], radius: float, color: str) -> None:
    x, y = place
    draw.ellipse([(value * FINE) for value in (x - radius, y - radius, x + radius, y + radius)], color)


def _ring(draw: ImageDraw, place: tuple[float, float], radius: float, color: str) -> None:
    x, y = place
    draw.ellipse([value * FINE for value in (x - radius, y - radius, x + radius, y + radius)], None, color, 2 * FINE)


def _write(draw: ImageDraw, place: tuple[float, float], text: str, size: int, color: str, anchor: str = "la") -> float:
    """Write a text; returns where it ends."""
    text = visible(text, keep="")
    font = _font(size, any(ord(letter) >= 0x2E80 for letter in text))
    draw.text((place[0] * FINE, place[1] * FINE), text, color, font, anchor)
    return place[0] + draw.textlength(text, font) / FINE


@cache
def _font(size: int, other: bool) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")  # which isn't imported: DejaVu Sans comes with it
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [f"{folder}/mpl-data/fonts/ttf/DejaVuSans.ttf" for folder in folders]
    for file in [*(_OTHER if other else ()), *files]:
        if os.path.isfile(file):
            return ImageFont.truetype(file, size * FINE)
    return ImageFont.load_default(size * FINE)
