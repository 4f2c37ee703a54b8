"""The pictures of a report: the kept model's predictions on data that it wasn't trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from dist_train.building.prepare import eval_loader
from dist_train.config.errors import visible
from dist_train.data.reading import attribute_of
from dist_train.data.stream import is_stream
from dist_train.evaluation.evaluate import in_rounds, on_rank_zero
from dist_train.evaluation.meaning import Meaning, read_meaning
from dist_train.evaluation.predict import Predicted, predict_batch
from dist_train.pages.figures import Boundary, Confusion, Example, Picture, Regression, write_boundary
from dist_train.pages.page import write_page
from dist_train.runtime.rundir import RunDir
from dist_train.task.batch import clone_batch, squeeze_column
from dist_train.views.boundary import FOLDER, around, classes_on, plane, read_frames
from dist_train.views.collect import Collector, Shown, collector_for, sample_picture
from dist_train.views.grids import FOLDER as GRIDS
from dist_train.views.grids import read_grids

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.data.loader import EvalLoader
    from dist_train.evaluation.evaluate import Evaluator

SAMPLES = 20_000  # predicted at most, spread evenly over the dataset
WORST, DOTS, TARGETS, FRAMES = 24, 2000, 4, 10  # shown at most: errors, points and targets of a regression, boundaries


def make_report(
    run: RunDir,
    config: Config,
    evaluator: Evaluator,
    loader: EvalLoader | None,
    step: int,
    record: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Path | None:
    """Write report.html with pictures; all ranks call it, rank 0 writes it and returns its path. Never raises.

    Args:
        loader: what the pictures are of; None for none.
        step: that of the model.
        record: `versions`, `host`, `commit`: what a manifest holds.
        warn: called with a line for whatever couldn't be shown.
    """
    pictures: list[Picture] = []
    try:
        if loader is not None:
            pictures = pictures_of(run, config, evaluator, loader, step)
    except Exception as error:
        warn(f"the report has no pictures: {type(error).__name__}: {error}")
    if not evaluator.world.is_main:
        return None
    try:
        device = evaluator.world.device
        environment = {name: str(version) for name, version in dict(record.get("versions") or {}).items()}
        environment |= {name: str(record[name]) for name in ("host", "commit") if record.get(name)}
        environment["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        environment["precision"] = evaluator.precision.name
        return write_page(run, pictures=pictures, environment=environment)
    except Exception as error:
        warn(f"there is no report.html: {type(error).__name__}: {error}")
        return None


def pictures_of(run: RunDir, config: Config, evaluator: Evaluator, loader: EvalLoader, step: int) -> list[Picture]:
    """The pictures on rank 0, [] on the other ranks; a collective."""
    world, dataset = evaluator.world, loader.dataset
    where: Any = range(loader.plan.length)
    mine: Collector | TableCollector | None = None
    problem = ""
    try:  # a rank that fails still joins the all_gather
        if len(where) > SAMPLES:
            if is_stream(dataset):
                return []
            where = _spread(len(where), SAMPLES)
            loader = eval_loader(config, world, Subset(dataset, where.tolist()))
        mine = _collected(evaluator, loader)
    except Exception as error:
        problem = f"rank {world.rank}: {type(error).__name__}: {error}"
    every = on_rank_zero(world, (mine, problem))
    if not world.is_main:
        return []
    if any(problem for _, problem in every):
        raise RuntimeError("; ".join(problem for _, problem in every if problem))
    if mine is None:  # rank 0 always has the first eval batch
        return []
    for other, _ in every[1:]:
        if other is not None:
            mine.merge(other)
    if isinstance(mine, TableCollector):
        return _of_table(run, evaluator, mine, dataset, where, step)
    return mine.pictures(Shown(dataset, where, evaluator.seed, read_grids(run.path(GRIDS))))


def _collected(evaluator: Evaluator, loader: EvalLoader) -> Collector | TableCollector | None:
    """What this rank's eval batches give: predictions where they are a table, else the outputs of the evaluation."""
    found: Collector | TableCollector | None = None
    with evaluator.serving():
        for samples, batch in filter(None, in_rounds(loader)):
            if found is None:
                found = _collector(evaluator, samples, clone_batch(batch), loader.plan.length)
            if found is None:
                return None
            if isinstance(found, TableCollector):
                found.add(predict_batch(evaluator, samples, batch))
            else:
                found.add(samples, *evaluator.seen(evaluator.forward(samples, batch)))
    return found


def _collector(evaluator: Evaluator, samples: range, batch: Any, length: int) -> Collector | TableCollector | None:
    if _is_table(predict_batch(evaluator, samples, clone_batch(batch))):
        return TableCollector()
    return collector_for(evaluator, *evaluator.seen(evaluator.forward(samples, batch)), length)


def _is_table(part: Predicted) -> bool:
    """Whether outputs and targets are (n,) or (n, k)."""
    pair = [part.outputs, part.targets]
    return all(isinstance(value, Tensor) and value.dim() in (1, 2) and len(value) == part.samples for value in pair)


class TableCollector:
    """Predictions and targets that are (n,) or (n, k), with the position of the first of each part."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, part: Predicted) -> None:
        """An eval batch."""
        self.parts.append((part.start, squeeze_column(part.outputs), squeeze_column(part.targets)))

    def merge(self, other: TableCollector) -> None:
        """What another rank has collected."""
        self.parts += other.parts


def _of_table(
    run: RunDir, evaluator: Evaluator, table: TableCollector, dataset: Any, where: Any, step: int
) -> list[Picture]:
    parts = sorted(table.parts, key=lambda part: part[0])
    outputs, targets = (torch.cat([part[k] for part in parts]) for k in (1, 2))  # type: ignore[misc]
    meaning = read_meaning(evaluator, outputs)
    if meaning.kind == "values":
        return list(_regressions(meaning.predictions(outputs), targets, dataset))
    shown: list[Picture] = [_confusion(evaluator, meaning, outputs, meaning.truths(targets), dataset, where)]
    boundary = _boundary(run, evaluator, dataset, step)
    return shown if boundary is None else [*shown, boundary]


def _spread(length: int, most: int) -> np.ndarray[Any, Any]:
    """At most that many indices, evenly spaced over all."""
    return np.linspace(0, length - 1, min(most, length)).round().astype(np.int64)


def _confusion(
    evaluator: Evaluator, meaning: Meaning, outputs: Tensor, truths: Tensor, dataset: Any, where: Any
) -> Confusion:
    predictions = meaning.predictions(outputs)
    names = [visible(str(name), keep="") for name in attribute_of(dataset, "classes") or []]
    known = outputs.shape[1] if meaning.kind == "classes" else 2
    count = max(len(names), known, int(truths.max()) + 1, int(predictions.max()) + 1)
    names += [str(k) for k in range(len(names), count)]
    counted = truths >= 0  # ignore_index is negative
    pairs = (truths * count + predictions)[counted]
    counts = torch.bincount(pairs, minlength=count * count).reshape(count, count).numpy()
    worst: list[Example] = []
    if meaning.kind != "labels":
        likely = meaning.probabilities(outputs)
        likely = likely.max(1).values if likely.dim() == 2 else torch.where(predictions == 1, likely, 1 - likely)
        wrong = torch.nonzero(counted & (predictions != truths)).flatten()
        for k in wrong[likely[wrong].argsort(descending=True, stable=True)][:WORST].tolist():
            index, picture = int(where[k]), sample_picture(evaluator.seed, dataset, int(where[k]))
            worst.append(Example(index, names[truths[k]], names[predictions[k]], float(likely[k]), picture))
    return Confusion(counts, names, worst)


def _regressions(outputs: Tensor, targets: Tensor, dataset: Any) -> list[Regression]:
    if outputs.shape != targets.shape:
        return []
    original = attribute_of(dataset, "original_units")
    if original is not None:
        outputs, targets = original(outputs), original(targets)
    kept = _spread(len(outputs), DOTS)
    columns = [(outputs, targets)] if outputs.dim() == 1 else list(zip(outputs.T, targets.T, strict=True))[:TARGETS]
    names = [visible(str(name), keep="") for name in attribute_of(dataset, "targets_named") or []]
    return [
        Regression(truth.numpy()[kept], guess.numpy()[kept], names[k] if k < len(names) else "target")
        for k, (guess, truth) in enumerate(columns)
    ]


def _boundary(run: RunDir, evaluator: Evaluator, dataset: Any, step: int) -> Boundary | None:
    """The boundaries recorded during training, else the final model's; also written as PNGs and a GIF."""
    points = plane(dataset)
    if points is None:
        return None
    kept = read_frames(run.path(FOLDER), FRAMES)
    if kept is None:
        extent = around(points[0])
        classes = classes_on(evaluator, extent)
        if classes is None:
            return None
        kept = extent, [(step, classes)]
    boundary = Boundary(*points, *kept)
    write_boundary(boundary, run.path(FOLDER))
    return boundary
