"""A dry run: a few steps in a temporary directory, to find in seconds what would make the job fail."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dist_train.building.model import build_model_parts
from dist_train.building.prepare import build_dataset, first_samples
from dist_train.building.unsaved import unsaved_state
from dist_train.checkpoint.store import find_at
from dist_train.config.fields import Duration
from dist_train.data.stream import is_stream
from dist_train.run.start import train_in
from dist_train.text import format_bytes
from dist_train.tracking.console import Console
from dist_train.tracking.records import read_rows
from dist_train.training.parts import Parts

if TYPE_CHECKING:
    from pathlib import Path

    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

SAMPLES = 8  # read of each split
STEPS = 3


def describe_samples(config: Config, split: str) -> str:
    """Shapes, dtypes and ranges of the first samples of a split, collated. Raises whatever its dataset raises."""
    dataset = build_dataset(config, split)
    size = "a stream" if is_stream(dataset) else f"{len(dataset):,} samples"
    return f"{size}; {_describe(first_samples(config, dataset, SAMPLES))}"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.numel() or tensor.dtype == torch.bool or tensor.is_complex():
            return text
        return f"{text} {float(tensor.min()):.4g} ... {float(tensor.max()):.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_describe(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_describe(item) for item in value)
    return type(value).__name__


def run(config: Config, world: World, where: Path) -> tuple[list[str], str]:
    """Three steps, an evaluation and a save below `where`, then a resume and one more step. All ranks call it.

    Returns:
        Lines to print (on rank 0), and what of the model's state a checkpoint doesn't hold ("" for nothing).

    Raises:
        Exception: what training would raise.
    """
    out, kept, missing = io.StringIO(), list[Parts](), ""
    train_in(world, _shortened(config, where, STEPS), Console(world.is_main, out=out, err=out), kept.append)
    if not config.has_live_objects:
        batch = kept[0].move(first_samples(config, kept[0].datasets["train"], SAMPLES))
        missing = unsaved_state(kept[0], build_model_parts(config, world), find_at(str(where / "dry_run")), batch)
    kept.clear()
    train_in(world, _shortened(config, where, STEPS + 1), Console(world.is_main, out=io.StringIO(), err=io.StringIO()))
    if not world.is_main:
        return [], missing
    block = [line for line in out.getvalue().splitlines() if line.startswith("  ")]
    shown = list(itertools.takewhile(lambda line: not line.lstrip().startswith("state "), block))
    losses = {"train": "", "val": ""}
    for row in read_rows(where / "dry_run" / "metrics.jsonl"):
        losses[row["split"]] += f" {row['loss']:.4f}"
    size = sum(file.stat().st_size for file in (where / "dry_run" / "checkpoints").glob("step-*/*"))
    shown.append(f"  loss of {STEPS} steps, and of one more after resuming from their checkpoint:{losses['train']}")
    shown += [f"  loss in evaluation:{losses['val']}"] if losses["val"] else []
    return [*shown, f"  saved: {format_bytes(size)}"], missing


def _shortened(config: Config, where: Path, steps: int) -> Config:
    """The config with a few steps and little to evaluate; the schedule keeps its horizon."""
    once, every, whole = Duration(1, "step"), Duration(STEPS, "step"), config.trainer.duration
    val = None
    if config.data.val is not None and not is_stream(dataset := build_dataset(config, "val")):
        some = list(range(min(len(dataset), 2 * config.data.eval_batch_size)))
        # By _target_: a live object would make this another kind of run.
        val = {"_target_": "torch.utils.data.Subset", "dataset": config.data.val, "indices": some} if some else None
    ends: dict[str, Any] = {"duration": Duration(steps, "step"), "stop_at": None, "stop_when": None}
    changes: dict[str, dict[str, Any]] = {
        "trainer": {**ends, "log_every": once, "evaluate_every": every},
        "data": {"val": val, "test": None},
        "run": {"dir": str(where), "name": "dry_run"},
        "checkpoint": {"every": [every], "keep_best": None, "resume": "auto"},
        "tracking": {"tensorboard": False, "wandb": None},
    }
    sections: dict[str, Any] = {name: getattr(config, name).model_copy(update=new) for name, new in changes.items()}
    scheduler = config.scheduler
    if isinstance(scheduler, dict) and not whole.is_time and "horizon" not in scheduler:
        sections["scheduler"] = {**scheduler, "horizon": str(whole)}
    return config.model_copy(update=sections)
