"""The pictures of a report: what the kept model says about data that it wasn't trained on."""

from __future__ import annotations

import logging
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
from dist_train.config.errors import ConfigError, visible
from dist_train.config.slots import check_components
from dist_train.data.passes import is_stream
from dist_train.data.reading import attribute_of
from dist_train.run.open import Restored, open_run, restore_in
from dist_train.runtime.launch import read_placement
from dist_train.runtime.rundir import RunDir
from dist_train.runtime.seeding import seed_sample
from dist_train.runtime.sidefiles import problems
from dist_train.tracking.records import read_rows
from dist_train.training.evaluate import on_rank_zero
from dist_train.training.predict import Meaning, Predicted, predict, read_meaning
from dist_train.training.prepare import eval_loader
from dist_train.views.boundary import FOLDER, around, classes_on, plane, read_frames
from dist_train.views.curves import draw_curves
from dist_train.views.figures import Boundary, Confusion, Example, Regression, write_boundary
from dist_train.views.report import Picture, write_report

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.data.loader import EvalLoader
    from dist_train.runtime.world import World
    from dist_train.training.evaluate import Evaluator
    from dist_train.training.trainer import Trainer

SAMPLES = 20_000  # at most so many are asked about, spread evenly over the dataset
WORST, DOTS, TARGETS, FRAMES = 24, 2000, 4, 10  # shown at most: errors, points and targets of a regression, boundaries


def report_at_end(trainer: Trainer) -> None:
    """Write the report of a run that is completed, with the model as it stands; all ranks call it."""
    parts = trainer.parts
    loader = parts.eval_loaders.get("test") or parts.eval_loaders.get("val")
    make_report(trainer.run, parts.config, parts.evaluator, loader, trainer.step, trainer.record, trainer.console.warn)


def report_again(location: str, checkpoint: str | None, overrides: Sequence[str]) -> Path | None:
    """Write the report of a run as it is now; its path on rank 0. Where its model can't be had, without pictures.

    Raises:
        ConfigError: there is no run, or what was asked for by name can't be had.
    """
    run = RunDir(location)
    is_main = read_placement(os.environ).rank == 0

    def warn(text: str) -> None:
        if is_main:
            print(f"warning: {text}", file=sys.stderr)

    for name, wrong in problems(run.storage):
        warn(f"{name} can't be read: {wrong}")
    try:
        with open_run(location, checkpoint, overrides) as restored:
            return _report_of(restored, warn)
    except (ConfigError, CheckpointError) as error:
        if checkpoint is not None or overrides or not run.storage.exists("config.yaml"):
            raise
        warn(f"the report has no pictures: {error}")
        return _written(run) if is_main else None


def report_in(world: World, run: RunDir, config: Config, warn: Callable[[str], None]) -> None:
    """The same among processes that have met: the report of a completed run that a kill has kept from being written."""
    try:
        if problems := check_components(config):
            raise ConfigError(problems)
        restored = restore_in(world, run, config)
        modes = [(module, module.training) for module in restored.evaluator.modules.modules()]
        _report_of(restored, warn)
        for module, training in modes:
            module.training = training
    except (ConfigError, CheckpointError) as error:
        warn(f"the report has no pictures: {error}")
        if world.is_main:
            with run.only_a_view():
                _written(run)


def _report_of(restored: Restored, warn: Callable[[str], None]) -> Path | None:
    config, found = restored.config, restored.found
    restored.evaluator.modules.eval()
    loader = (
        restored.loader(restored.split(None)) if config.data.test is not None or config.data.val is not None else None
    )
    return make_report(restored.run, config, restored.evaluator, loader, found.step, found.meta, warn)


def write_curves(run: RunDir) -> None:
    """curves.png, from the records as they are; rank 0 calls it. It raises nothing: a picture is no reason to fail."""
    try:
        draw_curves(read_rows(run.records() / "metrics.jsonl"), run.path("curves.png"), title=run.name)
        run.upload(("curves.png",))
    except ImportError:
        pass  # matplotlib isn't needed to train
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
        warn(f"the report has no pictures: {type(error).__name__}: {error}")
    if not evaluator.world.is_main:
        return None
    try:
        device = evaluator.world.device
        environment = {name: str(version) for name, version in dict(record.get("versions") or {}).items()}
        environment |= {name: str(record[name]) for name in ("host", "commit") if record.get(name)}
        environment["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        environment["precision"] = evaluator.precision.name
        return _written(run, pictures=pictures, environment=environment)
    except Exception as error:
        warn(f"there is no report.html: {type(error).__name__}: {error}")
        return None


def _written(run: RunDir, **shown: Any) -> Path:
    write_curves(run)
    run.assure_own()
    path = write_report(run.records(), **shown)
    run.upload((path.name,))
    return path


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
            where = _spread(len(where), SAMPLES)
            loader = eval_loader(config, world, Subset(dataset, where.tolist()))
        mine = [part for part in predict(evaluator, loader) if part is not None]
    except ConfigError:
        pass  # outputs that are no table: there is nothing to show
    except Exception as error:
        problem = f"rank {world.rank}: {type(error).__name__}: {error}"
    every = on_rank_zero(world, (mine, problem))
    if not world.is_main:
        return []
    if any(problem for _, problem in every):
        raise RuntimeError("; ".join(problem for _, problem in every if problem))
    parts = sorted((part for theirs, _ in every for part in theirs), key=lambda part: part.start)
    if not parts or any(part.targets is None for part in parts):
        return []
    outputs, targets = (torch.cat([part[k] for part in parts]) for k in (1, 2))
    meaning = read_meaning(evaluator, outputs)
    if meaning.kind == "values":
        return list(_regressions(meaning.predictions(outputs), targets, dataset))
    shown: list[Picture] = [_confusion(evaluator, meaning, outputs, meaning.truths(targets), dataset, where)]
    boundary = _boundary(run, evaluator, dataset, step)
    return shown if boundary is None else [*shown, boundary]


def _spread(length: int, most: int) -> np.ndarray[Any, Any]:
    """At most so many indices, evenly over all."""
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
    """A sample's input as an image, stretched to the range of a screen if it was normalised; None if it isn't one."""
    if is_stream(dataset):
        return None
    seed_sample(seed, -1, index)  # as evaluation reads it
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
    """The boundaries that were kept on the way, else the model's own; also written as PNGs and a GIF."""
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
