"""The pictures of a report: what the kept model says about data that it wasn't trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.config.errors import ConfigError
from dist_train.data.stream import is_stream
from dist_train.engine.boundary import FOLDER, around, classes_on, plane, read_frames
from dist_train.engine.predict import Meaning, Predicted, predict, read_meaning
from dist_train.engine.restore import attribute_of, eval_loader, open_run
from dist_train.engine.rundir import RunDir
from dist_train.runtime.here import MEETING, here
from dist_train.runtime.seeding import seed_sample
from dist_train.runtime.world import read_placement
from dist_train.tracking.figures import Boundary, Confusion, Example, Regression, write_boundary
from dist_train.tracking.report import Picture, write_report

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.data.loader import EvalLoader
    from dist_train.engine.evaluate import Evaluator
    from dist_train.engine.trainer import Trainer

SAMPLES = 20_000  # at most so many are asked about, spread evenly over the dataset
WORST, DOTS, TARGETS, FRAMES = 24, 2000, 4, 10  # shown at most: errors, points and targets of a regression, boundaries


def report_at_end(trainer: Trainer) -> None:
    """Write the report of a run that is completed, with the model as it stands; all ranks call it."""
    parts = trainer.parts
    loader = parts.eval_loaders.get("test") or parts.eval_loaders.get("val")
    make_report(parts.run, parts.config, parts.evaluator, loader, trainer.step, parts.record, parts.console.warn)


def report_again(location: str, checkpoint: str | None, overrides: Sequence[str]) -> Path | None:
    """Write the report of a run as it is now; its path on rank 0. Where its model can't be had, without pictures.

    Raises:
        ConfigError: there is no run, or what was asked for by name can't be had.
    """
    run = RunDir(location)
    is_main = read_placement(os.environ).rank == 0
    try:
        with open_run(location, checkpoint, overrides) as restored:
            loader = restored.loader(restored.split(None))
            meta, step = restored.found.meta, restored.found.step
            return make_report(run, restored.config, restored.evaluator, loader, step, meta, _warn if is_main else None)
    except (ConfigError, CheckpointError) as error:
        if checkpoint is not None or overrides or not run.storage.exists("config.yaml"):
            raise
        if is_main:
            _warn(f"the report has no pictures: {error}")
        return _written(run) if is_main else None


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def make_report(
    run: RunDir,
    config: Config,
    evaluator: Evaluator,
    loader: EvalLoader | None,
    step: int,
    record: Mapping[str, Any],
    warn: Callable[[str], None] | None,
) -> Path | None:
    """Write report.html with pictures; all ranks call it, rank 0 writes and gets its path. It raises nothing.

    Args:
        loader: what the pictures are of; None for none.
        step: that of the model.
        record: `versions`, `host`, `commit`: what a manifest holds.
        warn: takes a line when something couldn't be shown.
    """
    pictures: list[Picture] = []
    try:
        if loader is not None:
            pictures = pictures_of(run, config, evaluator, loader, step)
    except Exception as error:
        if warn is not None:
            warn(f"the report has no pictures: {type(error).__name__}: {error}")
    if not evaluator.world.is_main:
        return None
    try:
        return _written(run, pictures=pictures, environment=_environment(evaluator, record))
    except Exception as error:
        if warn is not None:
            warn(f"there is no report.html: {type(error).__name__}: {error}")
        return None


def _written(run: RunDir, **shown: Any) -> Path:
    path = write_report(run.records(), **shown)
    run.send(path.name)
    return path


def _environment(evaluator: Evaluator, record: Mapping[str, Any]) -> dict[str, str]:
    device = evaluator.world.device
    facts = {name: str(version) for name, version in dict(record.get("versions") or {}).items()}
    facts |= {name: str(record[name]) for name in ("host", "commit") if record.get(name)}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return facts | {"precision": evaluator.precision.name}


def pictures_of(run: RunDir, config: Config, evaluator: Evaluator, loader: EvalLoader, step: int) -> list[Picture]:
    """On rank 0; [] on the others."""
    world, dataset = evaluator.world, loader.dataset
    where: Any = range(loader.plan.length)
    mine: list[Predicted] = []
    problem = ""
    try:  # whatever fails on one rank: all of them come to the exchange
        if len(where) > SAMPLES:
            if is_stream(dataset):
                return []
            where = np.linspace(0, len(where) - 1, SAMPLES).round().astype(np.int64)
            loader = eval_loader(config, world, Subset(dataset, where.tolist()))
        mine = [part for part in predict(evaluator, loader) if part is not None]
    except ConfigError:
        pass  # outputs that are no table: there is nothing to show
    except Exception as error:
        problem = f"rank {world.rank}: {type(error).__name__}: {error}"
    every: list[Any] = [(mine, problem)]
    if world.size > 1:
        every = [None] * world.size
        here.phase = MEETING
        torch.distributed.gather_object((mine, problem), every if world.is_main else None, dst=0)
    if not world.is_main:
        return []
    if any(problem for _, problem in every):
        raise RuntimeError("; ".join(problem for _, problem in every if problem))
    parts = sorted((part for theirs, _ in every for part in theirs), key=lambda part: part.start)
    if not parts or any(part.targets is None for part in parts):
        return []
    outputs = torch.cat([part.outputs for part in parts])
    targets = torch.cat([part.targets for part in parts if part.targets is not None])
    meaning = read_meaning(evaluator, outputs, targets)
    if meaning.kind == "values":
        return list(_regressions(meaning.probabilities(outputs), targets, dataset))
    shown: list[Picture] = [_confusion(evaluator, meaning, outputs, meaning.truths(targets), dataset, where)]
    boundary = _boundary(run, evaluator, dataset, step)
    return shown if boundary is None else [*shown, boundary]


def _confusion(
    evaluator: Evaluator, meaning: Meaning, outputs: Tensor, truths: Tensor, dataset: Any, where: Any
) -> Confusion:
    predictions = meaning.predictions(outputs)
    classes = [str(name) for name in attribute_of(dataset, "classes") or []]
    counted = truths >= 0  # ignore_index is negative
    known = [len(classes), outputs.shape[1] if meaning.kind == "classes" else 2]
    count = max(*known, int(truths.max()) + 1, int(predictions.max()) + 1)
    pairs = (truths * count + predictions)[counted]
    counts = torch.bincount(pairs, minlength=count * count).reshape(count, count).numpy()
    worst = []
    if meaning.kind != "labels":
        likely = meaning.probabilities(outputs)
        likely = likely.max(1).values if likely.dim() == 2 else torch.where(predictions == 1, likely, 1 - likely)
        wrong = torch.nonzero(counted & (predictions != truths)).flatten()
        order = wrong[likely[wrong].argsort(descending=True, stable=True)][:WORST]
        for k in order.tolist():
            truth, guess = (classes[n] if n < len(classes) else str(n) for n in (int(truths[k]), int(predictions[k])))
            index = int(where[k])
            worst.append(Example(index, truth, guess, float(likely[k]), _picture(evaluator.seed, dataset, index)))
    return Confusion(counts, classes if len(classes) == count else [], worst)


def _picture(seed: int, dataset: Any, index: int) -> Any:
    """A sample's input as an image, stretched to the range of a screen if it was normalised; None if it isn't one."""
    if is_stream(dataset):
        return None
    seed_sample(seed, -1, index)  # as evaluation reads it
    sample = dataset[index]
    image = sample[0] if isinstance(sample, tuple | list) else sample
    if (
        not isinstance(image, Tensor)
        or image.dim() not in (2, 3)
        or (image.dim() == 3 and image.shape[0] not in (1, 3))
    ):
        return None
    array = image.numpy() if image.dim() == 2 else image.permute(1, 2, 0).numpy()
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    return array if low >= 0 and high <= 1 else (array - low) / max(high - low, 1e-12)


def _regressions(outputs: Tensor, targets: Tensor, dataset: Any) -> list[Regression]:
    if outputs.shape != targets.shape:
        return []
    original = attribute_of(dataset, "original_units")
    if original is not None:
        outputs, targets = original(outputs), original(targets)
    kept = np.linspace(0, len(outputs) - 1, min(DOTS, len(outputs))).round().astype(np.int64)
    columns = [(outputs, targets)] if outputs.dim() == 1 else list(zip(outputs.T, targets.T, strict=True))[:TARGETS]
    names = attribute_of(dataset, "targets_named") or []
    return [
        Regression(truth.numpy()[kept], guess.numpy()[kept], names[k] if k < len(names) else "target")
        for k, (guess, truth) in enumerate(columns)
    ]


def _boundary(run: RunDir, evaluator: Evaluator, dataset: Any, step: int) -> Boundary | None:
    """The boundaries that were kept on the way, else the model's own; also written as PNGs and a GIF."""
    points = plane(dataset)
    if points is None:
        return None
    kept = read_frames(run.path(FOLDER), FRAMES)
    if kept is None:
        classes = classes_on(evaluator, around(points[0]))
        if classes is None:
            return None
        kept = around(points[0]), [(step, classes)]
    boundary = Boundary(*points, *kept)
    write_boundary(boundary, run.path(FOLDER))
    return boundary
