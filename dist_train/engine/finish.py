"""The end of a run: the model that is kept, its figures, and the files that a person looks for."""

from __future__ import annotations

import contextlib
import hashlib
import io
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.tracking.curves import draw_curves
from dist_train.tracking.records import read_rows

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.engine.ema import EMA
    from dist_train.engine.trainer import Trainer


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the state_dict, keys sorted: key, NUL, dtype, NUL, shape, NUL, the contiguous little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{data.dtype}\0{tuple(data.shape)}\0".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def final_state_dict(model: nn.Module, ema: EMA | None) -> dict[str, torch.Tensor]:
    """The weights that are kept: the EMA's where there is one; plain names, on the CPU."""
    with ema.applied() if ema is not None else contextlib.nullcontext():
        return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def finish(trainer: Trainer, checkpoints: CheckpointManager, seconds: float) -> dict[str, Any]:
    """Evaluate what is kept and write result.json, model.pt and curves.png; all ranks call it, rank 0 writes.

    `weights_sha256` is that of the last training weights; `metrics` and `model.pt` are of the best checkpoint where best is
    kept, else of the last, with the EMA's weights where there is one.
    """
    parts, progress = trainer.parts, trainer.progress
    digest = weights_sha256(trainer.model)
    val = progress.metrics
    kept, kept_step = "last", trainer.step
    best_step = trainer.world.on_main(lambda: _best_step(trainer, checkpoints))
    if best_step is not None:
        kept = "best"
    if best_step not in (None, trainer.step):
        found = checkpoints.find(f"step-{best_step}")
        trainer.model.load_state_dict(found.load("model"))
        if parts.ema is not None and "ema" in found.parts:
            parts.ema.load_state_dict(found.load("ema"))
        val = found.metrics
        kept_step = found.step
    metrics: dict[str, dict[str, float]] = {}
    if val:
        metrics["val"] = {name.removeprefix("val/"): value for name, value in val.items()}
        metrics["val"]["eval_samples"] = int(metrics["val"]["eval_samples"])  # a manifest holds floats
    if "test" in parts.eval_loaders:
        parts.evaluator.control = None  # nothing is left that could be stopped and saved
        metrics["test"] = parts.evaluator.run(parts.eval_loaders["test"])
        parts.logger.row("test", kept_step, trainer.epoch, progress.samples, metrics["test"])
        parts.console.evaluation("test", kept_step, metrics["test"])
    result = {
        "state": "completed",
        "reason": trainer.reason,
        "step": trainer.step,
        "epoch": trainer.epoch,
        "samples": progress.samples,
        "kept": kept,
        "kept_step": kept_step,
        "ema": parts.ema is not None,
        "metrics": metrics,
        "weights_sha256": digest,
        "world_size": trainer.world.size,
        "seconds": round(seconds, 3),
    }
    if trainer.world.is_main:
        buffer = io.BytesIO()
        torch.save(final_state_dict(trainer.model, parts.ema), buffer)
        parts.run.storage.write_atomic("model.pt", buffer.getvalue())
        if trainer.config.tracking.report:
            with contextlib.suppress(ImportError):  # matplotlib isn't needed to train
                rows = read_rows(parts.run.path("metrics.jsonl"))
                draw_curves(rows, parts.run.path("curves.png"), title=parts.run.name)
        trainer.bring_home()
        parts.run.write_json("result.json", result)  # the last: a run that has it is completed
    return result


def _best_step(trainer: Trainer, checkpoints: CheckpointManager) -> int | None:
    """The step whose weights are kept as the best; the next best where that checkpoint has been lost meanwhile."""
    parts, progress = trainer.parts, trainer.progress
    if parts.keep_best is None or progress.best is None or progress.best_step == trainer.step:
        return progress.best_step if parts.keep_best is not None and progress.best is not None else None
    try:
        return checkpoints.find(f"step-{progress.best_step}").step
    except CheckpointError as error:
        found = checkpoints.best()
        kept = f"step {found.step}" if found is not None else "the last step"
        parts.console.warn(f"the best checkpoint is lost ({error}): the weights of {kept} are kept instead")
        return found.step if found is not None else None
