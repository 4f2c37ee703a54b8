"""A config's model with its loss or task, metrics and precision: what training, evaluation and prediction share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dist_train.building.frozen import Frozen, load_trained
from dist_train.building.prepare import build_model, building, named_parts
from dist_train.config.components import build, build_callable
from dist_train.config.errors import ConfigError
from dist_train.config.fields import is_named
from dist_train.data.normalize import Normalize
from dist_train.data.plan import Plan
from dist_train.models.layers import begin_training
from dist_train.objective.modules import Modules
from dist_train.objective.precision import Precision, common_precision, resolve_precision
from dist_train.optim.parameters import check_parameters
from dist_train.runtime.seeding import seed_everything
from dist_train.task.batch import move_batch
from dist_train.task.entries import MetricEntry, build_metric, check_entries
from dist_train.task.losses import Loss
from dist_train.task.task import SeveralLosses, Supervised, Task, WholeBatchTask, minimizes_by_name

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class ModelParts:
    """What every forward needs.

    Attributes:
        modules: the model on its device, together with the parameters, buffers and numbers of its loss or task.
        loss: None where the task computes it.
        memory_format: that of batches of images.
        normalize: `data.normalize`, where the config has it.
        notes: lines for the user on what `transfer` did to the model.
    """

    config: Config
    world: World
    modules: Modules
    loss: Loss | None
    task: Task
    metrics: list[MetricEntry]
    precision: Precision
    memory_format: torch.memory_format | None
    normalize: Normalize | None
    notes: list[str]

    @property
    def model(self) -> nn.Module:
        """The module itself, without DDP around it."""
        return self.modules.model

    def move(self, batch: Any, *, labeled: bool = True) -> Any:
        """The batch on the model's device, its pictures normalized, as the model takes it in evaluation.

        Args:
            labeled: as for `to_device`.

        Raises:
            ValueError: it lacks a part that the config names, or (DataError) isn't one of pictures that `data.normalize` fits.
        """
        moved = self.to_device(batch, labeled=labeled)
        return moved if self.normalize is None else self.normalize.batch(moved)

    def to_device(self, batch: Any, *, labeled: bool = True) -> Any:
        """The batch on the model's device; of one whose parts have names, (inputs, target) by `data.inputs` and `data.target`.

        Args:
            labeled: such a batch must have a target; otherwise one that it lacks is None.

        Raises:
            ValueError: it hasn't.
        """
        parts = named_parts(self.config)
        return move_batch(parts(batch, labeled=labeled) if parts else batch, self.world.device, self.memory_format)


def build_model_parts(config: Config, world: World, *, fresh: bool = False) -> ModelParts:
    """Build them, always in this order.

    Args:
        fresh: load `transfer.weights`; otherwise a checkpoint's weights follow.

    Raises:
        ConfigError: one of them can't be built; names its key.
    """
    notes: list[str] = []
    model = build_model(config, world, fresh=fresh, notes=notes)
    memory_format = _memory_format(config, world, model)
    model = _placed(model, config, world, memory_format)
    loss, val_loss = (_loss(config, world, key) for key in ("loss", "val_loss"))
    modules, task = _with_task(model, loss, val_loss, config)
    metrics = _metrics(config, _judged(task))
    precision = common_precision(resolve_precision(config.trainer.precision, world.device), world)
    asked = config.data.normalize
    normalize = None if asked is None else Normalize(asked.mean, asked.std)
    modules = modules.to(world.device)
    return ModelParts(config, world, modules, loss, task, metrics, precision, memory_format, normalize, notes)


def _judged(task: Any) -> Any:
    """What says how an evaluation's outputs are read: the function of a task's loss, or a task with its `ignore_index`."""
    own = getattr(task, "task", task)
    losses = (getattr(own, name, None) for name in ("val_loss", "loss"))
    return next((loss.function for loss in losses if isinstance(loss, Loss)), own)


def _metrics(config: Config, function: Any) -> list[MetricEntry]:
    metrics = []
    for number, entry in enumerate(config.metrics):
        with building(f"metrics.{number}"):
            metrics.append(build_metric(entry, function, f"metrics.{number}"))
    with building("metrics"):
        check_entries(metrics)
    return metrics


def _memory_format(config: Config, world: World, model: nn.Module) -> torch.memory_format | None:
    channels_last = config.trainer.channels_last
    if channels_last == "auto":
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        channels_last = world.device.type == "cuda" and convolutional
    return torch.channels_last if channels_last else None


def _placed(model: nn.Module, config: Config, world: World, memory_format: torch.memory_format | None) -> nn.Module:
    """The model on its device, in train mode, with the BatchNorm that the config asks for."""
    model = model.to(world.device)
    for tensor in (*model.parameters(), *model.buffers()):
        if memory_format is not None and tensor.dim() == 4:  # Module.to(memory_format) fails on 5-D ones
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    begin_training(model)
    if world.size > 1 and config.distributed.strategy == "none":
        message = f"`none` trains in one process, but {world.size} were started; use auto or ddp"
        raise ConfigError.single("distributed.strategy", message)
    if world.size > 1 and config.distributed.sync_batchnorm:
        if world.device.type != "cuda":
            message = "torch's SyncBatchNorm needs CUDA, but this run is on the CPU"
            raise ConfigError.single("distributed.sync_batchnorm", message)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.trainer.compile:
        model.compile(dynamic=False)  # with dynamic shapes one batch size changes the bits of another
    return model


def _loss(config: Config, world: World, key: str) -> Loss | None:
    spec = getattr(config, key)
    if spec is None:
        return None
    seed_everything(config.seed)
    with building(key):
        return Loss(build_callable(spec)).to(world.device)


def _with_task(model: nn.Module, loss: Loss | None, val_loss: Loss | None, config: Config) -> tuple[Modules, Task]:
    parts: dict[str, Any] = {}
    if config.task is not None:
        seed_everything(config.seed)
        with building("task"):
            given: Any = build(config.task)
        parts["task"] = given
    else:
        assert loss is not None
        given = Supervised(loss, val_loss)
        functions = {"loss": loss.function} | ({} if val_loss is None else {"val_loss": val_loss.function})
        parts = {name: function for name, function in functions.items() if not _is_torchs(function)}
    modules = Modules(model, **parts)
    check_parameters(modules)
    return modules, adapted(given, config)


def _is_torchs(function: Any) -> bool:
    """One of torch's own losses, whose buffers are arguments of the config."""
    own = isinstance(function, nn.Module) and type(function).__module__.startswith("torch.nn.")
    return own and next(function.parameters(), None) is None


def adapted(task: Any, config: Config) -> Task:
    """A task as the engine calls it: of the whole batch, or with a loss for each of several optimizers, where it is one.

    Raises:
        ConfigError: it lacks a method that it needs for that.
    """
    whole, named = config.trainer.whole_batch, is_named(config.optimizer)
    if whole is True or (whole == "auto" and getattr(task, "whole_batch", False)):
        if not (callable(getattr(task, "outputs", None)) and callable(getattr(task, "loss", None))):
            message = (
                "it needs a task with outputs(model, batch), which returns (outputs, targets), and loss(outputs, targets), or "
                "none at all and a `loss`"
            )
            raise ConfigError.single("trainer.whole_batch", message)
        if named and minimizes_by_name(task):
            message = "a loss of the whole batch is one for all optimizers, but the task's step takes the name of one"
            raise ConfigError.single("trainer.whole_batch", message)
        return WholeBatchTask(task)
    if not callable(getattr(task, "step", None)) or not callable(getattr(task, "predict", None)):
        message = (
            "it has outputs and loss, which are for losses that compare samples with each other: set trainer.whole_batch=true, "
            "or define step(model, batch) and predict(model, batch)"
        )
        raise ConfigError.single("task", message)
    if named and minimizes_by_name(task):
        return SeveralLosses(task, list(config.optimizer))
    if named and hasattr(task, "moves"):
        message = (
            "its `moves` says which optimizers move in a step, but its step(model, batch) has one loss for all: give it a "
            "third parameter, the name of the optimizer, or remove `moves`"
        )
        raise ConfigError.single("task", message)
    return task


class Saved(Protocol):
    """A checkpoint (`checkpoint.store.Found`), or what one would hold."""

    location: str
    parts: list[str]

    def load(self, part: str) -> Any:
        """The state tree of a part."""


def load_weights(modules: Modules, found: Saved, fresh: Sequence[str] = (), frozen: Frozen | None = None) -> None:
    """Load a checkpoint's weights into a model, and into its loss or task where it has any; buffers are rank 0's.

    Args:
        fresh: `loss` or `task`, whose config has changed: what the config gives of them stays as it was built.
        frozen: of a model that trains: what this checkpoint leaves out may have been trained since.

    Raises:
        ConfigError: they don't fit it, or what the checkpoint leaves out as frozen isn't the same in this model.
        CorruptedError: the bytes aren't those that were saved.
    """
    if "ranks" in found.parts:
        modules.load_values(found.load("ranks")[0])
    if "task" in found.parts and len(list(modules.children())) > 1:
        constants = found.load("trainer").get("constants", []) if fresh else []
        modules.load_task_state(found.load("task"), keep=constants)
    try:
        state = found.load("model")
        if frozen is not None:
            frozen.make_way(state)
        if "frozen" in found.parts:
            load_trained(modules.model, state, found.load("frozen"), found.location)
        else:
            modules.model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError.single("model", f"the weights in {found.location} don't fit this model: {error}") from None


def check_batchnorm(built: ModelParts, plan: Plan, micro: int) -> None:
    """Check that no forward gives BatchNorm a single sample, and that SyncBatchNorm's ranks run equally many forwards.

    Args:
        micro: maximum number of samples per forward.

    Raises:
        ConfigError: names sizes that work.
    """
    world_size, modules = built.world.size, list(built.model.modules())
    if world_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        _check_equal_counts(plan, world_size, micro)
    if not any(isinstance(module, _BATCHNORMS) and module.training for module in modules):
        return
    if plan.smallest_micro_batch(world_size, micro) > 1:
        return
    good: list[str] = []
    for size in range(max(2, plan.global_batch_size - 8), min(plan.global_batch_size + 8, plan.length) + 1):
        candidate = replace(plan, global_batch_size=size)
        if candidate.smallest_micro_batch(world_size, max(micro, 2)) > 1:
            good.append(str(size))
    raise ConfigError.single(
        "data.global_batch_size",
        f"with {plan.length} samples, global batches of {plan.global_batch_size}, {world_size} process(es) and micro-batches "
        f"of {micro}, some forward gets a single sample, over which BatchNorm can't take statistics; sizes that work: "
        f"{', '.join(good[:4]) or f'{2 * world_size} or more'} (with micro-batches of at least 2), or data.drop_last=true",
    )


def _check_equal_counts(plan: Plan, world_size: int, micro: int) -> None:
    """SyncBatchNorm is a collective in every forward: with unequal numbers of forwards, ranks would wait forever."""
    for size in (plan.batch_samples(0), plan.batch_samples(plan.steps_per_epoch - 1)):
        counts = [len(plan.slices(size, rank, world_size, micro)) for rank in range(world_size)]
        if len({*counts}) > 1:
            raise ConfigError.single(
                "distributed.sync_batchnorm",
                f"SyncBatchNorm needs the same number of forwards on every rank, but for a step of {size} samples the "
                f"{world_size} ranks run {', '.join(map(str, counts))} micro-batches of at most {micro}: make "
                f"data.global_batch_size a multiple of {world_size * micro}, with data.drop_last=true, or change "
                f"trainer.micro_batch_size",
            )


def check_watched(built: ModelParts, keep_best: tuple[str, str] | None) -> None:
    """Check that monitored metrics are computed by the evaluation. (Names that only a result shows are known after the first.)

    Raises:
        ConfigError: it isn't; names the metrics there are.
    """
    config = built.config
    if config.data.val is None or any(entry.open for entry in built.metrics):
        return
    known = ["val/loss", *(f"val/{entry.primary}" for entry in built.metrics)]
    own = isinstance(built.task, Supervised) and built.task.val_loss.exact  # torch's own gives one
    known += [name.replace("val/", "val/raw_") for name in known if config.trainer.ema_decay is not None]
    for key, name in watched(config, keep_best).items():
        if name not in known and (own or not name.replace("raw_", "").startswith("val/loss/")):
            raise ConfigError.single(key, f"{name} isn't computed; the config gives {', '.join(known)}")


def watched(config: Config, keep_best: tuple[str, str] | None) -> dict[str, str]:
    """The metrics that are monitored, by the key that names them."""
    rule, schedule = config.trainer.stop_when, config.scheduler
    specs: dict[str, Any] = (
        {f"scheduler.{name}": spec for name, spec in (schedule or {}).items()}
        if is_named(schedule)
        else {"scheduler": schedule}
    )
    names = {
        "checkpoint.keep_best": keep_best[0] if keep_best else None,
        "trainer.stop_when.metric": rule.metric if rule else None,
        **{f"{key}.metric": spec.get("metric") for key, spec in specs.items() if isinstance(spec, dict)},
    }
    return {key: name for key, name in names.items() if name is not None}


def splitting_changes(built: ModelParts) -> str:
    """What smaller micro-batches change beside the memory: "" where they give the same gradient.

    A loss that isn't torch's own shows its denominator when it is called: before that it isn't known.
    """
    for module in built.model.modules():
        drops = [getattr(module, name, 0.0) for name in ("p", "dropout") if not isinstance(module, nn.Sequential)]
        if isinstance(module, (*_BATCHNORMS, nn.SyncBatchNorm)) and module.training:
            return "BatchNorm would then take its statistics over fewer samples"
        if any(isinstance(p, float) and p > 0 for p in drops):
            return "dropout would then use different random numbers"
    if not isinstance(built.task, WholeBatchTask) and (built.loss is None or not built.loss.exact):
        return "it isn't known that the loss is then still the mean over the global batch"
    return ""
