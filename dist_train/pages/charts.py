"""Charts and matrices as inline SVG, drawn without matplotlib; report.js adds values under the pointer, and smoothing."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dist_train.config.errors import visible
from dist_train.pages.curves import Horizontal, Line, Panel, Points

WIDTH, HEIGHT = 340, 212
LEFT, TOP, INNER, TALL = 42, 14, 282, 172  # the plot inside
DOTS = 40  # points of a line up to which each is marked
NUMBERED = 12  # marks of restarts that have numbers
SWATCH = "display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:4px;background:"
KEYS = 8  # lines whose names stand above each chart


@dataclass(frozen=True)
class Mark:
    """A vertical line in every chart: a start after the first one, or the step whose weights are kept."""

    step: int
    text: str
    label: str = ""


def script() -> str:
    """The script of a page with charts; its sha256 stands in the page's Content-Security-Policy."""
    return Path(__file__).with_name("report.js").read_text(encoding="utf-8")


def chart(panel: Panel, axis: Horizontal, marks: Sequence[Mark] = ()) -> str:
    """A figure as HTML: what its lines are with their last and best values, the SVG, and the data for the script."""
    drawn = (
        f'<figure class="chart" data-chart="{escape(json.dumps(_data(panel, axis), allow_nan=False))}">{caption(panel)}'
    )
    return f"{drawn}{drawing(panel, axis, marks)}</figure>"


def drawing(panel: Panel, axis: Horizontal, marks: Sequence[Mark] = (), size: str = "") -> str:
    """The SVG; text and axes have the color of the text around it. size: attributes of the element, as `width="340"`."""
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {size}', _named(panel)]
    parts += ['<g class="axis" stroke="currentColor" fill="none" stroke-opacity=".15">']
    parts += [f'<path d="M{LEFT} {_y(at):.1f}h{INNER}"/>' for at, _ in panel.ticks()]
    parts += [f'<path stroke-opacity=".5" d="M{LEFT} {TOP}v{TALL}h{INNER}"/></g><g fill="currentColor" font-size="10">']
    parts += [_text(LEFT - 4, _y(at) + 3.5, text, "end") for at, text in panel.ticks()]
    for unit, labels in (("step", axis.ticks()), ("epoch", axis.epoch_ticks() if axis.epochs else [])):
        parts.append(f'<g class="by-{unit}" display="{"inline" if unit == "step" else "none"}">')
        parts += [_text(_x(at), TOP + TALL + 12, text, "middle") for at, text in labels]
        parts.append(_text(LEFT + INNER, HEIGHT - 4, unit, "end") + "</g>")
    parts.append("</g>")
    parts += [_vertical(axis, mark) for mark in marks]
    if panel.broken is not None:
        label = f"not finite at {panel.broken:,}"
        parts.append(_vertical(axis, Mark(panel.broken, label, label), "#d33"))
    parts += [_line(k, line, panel, axis) for k, line in enumerate(panel.lines)]
    if not panel.lines:
        parts.append(
            _text(LEFT + INNER / 2, TOP + TALL / 2, "no values", "middle", 'font-size="11" fill="currentColor"')
        )
    parts.append(
        f'<path class="cursor" stroke="currentColor" stroke-opacity=".6" d="M0 {TOP}v{TALL}" visibility="hidden"/></svg>'
    )
    return "".join(parts)


def matrix(pixels: bytes, names: Sequence[str], inside: Sequence[tuple[int, int, str, bool]]) -> str:
    """A confusion matrix: a PNG with a pixel for each cell, (row, column, text, on a dark ground) for those with text."""
    side = max(3.0, 440 / len(names)) if len(names) > 20 else 26.0
    stride = -(-len(names) // 40)
    labels = [(k, name if len(name) <= 16 else name[:15] + "\u2026") for k, name in enumerate(names)][::stride]
    room = 12 + 6.2 * max(len(name) for _, name in labels)
    turned = room > 34
    all_over = side * len(names)
    size = room + all_over + 2, all_over + (room if turned else 18)
    uri = base64.b64encode(pixels).decode()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" width="{size[0]:.0f}" role="img" '
        'aria-label="confusion matrix: true classes in rows, predicted ones in columns" fill="currentColor" font-size="11">',
        f'<image x="{room:.1f}" width="{all_over:.1f}" height="{all_over:.1f}" style="image-rendering:pixelated" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{uri}"/>',
        f'<rect x="{room:.1f}" width="{all_over:.1f}" height="{all_over:.1f}" fill="none" stroke="currentColor" '
        'stroke-opacity=".2"/>',
    ]
    for k, name in labels:
        middle = (k + 0.5) * side
        parts.append(_text(room - 5, middle + 4, name, "end"))
        x, y = room + middle, all_over + (6 if turned else 14)
        turn = f'transform="rotate(-90 {x + 4:.1f} {y:.1f})"' if turned else ""
        parts.append(_text(x + (4 if turned else 0), y, name, "end" if turned else "middle", turn))
    for row, column, text, dark in inside:
        color = 'fill="white"' if dark else ""
        parts.append(_text(room + (column + 0.5) * side, (row + 0.5) * side + 4, text, "middle", color))
    return "".join([*parts, "</svg>"])


def _named(panel: Panel) -> str:
    best = [
        f"; best {line.label} {panel.shown(line.best[1])} at step {line.best[0]:,}" for line in panel.lines if line.best
    ]
    return f'aria-label="{_plain(panel.title + "".join(best[:KEYS]))}">'


def caption(panel: Panel) -> str:
    """The title, and for each line its name with its last value, which the script replaces by those under the pointer."""
    keys = []
    for line in panel.lines:
        last = next((value for value in reversed(line.points[1]) if value == value), math.nan)
        best = "" if line.best is None else f" \u2605\u00a0{panel.shown(line.best[1])}\u00a0at\u00a0{line.best[0]:,}"
        name = f"<span>{_plain(line.label)}</span>"
        unseen = ' style="display:none"' if line.hidden else ""
        keys.append(
            f'<span class="key"{unseen}><i style="{SWATCH}{line.color}"></i>{name} <b>{panel.shown(last)}</b>{best}</span>'
        )
    return f"<figcaption><strong>{_plain(panel.title)}</strong> <em></em><div>{' '.join(keys)}</div></figcaption>"


def _line(k: int, line: Line, panel: Panel, axis: Horizontal) -> str:
    """One line: as it is, a place for its smoothed form, its dots, and a ring around the best."""
    places = [
        None if value != value else (_x(axis.share(step)), _y(panel.height(value)))
        for step, value in zip(*line.points, strict=True)
    ]
    dots = [place for place in places if place is not None]
    kind = f"line line-{k}" + (" smoothed" if line.means else "")
    unseen = ' style="display:none"' if line.hidden else ""
    parts = [f'<g class="{kind}"{unseen} stroke="{line.color}" fill="none" stroke-width="1.5" stroke-linejoin="round">']
    if not line.dots:
        means = line.means or ([], [])
        mean = _path([(_x(axis.share(step)), _y(panel.height(value))) for step, value in zip(*means, strict=True)])
        parts.append(f'<path class="raw" d="{_path(places)}"/><path class="smooth" d="{mean}"/>')
    if line.dots or len(places) <= DOTS:
        radius = 3 if line.dots else 1.8
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{line.color}" stroke="none"/>' for x, y in dots
        ]
    if line.best is not None:
        step, value = line.best
        at = f'cx="{_x(axis.share(step)):.1f}" cy="{_y(panel.height(value)):.1f}"'
        text = f"best {_plain(line.label)}: {panel.shown(value)} at step {step:,}"
        parts.append(f'<circle class="best" {at} r="5" stroke-width="2"><title>{text}</title></circle>')
    return "".join([*parts, "</g>"])


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    command, parts = "M", []
    for place in places:
        if place is not None:
            parts.append(f"{command}{place[0]:.1f} {place[1]:.1f}")
        command = "M" if place is None else "L"
    return "".join(parts)


def _vertical(axis: Horizontal, mark: Mark, color: str = "currentColor") -> str:
    if not 0 <= axis.share(mark.step) <= 1:
        return ""
    x = _x(axis.share(mark.step))
    anchor = "middle" if len(mark.label) < 8 else "end" if x > WIDTH / 2 else "start"
    label = _text(x, TOP - 3, mark.label, anchor, f'font-size="9" stroke="none" fill="{color}"')
    long = TALL if mark.label else 6  # many resumes would hide the curves
    line = f'<path d="M{x:.1f} {TOP}v{long}" stroke-dasharray="2 3" stroke-opacity=".6"/>'
    return f'<g class="mark" stroke="{color}"><title>{_plain(mark.text)}</title>{line}{label}</g>'


def _data(panel: Panel, axis: Horizontal) -> dict[str, object]:
    """What the script needs: the axes, and of each line points and means."""
    lines = []
    for line in panel.lines:
        data = {"name": visible(line.label, keep=""), "points": _numbers(line.points)}
        lines.append(data if line.dots or line.means is None else data | {"means": _numbers(line.means)})
    plot = {"first": axis.first, "last": axis.last, "low": panel.low, "high": panel.high, "log": panel.log}
    return {**plot, "share": panel.share, "box": [LEFT, TOP, INNER, TALL], "lines": lines}


def _numbers(points: Points) -> list[list[float | None]]:
    steps, values = points
    return [list(steps), [float(f"{value:.5g}") if value == value else None for value in values]]


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{_plain(text)}</text>'


def _plain(text: str) -> str:
    return escape(visible(text, keep=""))


def _x(share: float) -> float:
    return LEFT + share * INNER


def _y(height: float) -> float:
    return TOP + (1 - min(1.02, max(-0.02, height))) * TALL
