"""The decision boundary of models with two-dimensional inputs, recorded at evaluations to show how it moves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dist_train.data.stream import is_stream
from dist_train.evaluation.meaning import read_meaning
from dist_train.files import replacing
from dist_train.task.batch import squeeze_column
from dist_train.task.task import scores_of
from dist_train.training.callbacks import Callback

if TYPE_CHECKING:
    from dist_train.evaluation.evaluate import Evaluator
    from dist_train.training.callbacks import Training

Array = np.ndarray[Any, Any]
Extent = tuple[float, float, float, float]
FOLDER = "boundary"
SIDE = 100  # of the grid of inputs, in points
POINTS = 1000  # of the dataset, drawn at most
GROWTH = 1.1  # ratio of the steps of successive frames: their number stays logarithmic


class BoundaryFrames(Callback):
    """Records the predictions on a grid in the run's `boundary/`, where inputs are points in a plane.

    On rank 0 only, in eval mode, without random draws: training is bitwise identical with it and without.
    """

    def __init__(self, folder: Path, dataset: Any, evaluator: Evaluator) -> None:
        self._folder, self._dataset, self._evaluator = folder / FOLDER, dataset, evaluator
        self._extent: Extent | None = None
        self._on = True

    def on_evaluation_end(self, trainer: Training, metrics: dict[str, float]) -> None:
        """Record a frame if one is due."""
        if not self._on or trainer.config.trainer.compile:  # it would be recompiled for the size of the grid
            return
        try:
            self._on = self._keep(trainer)
        except Exception as error:  # a missing picture is no reason to end a run
            self._on = False
            logging.getLogger("dist_train").warning("no decision boundary: %s: %s", type(error).__name__, error)

    def _keep(self, trainer: Training) -> bool:
        """Record a frame; False where there is no boundary to draw."""
        if self._extent is None:
            points = plane(self._dataset)
            if points is None:
                return False
            self._extent = around(points[0])
        folder = self._folder
        before = [step for step in kept_steps(folder) if step < trainer.step]
        if before and trainer.step < GROWTH * before[-1]:
            return True
        classes = classes_on(self._evaluator, self._extent)
        if classes is None:
            return False
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"step-{trainer.step:08d}.npz") as part, open(part, "wb") as file:
            np.savez_compressed(file, classes=classes, extent=np.array(self._extent))
        return True


def plane(dataset: Any) -> tuple[Array, Array] | None:
    """The first points (N, 2) of a dataset and their labels (N,); None if its samples aren't labeled points."""
    if is_stream(dataset) or not len(dataset):
        return None
    sample = dataset[0]
    if not isinstance(sample, tuple | list) or len(sample) != 2 or not isinstance(sample[0], torch.Tensor):
        return None
    if sample[0].shape != (2,) or not sample[0].is_floating_point():
        return None
    samples = [sample, *(dataset[k] for k in range(1, min(len(dataset), POINTS)))]
    return torch.stack([point for point, _ in samples]).numpy(), np.array([round(float(t)) for _, t in samples])


def around(points: Array) -> Extent:
    """(x0, x1, y0, y1) of all points, with a margin."""
    low, high = points.min(axis=0), points.max(axis=0)
    room = 0.15 * np.maximum(high - low, 1e-6)
    (x0, y0), (x1, y1) = (low - room).tolist(), (high + room).tolist()
    return x0, x1, y0, y1


def classes_on(evaluator: Evaluator, extent: Extent) -> Array | None:
    """The predicted class on a grid, (SIDE, SIDE) uint8 with row 0 at y0; None for a model that gives values."""
    x0, x1, y0, y1 = extent
    y, x = torch.meshgrid(torch.linspace(y0, y1, SIDE), torch.linspace(x0, x1, SIDE), indexing="ij")
    grid = torch.stack([x.reshape(-1), y.reshape(-1)], dim=1).to(evaluator.world.device)
    with evaluator.serving():
        outputs = scores_of(evaluator.task, evaluator.task.predict(evaluator.model, grid))
        outputs = squeeze_column(outputs.float().cpu())
    meaning = read_meaning(evaluator, outputs)
    if meaning.kind not in ("classes", "binary"):
        return None
    return meaning.predictions(outputs).reshape(SIDE, SIDE).numpy().astype(np.uint8)


def kept_steps(folder: Path) -> list[int]:
    """Steps of the recorded frames, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.npz"))


def read_frames(folder: Path, most: int) -> tuple[Extent, Sequence[tuple[int, Array]]] | None:
    """The extent and at most `most` frames (step, classes), spread over all recorded ones; None without any."""
    steps = kept_steps(folder)
    frames, extent = [], (0.0, 1.0, 0.0, 1.0)
    for step in sorted({steps[round(k)] for k in np.linspace(0, len(steps) - 1, min(most, len(steps)))}):
        with np.load(folder / f"step-{step:08d}.npz", allow_pickle=False) as archive:
            frames.append((step, archive["classes"]))
            extent = tuple(archive["extent"].tolist())
    return (extent, frames) if frames else None
