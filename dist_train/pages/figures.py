"""Pictures of what a model does, from plain arrays: confusion matrix, predicted against true, decision boundary."""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dist_train.config.errors import visible
from dist_train.pages.charts import matrix

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED = 20  # maximum number of classes for which a confusion matrix shows its counts


@dataclass(frozen=True)
class Image:
    """An image inside the page; without data only its caption."""

    alt: str
    data: bytes
    kind: str = "svg+xml"
    caption: str = ""

    @property
    def uri(self) -> str:
        """Its data URI."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Cell:
    """A cell of a table. value: what the table is sorted by, where it isn't the text. note: said under the pointer. run: whose
    curves a box in the cell shows and hides."""

    text: str
    value: float | str | None = None
    best: bool = False
    note: str = ""
    run: str = ""
    checked: bool = True


@dataclass(frozen=True)
class Section:
    """A title and the content below it; without content it is left out.

    layout: "text" (content is a string), "table" or "sorts" (rows of texts and Cells), "charts" or "drawn" (HTML of our own), or
    of images the CSS class of their grid, "" for none. more: title and text of what is folded below it. note: beside the tools.
    """

    title: str
    content: Sequence[Any]
    layout: str
    head: Sequence[str] = ()
    more: tuple[str, str] | None = None
    note: str = ""


@dataclass
class Example:
    """One sample that the model got wrong.

    picture: (H, W) or (H, W, 3), uint8 or float in [0, 1], or None where the input isn't a picture. probability: what
    the model gave its prediction.
    """

    index: int
    truth: str
    prediction: str
    probability: float
    picture: numpy.ndarray[Any, Any] | None = None


@dataclass
class Confusion:
    """Classification: counts (C, C), one row per true class, one column per predicted one; and the worst errors."""

    counts: numpy.ndarray[Any, Any]
    classes: Sequence[str] = ()
    worst: Sequence[Example] = ()

    def sections(self) -> Iterator[Section]:
        yield Section("Confusion matrix", [self.drawn()], "drawn")
        worst = [
            Image(
                f"sample {one.index}",
                picture_png(one.picture) if one.picture is not None else b"",
                "png",
                f"{one.truth} taken for {one.prediction}, {one.probability:.0%}; sample {one.index}",
            )
            for one in self.worst
        ]
        yield Section("Most wrong", worst, "worst")

    def drawn(self) -> str:
        """The matrix as SVG: shares of each true class, with the counts where they are readable."""
        import numpy

        counts = numpy.asarray(self.counts)
        names = [visible(str(name), keep="") for name in self.classes] or [str(i) for i in range(len(counts))]
        shares = counts / numpy.maximum(1, counts.sum(axis=1, keepdims=True))
        blue = numpy.broadcast_to(numpy.array([0x4C, 0x78, 0xA8], numpy.uint8), (*counts.shape, 3))
        pixels = numpy.dstack([blue, (shares * 255).round().astype(numpy.uint8)])
        readable = len(counts) <= NUMBERED
        cells = [(row, column, int(count)) for (row, column), count in numpy.ndenumerate(counts) if count and readable]
        inside = [(row, column, f"{count}", bool(shares[row, column] > 0.5)) for row, column, count in cells]
        return matrix(_png(pixels), names, inside)


@dataclass
class Regression:
    """Regression: true and predicted values, (N,) each, in original units."""

    truth: numpy.ndarray[Any, Any]
    prediction: numpy.ndarray[Any, Any]
    name: str = "target"

    def sections(self) -> Iterator[Section]:
        image = Image("predicted over true", render(draw_regression(self), "svg"))
        yield Section("Predicted against true", [image], "")


@dataclass
class Boundary:
    """Two-dimensional inputs: points (N, 2), their labels (N,), and the predicted class on a grid as training progressed.

    extent: (x0, x1, y0, y1) of the grid. frames: (step, classes (H, W) with row 0 at y0), in the order of steps.
    """

    points: numpy.ndarray[Any, Any]
    labels: numpy.ndarray[Any, Any]
    extent: tuple[float, float, float, float]
    frames: Sequence[tuple[int, numpy.ndarray[Any, Any]]]

    @functools.cached_property
    def pngs(self) -> list[bytes]:
        """Each frame as a PNG."""
        return [render(draw_boundary(self, step, classes), "png") for step, classes in self.frames]

    def sections(self) -> Iterator[Section]:
        stills = sorted({round(k * (len(self.pngs) - 1) / 3) for k in range(4)})
        frames = [Image("the decision boundary during training", boundary_gif(self), "gif")]
        frames += [Image(f"boundary, frame {i}", self.pngs[i], "png") for i in stills]
        yield Section("Decision boundary", frames, "panels")


class Picture(Protocol):
    """What a report shows of a model, as sections of the page."""

    def sections(self) -> Iterator[Section]:
        """Titles with their images or tables."""


def draw_regression(regression: Regression) -> Figure:
    """Predicted over true values, with the line on which a perfect model lies."""
    import numpy

    truth, prediction = numpy.ravel(regression.truth), numpy.ravel(regression.prediction)
    figure = new_figure(5.2, 5.0)
    axis = figure.subplots()
    axis.scatter(truth, prediction, s=14, color="#4c78a8", alpha=0.6, linewidth=0)
    both = numpy.concatenate([truth, prediction])
    both = both[numpy.isfinite(both)]
    ends = (both.min(), both.max()) if both.size else (0.0, 1.0)
    axis.plot(ends, ends, color="#e4572e", linewidth=1.2)
    dress(axis, f"{regression.name}: predicted over true", "true")
    axis.set_ylabel("predicted", fontsize=9)
    axis.locator_params(integer=False)
    return figure


def draw_boundary(boundary: Boundary, step: int, classes: numpy.ndarray[Any, Any]) -> Figure:
    """The points on the classes that the model predicted at a step."""
    import numpy

    figure = new_figure(5.0, 4.4)
    axis = figure.subplots()
    pairs: dict[str, Any] = {"cmap": "tab20", "vmin": -0.5, "vmax": 19.5}  # ten colors, each dark and light
    light, dark = numpy.asarray(classes) % 10 * 2 + 1, numpy.asarray(boundary.labels) % 10 * 2
    axis.imshow(
        light, extent=boundary.extent, origin="lower", aspect="auto", alpha=0.6, interpolation="nearest", **pairs
    )
    x, y = numpy.asarray(boundary.points).T
    axis.scatter(x, y, c=dark, s=16, edgecolor="white", linewidth=0.4, **pairs)
    dress(axis, f"step {step:,}", "")
    axis.set_xlim(boundary.extent[:2])
    axis.set_ylim(boundary.extent[2:])
    return figure


def boundary_gif(boundary: Boundary, milliseconds: int = 400) -> bytes:
    """All frames as an animated GIF; the last one stays three times as long."""
    from PIL import Image

    frames = [Image.open(io.BytesIO(png)).convert("RGB") for png in boundary.pngs]
    out = io.BytesIO()
    times = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return out.getvalue()


def write_boundary(boundary: Boundary, folder: str | os.PathLike[str]) -> None:
    """boundary-STEP.png for each frame, and boundary.gif."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)  # whose own directory, if it is gone, isn't brought back
    for (step, _), png in zip(boundary.frames, boundary.pngs, strict=True):
        (folder / f"boundary-{step:08d}.png").write_bytes(png)
    (folder / "boundary.gif").write_bytes(boundary_gif(boundary))


def _png(array: numpy.ndarray[Any, Any]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def picture_png(picture: numpy.ndarray[Any, Any], side: int = 112, most: int = 224) -> bytes:
    """A picture as a PNG, small ones enlarged without smoothing to about `side` pixels, large ones made smaller than `most`."""
    import numpy
    from PIL import Image

    array = numpy.asarray(picture)
    if array.dtype != numpy.uint8:
        array = (numpy.nan_to_num(array).clip(0, 1) * 255).round().astype(numpy.uint8)
    image = Image.fromarray(array.squeeze())
    times = max(1, side // max(image.size))
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((most, most))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


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
