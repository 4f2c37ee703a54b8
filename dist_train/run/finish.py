"""The end of a run: the model that is kept, its figures, and the files that a person looks for."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.runtime.seeding import undisturbed_generators
from dist_train.training.model import load_weights
from dist_train.training.prepare import build_model

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.config.schema import Config
    from dist_train.runtime.rundir import RunDir
    from dist_train.training.trainer import Trainer


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the state_dict, keys sorted: key, NUL, dtype, NUL, shape, NUL, the contiguous little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # what a module's get_extra_state gives
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{data.dtype}\0{tuple(data.shape)}\0".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finish(trainer: Trainer, checkpoints: CheckpointManager) -> dict[str, Any]:
    """Evaluate what is kept and write result.json and model.pt; all ranks call it, rank 0 writes.

    `weights_sha256` is that of the last training weights; `metrics` and `model.pt` are of the best checkpoint where best is
    kept, else of the last, with the EMA's weights where there is one.
    """
    parts, progress, run = trainer.parts, trainer.progress, trainer.run
    digest = weights_sha256(trainer.model)
    val = progress.metrics
    best_step = trainer.world.on_main(lambda: _best_step(trainer, checkpoints))
    kept_step = trainer.step if best_step is None else best_step
    epoch, samples = trainer.epoch, progress.samples  # of the weights that are kept, as the step of the test row
    if kept_step != trainer.step:
        found = checkpoints.find(f"step-{kept_step}")
        load_weights(parts.modules, found)
        if parts.ema is not None and "ema" in found.parts:
            parts.ema.load_state_dict(found.load("ema"))
        val = found.metrics
        epoch, samples = found.value("epoch", int), found.value("samples", int)
    metrics: dict[str, dict[str, float]] = {}
    if val:
        metrics["val"] = {name.removeprefix("val/"): value for name, value in val.items()}
        metrics["val"]["eval_samples"] = int(metrics["val"]["eval_samples"])  # a manifest holds floats
    if "test" in parts.eval_loaders:
        metrics["test"] = parts.evaluator.run(parts.eval_loaders["test"])
        trainer.outputs.logger.row("test", kept_step, epoch, samples, metrics["test"])
        trainer.console.evaluation("test", kept_step, metrics["test"])
    result = {
        "state": "completed",
        "reason": trainer.reason,
        "step": trainer.step,
        "epoch": trainer.epoch,
        "samples": progress.samples,
        "kept": "last" if best_step is None else "best",
        "kept_step": kept_step,
        "ema": parts.ema is not None,
        "metrics": metrics,
        "weights_sha256": digest,
        "world_size": trainer.world.size,
        "seconds": round(progress.seconds, 3),
    }
    if trainer.world.is_main:
        with parts.ema.applied() if parts.ema is not None else contextlib.nullcontext():
            run.assure_own()
            if task := parts.modules.task_state():
                _write_weights(run, "task.pt", task)
            _write_weights(run, "model.pt", trainer.model.state_dict())
        run.path("report.html").unlink(missing_ok=True)  # of an earlier end: whoever finds none writes it
        run.storage.delete("report.html")
        trainer.outputs.flush_and_upload()
        run.write_json("result.json", result)  # the last: a run that has it is completed
    return result


def give_weights(config: Config, run: RunDir) -> None:
    """Where the model is a live one, leave in it what model.pt holds.

    Raises:
        ConfigError: the file is gone, or can't be read.
    """
    model = config.model
    if not isinstance(model, nn.Module):
        return
    try:
        weights = torch.load(io.BytesIO(run.storage.read_bytes("model.pt")), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        message = (
            f"{run.location} is completed, but its model.pt can't be read ({type(error).__name__}: {error}); give this "
        )
        raise ConfigError.single("run.name", message + "run another run.name, or put the file back") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError:  # it is as it was before `transfer` changed it
        with undisturbed_generators():
            build_model(config)
        model.load_state_dict(weights)


def _write_weights(run: RunDir, name: str, state: dict[str, Any]) -> None:
    weights = {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else value for key, value in state.items()
    }
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    run.storage.write_atomic(name, buffer.getvalue())


def _best_step(trainer: Trainer, checkpoints: CheckpointManager) -> int | None:
    """The step whose weights are kept as the best; the next best where that checkpoint has been lost meanwhile."""
    progress = trainer.progress
    if trainer.parts.keep_best is None or progress.best is None:
        return None
    if progress.best_step == trainer.step:
        return trainer.step
    found = checkpoints.best()
    if found is None or found.step != progress.best_step:
        kept = f"step {found.step}" if found is not None else "the last step"
        trainer.console.warn(
            f"the best checkpoint, of step {progress.best_step}, is lost: the weights of {kept} are kept"
        )
    return None if found is None else found.step
