"""Pictures of models whose outputs are masks, boxes, tokens or images, from plain arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dist_train.pages.figures import Image, Section, dress, new_figure, picture_png, plain, render
from dist_train.text import format_number

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Array = numpy.ndarray[Any, Any]

TRUE, PREDICTED = "#2a9d5c", "#e4572e"
UNLABELED = (0.85, 0.86, 0.88)  # of pixels that don't count
LISTED = 40  # classes whose IoU is drawn at most: the worst ones
WORDS = 48  # tokens of a sample in the table at most


@dataclass
class MaskSample:
    """One image with the class of each pixel, (H, W) int64 each, and the true one, -1 where it doesn't count."""

    index: int
    truth: Array
    prediction: Array
    picture: Array | None = None


@dataclass
class Masks:
    """Segmentation: counts (C, C) of pixels, one row per true class, one column per predicted one; and some samples."""

    counts: Array
    classes: Sequence[str]
    samples: Sequence[MaskSample]

    @property
    def iou(self) -> Array:
        """(C,): intersection over union of each class; nan for one that occurs in neither."""
        import numpy

        hits = numpy.diag(self.counts).astype(float)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return numpy.where(union > 0, hits / numpy.maximum(union, 1), numpy.nan)

    def sections(self) -> Iterator[Section]:
        yield Section("IoU per class", [Image("IoU of each class", render(draw_iou(self), "svg"))], "")
        colors = colors_of(len(self.classes))
        shown = [
            Image(f"sample {one.index} with its masks", render(draw_mask(one, colors), "png"), "png")
            for one in self.samples
        ]
        yield Section(
            "Masks",
            [*shown, Image("colors of the classes", render(draw_legend(self), "svg"))] if shown else [],
            "panels",
        )


@dataclass
class BoxSample:
    """One image with boxes (n, 4) as x1, y1, x2, y2 in pixels and their labels; scores (n,) where they are predicted."""

    index: int
    picture: Array | None
    truth: tuple[Array, Sequence[str]]
    prediction: tuple[Array, Sequence[str], Array]


@dataclass
class Boxes:
    """Detection: some samples, with the predictions whose score is at least `threshold`."""

    samples: Sequence[BoxSample]
    threshold: float

    def sections(self) -> Iterator[Section]:
        legend = f"true: green, solid; predicted: orange, dashed, with a score of at least {self.threshold:g}"
        shown = [
            Image(f"sample {one.index} with its boxes", render(draw_boxes(one), "png"), "png") for one in self.samples
        ]
        yield Section("Boxes", [*shown, Image("", b"", "png", legend)], "panels")


@dataclass
class TokenSample:
    """One sequence: the loss of each token (T,), nan where it doesn't count, with the tokens as text."""

    index: int
    losses: Array
    truth: Sequence[str]
    prediction: Sequence[str]


@dataclass
class Tokens:
    """Language: the mean loss at each position (T,), over all samples, and some samples."""

    by_position: Array
    samples: Sequence[TokenSample]
    separator: str = " "

    def sections(self) -> Iterator[Section]:
        import numpy

        images = [Image("loss by position", render(draw_positions(self), "svg"))]
        images.append(Image("loss of each token", render(draw_token_losses(self), "svg")))
        yield Section("Loss per token", images, "panels")
        table = []
        for one in self.samples:
            counted = one.losses[numpy.isfinite(one.losses)]
            mean = format_number("loss", float(counted.mean())) if counted.size else ""
            table.append((str(one.index), *(self._text(words) for words in (one.truth, one.prediction)), mean))
        yield Section("Tokens", table, "table", ("sample", "true", "most likely", "loss per token"))

    def _text(self, words: Sequence[str]) -> str:
        return self.separator.join(words[:WORDS]) + (" ..." if len(words) > WORDS else "")


@dataclass
class Grids:
    """Images that a model gives: as training progressed, and at its end beside the true ones; each a grid as one image.

    frames: (step, (H, W) or (H, W, 3) uint8), in the order of steps.
    """

    outputs: Array
    targets: Array
    frames: Sequence[tuple[int, Array]] = field(default_factory=list)

    def sections(self) -> Iterator[Section]:
        pair = [("true", self.targets), ("outputs", self.outputs)]
        images = [Image(name, picture_png(grid, side=320, most=640), "png", name) for name, grid in pair]
        yield Section("Outputs of the model", images, "panels")
        stills = sorted({round(k * (len(self.frames) - 1) / 5) for k in range(6)}) if self.frames else []
        over_time = [self.frames[k] for k in stills]
        shown = [
            Image(f"step {s}", picture_png(grid, side=320, most=640), "png", f"step {s:,}") for s, grid in over_time
        ]
        yield Section("Outputs during training", shown, "panels")


def colors_of(count: int) -> Array:
    """(count, 3): a color for each class in [0, 1]; the first, often the background, is dark."""
    import numpy
    from matplotlib import colormaps

    found = [colormaps["tab20"](k % 20)[:3] for k in range(0, 20, 2)] + [
        colormaps["tab20"](k)[:3] for k in range(1, 20, 2)
    ]
    if count > len(found) + 1:
        found = [colormaps["hsv"](k / count)[:3] for k in range(count)]
    return numpy.array([(0.12, 0.16, 0.22), *found])[:count]


def draw_iou(masks: Masks) -> Figure:
    """A bar for each class, with the mean over the classes that occur."""
    import numpy

    iou = masks.iou
    order = [k for k in numpy.argsort(iou, kind="stable") if numpy.isfinite(iou[k])][:LISTED]
    kept = sorted(order) if len(iou) <= LISTED else order
    figure = new_figure(5.6, 1.2 + 0.26 * len(kept))
    axis = figure.subplots()
    axis.barh(range(len(kept)), iou[kept], color=[tuple(color) for color in colors_of(len(iou))[kept]])
    axis.set_yticks(range(len(kept)), [plain(masks.classes[k]) for k in kept], fontsize=8)
    for row, k in enumerate(kept):
        axis.text(iou[k] + 0.01, row, f"{iou[k]:.3f}", va="center", fontsize=8, color="#1f2937")
    which = f", the {LISTED} lowest of {numpy.isfinite(iou).sum()}" if len(iou) > LISTED else ""
    mean = numpy.nanmean(iou) if kept else numpy.nan
    dress(axis, f"IoU of each class{which}; mean {mean:.4f}", "")
    axis.set_xlim(0, 1.12)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    return figure


def draw_mask(sample: MaskSample, colors: Array) -> Figure:
    """The image, the true classes, the predicted ones beside each other; `colors` (C, 3) of the classes."""
    parts = [(sample.picture, f"sample {sample.index}"), (_colored(sample.truth, colors), "true")]
    parts += [(_colored(sample.prediction, colors), "predicted")]
    parts = [(picture, title) for picture, title in parts if picture is not None]
    height, width = sample.truth.shape
    figure = new_figure(1.9 * len(parts), 0.3 + min(4.0, 1.9 * height / width))
    for (picture, title), axis in zip(parts, figure.subplots(1, len(parts)), strict=True):
        _show(axis, picture, title)
    return figure


def draw_legend(masks: Masks) -> Figure:
    """Which color is which class, of those that occur in the samples."""
    from matplotlib.patches import Patch

    colors = colors_of(len(masks.classes))
    both = [part for one in masks.samples for part in (one.truth, one.prediction)]
    present = sorted({int(k) for part in both for k in set(part.flat)})
    patches = [
        Patch(
            color=tuple(colors[k]) if k >= 0 else UNLABELED,
            label=plain(masks.classes[k]) if k >= 0 else "doesn't count",
        )
        for k in present
    ]
    columns = min(5, len(patches))
    figure = new_figure(1.5 * columns, 0.28 * -(-len(patches) // columns) + 0.15)
    figure.legend(handles=patches, loc="center", ncols=columns, fontsize=8.5, frameon=False)
    return figure


def _colored(classes: Array, colors: Array) -> Array:
    import numpy

    return numpy.concatenate([colors, [UNLABELED]])[classes]


def _show(axis: Axes, picture: Array | None, title: str) -> None:
    axis.set_axis_off()
    axis.set_title(title, fontsize=8, color="#6b7280")
    if picture is not None:
        size: dict[str, Any] = {
            "extent": (0, picture.shape[1], picture.shape[0], 0)
        }  # a box's coordinates are edges of pixels
        gray: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 255 if picture.dtype.kind == "u" else 1}
        axis.imshow(picture.squeeze(), interpolation="nearest", **size, **(gray if picture.squeeze().ndim == 2 else {}))


def draw_boxes(sample: BoxSample) -> Figure:
    """An image with true boxes and predicted ones."""
    figure = new_figure(3.6, 3.8)
    axis = figure.subplots()
    _show(axis, sample.picture, f"sample {sample.index}")
    (true, true_labels), (found, labels, scores) = sample.truth, sample.prediction
    _add_boxes(axis, true, true_labels, TRUE, "-", "bottom")
    _add_boxes(axis, found, [f"{label} {score:.2f}" for label, score in zip(labels, scores)], PREDICTED, "--", "top")
    if sample.picture is None:
        axis.autoscale_view()
        axis.invert_yaxis()
    return figure


def _add_boxes(axis: Axes, corners: Array, labels: Sequence[str], color: str, line: str, side: str) -> None:
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"fill": False, "edgecolor": color, "linestyle": line, "linewidth": 1.8}
    behind = {"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.85}
    for (x1, y1, x2, y2), label in zip(corners, labels, strict=True):
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))
        y = y1 if side == "bottom" else y2
        axis.text(x1, y, plain(label), va=side, fontsize=7, color="white", bbox=behind, clip_on=True)


def draw_positions(tokens: Tokens) -> Figure:
    """The mean loss over the position in the sequence."""
    figure = new_figure(5.2, 3.2)
    axis = figure.subplots()
    axis.plot(range(len(tokens.by_position)), tokens.by_position, color="#4c78a8", linewidth=1.6)
    dress(axis, "mean loss by position", "token")
    return figure


def draw_token_losses(tokens: Tokens) -> Figure:
    """The loss of each token of the shown samples, one row per sample."""
    import numpy

    longest = max((len(one.losses) for one in tokens.samples), default=1)
    grid = numpy.full((max(1, len(tokens.samples)), longest), numpy.nan)
    for row, one in enumerate(tokens.samples):
        grid[row, : len(one.losses)] = one.losses
    figure = new_figure(5.2, 3.2)
    axis = figure.subplots()
    image = axis.imshow(grid, cmap="viridis", aspect="auto", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axis)
    dress(axis, "loss of each token", "token")
    axis.grid(False)
    axis.set_yticks(range(len(tokens.samples)), [f"sample {one.index}" for one in tokens.samples], fontsize=8)
    return figure
