"""The images that a generative model makes, recorded at evaluations to show how they change."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_train.building.prepare import first_samples
from dist_train.data.stream import is_stream
from dist_train.evaluation.meaning import declared
from dist_train.files import replacing
from dist_train.runtime.seeding import seed_forward, seed_sample, undisturbed_generators
from dist_train.task.batch import in_full_precision
from dist_train.training.callbacks import Callback
from dist_train.views.boundary import GROWTH, kept_steps
from dist_train.views.collect import IMAGES, GridCollector, collector_for
from dist_train.views.network import pictures

if TYPE_CHECKING:
    from dist_train.evaluation.evaluate import Evaluator
    from dist_train.training.callbacks import Training

Array = np.ndarray[Any, Any]
FOLDER = "grids"


class GridFrames(Callback):
    """Records what a task that declares `gives_images = True` gives for the first samples, in the run's `grids/`.

    What its `generated(model, batch)` makes, where it has that, else the outputs of its `evaluate` (else `step`); under one seed:
    a generator's noise is the same each time. On rank 0 only, in eval mode, with all states restored: training is bitwise
    identical with it and without. So such a task must call no collective.
    """

    def __init__(self, folder: Path, dataset: Any, evaluator: Evaluator) -> None:
        self._folder, self._dataset, self._evaluator = folder / FOLDER, dataset, evaluator
        self._on = declared(evaluator.task, "gives_images") is True and not is_stream(dataset)

    def on_evaluation_end(self, trainer: Training, metrics: dict[str, float]) -> None:
        """Record a frame if one is due."""
        if not self._on or trainer.config.trainer.compile:  # it would be recompiled for this number of samples
            return
        try:
            self._keep(trainer)
        except Exception as error:  # a missing picture is no reason to end a run
            self._on = False
            logging.getLogger("dist_train").warning("no images over time: %s: %s", type(error).__name__, error)

    def _images(self, samples: range, batch: Any) -> tuple[Any, Any]:
        """What is shown, and targets of the same form, on the CPU."""
        evaluator = self._evaluator
        output = evaluator.forward(samples, batch)
        generated = declared(evaluator.task, "generated")
        if generated is not None:
            seed_forward(evaluator.seed, 0, 0, evaluator.world.device)
            with evaluator.precision.autocast():
                images = generated(evaluator.model, evaluator.prepare(batch))
            output = output if images is None else replace(output, outputs=in_full_precision(images))
        return evaluator.seen(output)

    def _keep(self, trainer: Training) -> None:
        before = [step for step in kept_steps(self._folder) if step < trainer.step]
        if before and trainer.step < GROWTH * before[-1]:
            return
        count = min(IMAGES, len(self._dataset))
        with undisturbed_generators(), self._evaluator.serving():
            seed_sample(trainer.config.seed, -1, 0)
            batch = first_samples(trainer.config, self._dataset, count)
            outputs, targets = self._images(range(count), batch)
        if not isinstance(collector_for(self._evaluator, outputs, targets, count), GridCollector):
            raise ValueError("the outputs aren't images (n, 1 or 3, height, width) as the targets are")
        self._folder.mkdir(exist_ok=True)
        with replacing(self._folder / f"step-{trainer.step:08d}.npz") as part, open(part, "wb") as file:
            np.savez_compressed(file, grid=pictures(outputs, color=True)[0])


def read_grids(folder: Path) -> list[tuple[int, Array]]:
    """(step, grid) of the recorded frames, in order."""
    frames = []
    for step in kept_steps(folder):
        with np.load(folder / f"step-{step:08d}.npz", allow_pickle=False) as archive:
            frames.append((step, archive["grid"]))
    return frames
