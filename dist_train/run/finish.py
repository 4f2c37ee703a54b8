"""The end of a run: the model that is kept, its metrics, and the files that a user looks for."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.building.frozen import load_trained
from dist_train.building.model import load_weights
from dist_train.building.prepare import build_model, frozen_source
from dist_train.config.errors import ConfigError
from dist_train.files import retried
from dist_train.pages.result import Result
from dist_train.run.completed import end_lines, show_completed, with_nan
from dist_train.run.report import report_in
from dist_train.runtime.lease import look_at_owner
from dist_train.runtime.seeding import undisturbed_generators

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.config.schema import Config
    from dist_train.run.decide import Decision
    from dist_train.runtime.rundir import RunDir
    from dist_train.runtime.world import World
    from dist_train.tracking.console import Console
    from dist_train.training.trainer import Trainer


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the state_dict, keys sorted: key, NUL, dtype, NUL, shape, NUL, the contiguous little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # what a module's get_extra_state returns
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{data.dtype}\0{tuple(data.shape)}\0".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finish(trainer: Trainer, checkpoints: CheckpointManager) -> dict[str, Any]:
    """Evaluate what is kept and write result.json and model.pt; all ranks call it, rank 0 writes.

    `weights_sha256` is that of the last training weights; `metrics` and `model.pt` are of the best checkpoint where best is
    kept, else of the last, with the EMA weights where there are any.
    """
    parts, progress, outputs = trainer.parts, trainer.progress, trainer.outputs
    digest = weights_sha256(trainer.model)
    val = progress.metrics
    best_step = trainer.world.on_main(lambda: _best_step(trainer, checkpoints))
    kept_step = trainer.step if best_step is None else best_step
    epoch, samples = trainer.epoch, progress.samples  # of the weights that are kept, as the step of the test row
    if kept_step != trainer.step:
        found = checkpoints.find(f"step-{kept_step}")
        load_weights(parts.modules, found, frozen=parts.frozen)
        if parts.ema is not None and "ema" in found.parts:
            parts.ema.load_state_dict(found.load("ema"))
        val = found.metrics
        epoch, samples = found.value("epoch", int), found.value("samples", int)
    metrics: dict[str, dict[str, float]] = {}
    if val:
        metrics["val"] = {name.removeprefix("val/"): value for name, value in val.items()}
        metrics["val"]["eval_samples"] = int(metrics["val"]["eval_samples"])  # a manifest holds floats
    if "test" in parts.eval_loaders:
        outputs.console.working("evaluating the test data")
        metrics["test"] = parts.evaluator.run(parts.eval_loaders["test"])
        outputs.logger.row("test", kept_step, epoch, samples, metrics["test"])
        outputs.console.evaluation("test", kept_step, metrics["test"])
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
        _write(trainer, result)
    return result


def _write(trainer: Trainer, result: dict[str, Any]) -> None:
    parts, run = trainer.parts, trainer.run
    with parts.ema.applied() if parts.ema is not None else contextlib.nullcontext():
        run.check_owner()
        if task := parts.modules.task_state():
            _write_weights(run, "task.pt", task)
        weights = trainer.model.state_dict()
        if parts.frozen is not None:
            weights, digests = parts.frozen.split(weights)
            run.write_json("frozen.json", {"from": frozen_source(trainer.config), "sha256": digests})
        _write_weights(run, "model.pt", weights)
    report = run.path("report.html")  # of an earlier end: a start that finds none writes it
    retried("delete", report, lambda: report.unlink(missing_ok=True))
    run.storage.delete("report.html")
    trainer.outputs.flush_and_upload()
    run.write_json("result.json", result)  # the last: a run that has it is completed


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


def finish_completed(world: World, config: Config, run: RunDir, console: Console, decision: Decision) -> Result:
    """The result of a run that this config asks no more of. Nothing is trained; only what a kill has left unwritten is written:
    status.json and the report."""
    result = with_nan(world.on_main(lambda: run.read_json("result.json")))
    status = run.read_json("status.json") or {}
    if world.is_main and status.get("state") != "completed" and not look_at_owner(run.storage)[0]:
        run.write_status("completed", step=result["step"], epoch=result["epoch"], world_size=result["world_size"])
    show_completed(result, run, console, decision)
    if config.tracking.report and not world.on_main(lambda: run.storage.exists("report.html")):
        report_in(world, run, config, console.warn)
    load_into_live_model(config, run)
    console.end_block(end_lines(result, run))
    return Result(result, run.location)


def load_into_live_model(config: Config, run: RunDir) -> None:
    """Where the config's model is a live object, load model.pt into it.

    Raises:
        ConfigError: the file is gone, or can't be read.
    """
    model = config.model
    if not isinstance(model, nn.Module):
        return
    try:
        weights = torch.load(io.BytesIO(run.storage.read_bytes("model.pt")), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError.single(
            "run.name",
            f"{run.location} is completed, but its model.pt can't be read ({type(error).__name__}: {error}); give this run "
            "another run.name, or restore the file",
        ) from error
    left_out = run.read_json("frozen.json") if config.checkpoint.what == "trained" else None

    def load() -> None:
        if left_out is None:
            model.load_state_dict(weights)
        else:
            load_trained(model, weights, left_out, f"{run.location}/model.pt")

    try:
        load()
    except (RuntimeError, ConfigError):  # it is as it was before `transfer` changed it
        with undisturbed_generators():
            build_model(config)
        load()
