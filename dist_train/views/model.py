"""The pictures of a report: the kept model's predictions on data that it wasn't trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from dist_train.config.errors import visible
from dist_train.data.reading import attribute_of
from dist_train.data.stream import is_stream
from dist_train.runtime.rundir import RunDir
from dist_train.runtime.seeding import seed_sample
from dist_train.task.batch import squeeze_column
from dist_train.tracking.records import read_rows
from dist_train.training.evaluate import on_rank_zero
from dist_train.training.meaning import Meaning, read_meaning
from dist_train.training.predict import Predicted, predict
from dist_train.training.prepare import eval_loader
from dist_train.views.boundary import FOLDER, around, classes_on, plane, read_frames
from dist_train.views.curves import draw_curves
from dist_train.views.figures import Boundary, Confusion, Example, Picture, Regression, write_boundary
from dist_train.views.report import write_report

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.data.loader import EvalLoader
    from dist_train.training.evaluate import Evaluator

SAMPLES = 20_000  # predicted at most, spread evenly over the dataset
WORST, DOTS, TARGETS, FRAMES = 24, 2000, 4, 10  # shown at most: errors, points and targets of a regression, boundaries


def write_curves(run: RunDir) -> None:
    """Write curves.png from metrics.jsonl on rank 0. Never raises: a missing picture is no reason to fail."""
    try:
        draw_curves(read_rows(run.records() / "metrics.jsonl"), run.path("curves.png"), title=run.name)
        run.upload(("curves.png",))
    except Exception as error:
        logging.getLogger("dist_train").warning("there is no new curves.png: %s: %s", type(error).__name__, error)


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


def write_page(run: RunDir, **shown: Any) -> Path:
    """Write curves.png and report.html on rank 0; see `write_report`."""
    write_curves(run)
    run.check_owner()
    path = write_report(run.records(), **shown)
    run.upload((path.name,))
    return path


def pictures_of(run: RunDir, config: Config, evaluator: Evaluator, loader: EvalLoader, step: int) -> list[Picture]:
    """The pictures on rank 0, [] on the other ranks; a collective."""
    world, dataset = evaluator.world, loader.dataset
    where: Any = range(loader.plan.length)
    mine: list[tuple[int, Tensor, Tensor]] = []
    problem = ""
    try:  # a rank that fails still joins the all_gather
        if len(where) > SAMPLES:
            if is_stream(dataset):
                return []
            where = _spread(len(where), SAMPLES)
            loader = eval_loader(config, world, Subset(dataset, where.tolist()))
        found = [_table(part) for part in predict(evaluator, loader) if part is not None]
        mine = [part for part in found if part is not None]
    except Exception as error:
        problem = f"rank {world.rank}: {type(error).__name__}: {error}"
    every = on_rank_zero(world, (mine, problem))
    if not world.is_main:
        return []
    if any(problem for _, problem in every):
        raise RuntimeError("; ".join(problem for _, problem in every if problem))
    parts = sorted((part for theirs, _ in every for part in theirs), key=lambda part: part[0])
    if not parts:
        return []
    outputs, targets = (torch.cat([part[k] for part in parts]) for k in (1, 2))  # type: ignore[misc]
    meaning = read_meaning(evaluator, outputs)
    if meaning.kind == "values":
        return list(_regressions(meaning.predictions(outputs), targets, dataset))
    shown: list[Picture] = [_confusion(evaluator, meaning, outputs, meaning.truths(targets), dataset, where)]
    boundary = _boundary(run, evaluator, dataset, step)
    return shown if boundary is None else [*shown, boundary]


def _table(part: Predicted) -> tuple[int, Tensor, Tensor] | None:
    """The first index, outputs and targets, both (n,) or (n, k); None where they aren't."""
    pair = [part.outputs, part.targets]
    if not all(isinstance(value, Tensor) and value.dim() in (1, 2) and len(value) == part.samples for value in pair):
        return None
    return part.start, squeeze_column(part.outputs), squeeze_column(part.targets)


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
            index, picture = int(where[k]), _picture(evaluator.seed, dataset, int(where[k]))
            worst.append(Example(index, names[truths[k]], names[predictions[k]], float(likely[k]), picture))
    return Confusion(counts, names, worst)


def _picture(seed: int, dataset: Any, index: int) -> Any:
    """A sample's input as an image, rescaled to [0, 1] if it was normalized; None if it isn't an image."""
    if is_stream(dataset):
        return None
    seed_sample(seed, -1, index)  # as in evaluation
    sample = dataset[index]
    image = sample[0] if isinstance(sample, tuple | list) else sample
    if isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] in (1, 3):
        image = image.permute(1, 2, 0)
    elif not isinstance(image, Tensor) or image.dim() != 2:
        return None
    array = image.numpy()
    if array.dtype == np.uint8 or (array.min() >= 0 and array.max() <= 1):
        return array
    return (array - array.min()) / max(float(array.max() - array.min()), 1e-12)


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
