"""A few steps of a run in a temporary directory: what a big job would stumble over, found in seconds."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Subset, default_collate

from dist_train.config.components import build_callable, is_spec
from dist_train.config.durations import Duration
from dist_train.data.stream import is_stream
from dist_train.engine.build import build_dataset
from dist_train.engine.run import train_in
from dist_train.tracking.console import Console
from dist_train.tracking.records import read_rows

if TYPE_CHECKING:
    from pathlib import Path

    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

SAMPLES = 8  # of each split that are read and shown
STEPS = 2


def look_at(config: Config, split: str) -> str:
    """The first samples of a split as one batch: shapes, dtypes, range; raises whatever its dataset raises."""
    dataset = build_dataset(config, split)
    collate = build_callable(config.data.collate) if config.data.collate is not None else default_collate
    if is_stream(dataset):
        samples = list(itertools.islice(iter(dataset), SAMPLES))
        return f"a stream; {_form(collate(samples))}"
    samples = [dataset[index] for index in range(min(SAMPLES, len(dataset)))]
    return f"{len(dataset):,} samples; {_form(collate(samples))}"


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        kind = str(tensor.dtype).removeprefix("torch.")
        if not tensor.numel() or tensor.dtype == torch.bool or tensor.is_complex():
            return f"{tuple(tensor.shape)} {kind}"
        return f"{tuple(tensor.shape)} {kind} {float(tensor.min()):.4g} ... {float(tensor.max()):.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_form(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_form(item) for item in value)
    return type(value).__name__


def rehearse(config: Config, world: World, where: Path) -> list[str]:
    """Two steps, an evaluation and a save below `where`, then one step more from there; lines for the person (rank 0).

    All ranks call it. What it raises is what training would raise.
    """
    out = io.StringIO()
    train_in(world, _shortened(config, where, STEPS), Console(world.is_main, out=out, err=out))
    start = [line for line in out.getvalue().splitlines() if line.startswith("  ")]
    shown = list(itertools.takewhile(lambda line: not line.lstrip().startswith("state "), start))
    train_in(world, _shortened(config, where, STEPS + 1), Console(world.is_main, out=io.StringIO(), err=io.StringIO()))
    if not world.is_main:
        return []
    place = where / "rehearsal"
    rows = list(read_rows(place / "metrics.jsonl"))
    losses = ", ".join(f"{row['loss']:.4f}" for row in rows if row["split"] == "train")
    seen = ", ".join(f"{row['loss']:.4f}" for row in rows if row["split"] == "val")
    size = sum(file.stat().st_size for file in sorted((place / "checkpoints").glob("step-*/*")))
    shown.append(f"  loss of {STEPS} steps, and of one more after going on from their checkpoint: {losses}")
    if seen:
        shown.append(f"  loss in evaluation: {seen}")
    return [*shown, f"  saved: {size / 1e6:.1f} MB"]


def _shortened(config: Config, where: Path, steps: int) -> Config:
    """The config, with an end after so many steps and little to evaluate; a schedule keeps its span."""
    duration = config.trainer.duration
    length = Duration(steps, "step")
    trainer = {"duration": length, "stop_at": None, "stop_when": None, "evaluate_every": Duration(STEPS, "step")}
    data: dict[str, Any] = {"test": None}
    if config.data.val is not None:
        data["val"] = _some(build_dataset(config, "val"), config.data.eval_batch_size)
    changes: dict[str, Any] = {
        "trainer": config.trainer.model_copy(update={**trainer, "log_every": Duration(1, "step")}),
        "data": config.data.model_copy(update=data),
        "run": config.run.model_copy(update={"dir": str(where), "name": "rehearsal"}),
        "checkpoint": config.checkpoint.model_copy(
            update={"every": [Duration(STEPS, "step")], "keep_best": None, "resume": "auto"}
        ),
        "tracking": config.tracking.model_copy(update={"tensorboard": False, "wandb": None}),
    }
    scheduler = config.scheduler
    if isinstance(scheduler, dict) and is_spec(scheduler) and not duration.is_time and "horizon" not in scheduler:
        changes["scheduler"] = {**scheduler, "horizon": str(duration)}
    return config.model_copy(update=changes)


def _some(dataset: Any, batch: int) -> Any:
    return None if is_stream(dataset) else Subset(dataset, range(min(len(dataset), 2 * batch)))
