"""From a config to the parts that the trainer runs. Nothing is written here."""

from __future__ import annotations

import contextlib
import os
import random
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dist_train.config.components import build, build_callable, reserved
from dist_train.config.errors import ConfigError
from dist_train.data.augment import Augmentation
from dist_train.data.errors import DataError
from dist_train.data.loader import EvalLoader, Reading, TrainLoader, build_plan
from dist_train.data.plan import Plan, smallest_part
from dist_train.engine.boundary import BoundaryFrames
from dist_train.engine.callbacks import Callback
from dist_train.engine.ema import EMA
from dist_train.engine.losses import Loss
from dist_train.engine.metrics import Metric, build_metrics
from dist_train.engine.optim import Schedule, build_optimizer
from dist_train.engine.pictures import Pictures
from dist_train.engine.precision import Precision, resolve_precision
from dist_train.engine.prepare import fetch_dataset, fetch_model, prepare_model
from dist_train.engine.reduce import DataParallel, Reducer, SingleProcess
from dist_train.engine.stopping import better_is_lower, in_steps
from dist_train.engine.task import Supervised, Task

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

Batch = Any


@dataclass
class Blueprint:
    """What doesn't depend on what has been trained so far: datasets, model, loss, metrics, plan."""

    config: Config
    world: World
    datasets: dict[str, Any]
    model: nn.Module
    loss: Loss | None
    task: Task
    metrics: list[Metric]
    callbacks: list[Callback]
    precision: Precision
    plan: Plan
    micro_batch_size: int
    channels_last: bool
    notes: list[str]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.plan.steps_per_epoch

    @property
    def keep_best(self) -> tuple[str, str] | None:
        """The metric that decides which checkpoint is best, and whether less of it is better."""
        choice = self.config.checkpoint.keep_best
        if choice is None or "val" not in self.datasets:
            return None
        mode, _, name = str(choice).rpartition(" ")
        if name == "auto":
            name = f"val/{self.metrics[0].name if self.metrics else 'loss'}"
        return name, mode or ("min" if better_is_lower(name) else "max")


@contextlib.contextmanager
def building(key: str) -> Iterator[None]:
    """Errors of a component's own code, while it is being built, as errors of its key in the config.

    Raises:
        ConfigError: naming key, exception and the line that raised.
    """
    try:
        yield
    except ConfigError:
        raise
    except DataError as error:
        head, _, rest = str(error).partition(": ")
        named = head.startswith("data.") and " " not in head  # it says its own key
        raise ConfigError.single(head if named else key, rest if named else str(error)) from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError.single(
            key, f"could not be built: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        ) from error


def draw_blueprint(config: Config, world: World, *, fresh: bool, fits: int | None = None) -> Blueprint:
    """Build the five pieces that a config names, in an order that never changes: the model first, from the run's seed.

    Args:
        fits: with `trainer.micro_batch_size: auto`, the most samples of a forward, where memory has run out before.
        fresh: the run begins, so that `transfer.weights` are loaded; otherwise a checkpoint's follow.

    Raises:
        ConfigError: a piece can't be built, or they don't fit each other.
    """
    if config.distributed.deterministic is True:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's BLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    notes: list[str] = []
    model = build_model(config, world if fresh else None, notes)
    datasets = {
        split: build_dataset(config, split, world)
        for split in ("train", "val", "test")
        if getattr(config.data, split) is not None
    }
    loss, task, metrics = build_objective(config, world.device)
    with building("callbacks"):
        callbacks = [*(build(spec) for spec in config.callbacks), BoundaryFrames()]
    if config.tracking.tensorboard:
        callbacks.append(Pictures(config.tracking, model))
    with building("data"):
        plan = build_plan(datasets["train"], seed=config.seed, config=config.data)
    share = -(-plan.global_batch_size // world.size)
    wanted = config.trainer.micro_batch_size
    micro = min(share, fits or share) if wanted == "auto" else min(int(wanted), share)
    precision = resolve_precision(config.trainer.precision, world.device)
    model, channels_last = place_model(model, config, world)
    _check_batchnorm(model, plan, world.size, micro)
    return Blueprint(
        config, world, datasets, model, loss, task, metrics, callbacks, precision, plan, micro, channels_last, notes
    )


def build_model(config: Config, world: World | None = None, notes: list[str] | None = None) -> nn.Module:
    """The model with its first weights, a function of the run's seed and of `transfer`.

    Args:
        world: None where a checkpoint's weights follow: `transfer.weights` aren't loaded then.
        notes: gets lines for the person, on what `transfer` did.

    Raises:
        ConfigError: it can't be built.
    """
    seed_everything(config.seed)
    with building("model"):
        model = fetch_model(config.model, world)
    if not isinstance(model, nn.Module):
        raise ConfigError.single(
            "model", f"expected a torch.nn.Module, but {config.get('model._target_')} gave {type(model).__name__}"
        )
    lines = prepare_model(model, config, world)
    if notes is not None:
        notes += lines
    return model


def build_dataset(config: Config, split: str, world: World | None = None) -> Any:
    """The dataset of a split that the config has; with a `world`, one process per node downloads it.

    Whatever its constructor draws at random follows from the run's seed alone, so that `evaluate` gets the same one.

    Raises:
        ConfigError: it can't be built.
    """
    seed_everything(config.seed)
    with building(f"data.{split}"):
        return fetch_dataset(getattr(config.data, split), split, world)


def build_objective(config: Config, device: torch.device) -> tuple[Loss | None, Task, list[Metric]]:
    """Loss, task and metrics.

    Raises:
        ConfigError: one of them can't be built.
    """
    loss = None
    if config.loss is not None:
        with building("loss"):
            loss = Loss(build_callable(config.loss)).to(device)
    with building("task"):
        task = build(config.task) if config.task is not None else Supervised(loss) if loss is not None else None
    assert task is not None
    with building("metrics"):
        return loss, task, build_metrics(config.metrics, loss)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and `random`, before the model draws its first weights."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def place_model(model: nn.Module, config: Config, world: World) -> tuple[nn.Module, bool]:
    """The model on its device, in the memory format and with the BatchNorm that the config asks for."""
    choice = config.trainer.channels_last
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    channels_last = (world.device.type == "cuda" and convolutional) if choice == "auto" else bool(choice)
    model = model.to(world.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.distributed.strategy == "none" and world.size > 1:
        raise ConfigError.single(
            "distributed.strategy", f"`none` trains one process alone, but {world.size} were started; use auto or ddp"
        )
    if config.distributed.sync_batchnorm and world.size > 1:
        if world.device.type != "cuda":
            raise ConfigError.single(
                "distributed.sync_batchnorm", "torch's SyncBatchNorm needs CUDA, but this run is on the CPU"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.trainer.compile:
        model.compile(dynamic=False)  # with dynamic shapes one batch size changes the bits of another
    return model, channels_last


def _check_batchnorm(model: nn.Module, plan: Plan, world_size: int, micro: int) -> None:
    """BatchNorm can't take statistics over one sample.

    Raises:
        ConfigError: some forward of training would get one; names sizes that work.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not any(isinstance(module, norms) and module.training for module in model.modules()):
        return
    if smallest_part(plan, world_size, micro) > 1:
        return
    good: list[int] = []
    for size in range(max(2, plan.global_batch_size - 8), plan.global_batch_size + 9):
        if len(good) < 4 and size <= plan.length:
            candidate = Plan(plan.seed, plan.length, size, plan.shuffle, plan.drop_last)
            if smallest_part(candidate, world_size, max(micro, 2)) > 1:
                good.append(size)
    sizes = ", ".join(str(size) for size in good) or f"{2 * world_size} or more"
    raise ConfigError.single(
        "data.global_batch_size",
        f"with {plan.length} samples, global batches of {plan.global_batch_size}, {world_size} process(es) and micro-batches of "
        f"{micro}, some forward gets a single sample, over which BatchNorm can't take statistics; sizes that work: {sizes} (with "
        "micro-batches of at least 2), or data.drop_last=true",
    )


def what_splitting_changes(blueprint: Blueprint) -> str:
    """What smaller micro-batches change beside the memory: "" where they give the same gradient.

    A loss that isn't torch's own shows its denominator when it is called: before that it isn't known.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for module in blueprint.model.modules():
        drops = [getattr(module, name, 0.0) for name in ("p", "dropout") if not isinstance(module, nn.Sequential)]
        if isinstance(module, norms) and module.training:
            return "BatchNorm then takes its statistics over fewer samples"
        if any(isinstance(p, float) and p > 0 for p in drops):
            return "dropout then draws other numbers"
    if blueprint.loss is None or not blueprint.loss.exact:
        return "it isn't known that the loss is then still the mean over the global batch"
    return ""


def build_reducer(blueprint: Blueprint, scaler: torch.amp.GradScaler | None) -> Reducer:
    """How gradients become one: DDP on several processes, nothing on one."""
    world, distributed = blueprint.world, blueprint.config.distributed
    if world.size == 1:
        return SingleProcess(blueprint.model, blueprint.task, blueprint.precision, scaler)
    return DataParallel(
        blueprint.model,
        blueprint.task,
        blueprint.precision,
        scaler,
        world_size=world.size,
        bucket_mb=distributed.bucket_mb,
        find_unused_parameters=distributed.find_unused_parameters,
    )


def build_training(
    blueprint: Blueprint, horizon: int | None
) -> tuple[torch.optim.Optimizer, Schedule | None, EMA | None]:
    """Optimizer, schedule (over `horizon` steps) and EMA of a fresh run."""
    config = blueprint.config
    with building("optimizer"):
        optimizer = build_optimizer(config.optimizer, blueprint.model, blueprint.world.device)
    schedule = None
    if config.scheduler is not None:
        with building("scheduler"):
            schedule = Schedule(
                config.scheduler,
                optimizer,
                horizon=horizon,
                steps_per_epoch=blueprint.steps_per_epoch,
                default_metric=(blueprint.keep_best or ("val/loss", ""))[0],
            )
    ema = EMA(blueprint.model, config.trainer.ema_decay) if config.trainer.ema_decay is not None else None
    return optimizer, schedule, ema


def schedule_horizon(blueprint: Blueprint) -> int | None:
    """The steps that a schedule spans: `scheduler.horizon`, else the duration; None if that is a time."""
    from dist_train.config.durations import Duration

    _, extra = (
        reserved(blueprint.config.scheduler, {"horizon"}) if blueprint.config.scheduler is not None else (None, {})
    )
    horizon = Duration.parse(str(extra["horizon"])) if extra.get("horizon") else blueprint.config.trainer.duration
    return in_steps(horizon, blueprint.steps_per_epoch)


def reading_of(config: Config, world: World) -> Reading:
    """How this rank reads its datasets."""
    collate = build_callable(config.data.collate) if config.data.collate is not None else None
    return Reading(config.data, config.seed, world.device, world.rank, world.size, world.placement.local_size, collate)


def build_loaders(blueprint: Blueprint, neighbours: int) -> tuple[TrainLoader, dict[str, EvalLoader]]:
    """The loaders of this rank; `neighbours` are the rows beyond each micro-batch that augmentations mix in."""
    config, datasets = blueprint.config, dict(blueprint.datasets)
    reading = reading_of(config, blueprint.world)
    with building("data"):
        train = TrainLoader(
            datasets.pop("train"),
            blueprint.plan,
            reading,
            micro_batch_size=blueprint.micro_batch_size,
            neighbours=neighbours,
        )
    evaluation = {}
    for split, dataset in datasets.items():
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ConfigError.single(f"data.{split}", "expected at least 1 sample, found 0")
        with building(f"data.{split}"):
            evaluation[split] = EvalLoader(dataset, config.data.eval_batch_size, reading)
    return train, evaluation


class Preparer:
    """Moves a batch to the device (without waiting) and augments it there."""

    def __init__(self, blueprint: Blueprint):
        config = blueprint.config
        self.device, self.seed = blueprint.world.device, config.seed
        self.memory_format = torch.channels_last if blueprint.channels_last else None
        with building("data.augment"):
            augment = [build(spec) for spec in config.data.augment]
        self.augmentation = Augmentation(augment) if augment else None
        self.neighbours = self.augmentation.neighbours if self.augmentation is not None else 0

    def train(self, batch: Batch, epoch: int, indices: Any) -> Batch:
        """A training micro-batch; the draws depend on (seed, epoch, sample)."""
        batch = self.move(batch)
        return (
            batch
            if self.augmentation is None
            else self.augmentation(batch, seed=self.seed, epoch=epoch, indices=indices)
        )

    def move(self, batch: Batch) -> Batch:
        """The batch on the device."""
        return move_batch(batch, self.device, self.memory_format)


def move_batch(batch: Batch, device: torch.device, memory_format: torch.memory_format | None = None) -> Batch:
    """The batch on the device, its images in the memory format."""
    if device.type == "cpu" and memory_format is None:
        return batch
    if isinstance(batch, torch.Tensor):
        if memory_format is not None and batch.dim() == 4:
            return batch.to(device, non_blocking=True, memory_format=memory_format)
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_batch(item, device, memory_format) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move_batch(item, device, memory_format) for item in batch)
    if isinstance(batch, Mapping):
        return {key: move_batch(item, device, memory_format) for key, item in batch.items()}
    return batch
