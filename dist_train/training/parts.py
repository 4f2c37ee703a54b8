"""Everything that a config names, built: what training is made of. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from dist_train.building.frozen import Frozen
from dist_train.building.model import ModelParts, build_model_parts, check_batchnorm, check_watched
from dist_train.building.prepare import build_dataset, build_plan, building, eval_loader, loader_options, named_parts
from dist_train.config.components import build
from dist_train.config.errors import ConfigError
from dist_train.config.fields import Duration, in_steps, is_named
from dist_train.data.augment import Augmentation
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.placement import place_datasets
from dist_train.data.plan import Plan
from dist_train.data.reading import reading_function
from dist_train.data.weighting import sampling_weights
from dist_train.evaluation.evaluate import Evaluator
from dist_train.objective.draws import draws_from_torch_alone
from dist_train.objective.objective import Objective
from dist_train.objective.own_weights import OwnWeights
from dist_train.objective.whole_batch import WholeBatch
from dist_train.optim.ema import EMA, OptimizerEMA
from dist_train.optim.optim import averages_weights, bare_step, build_optimizer
from dist_train.optim.parameters import check_optimizer, takes_closure
from dist_train.optim.schedule import Schedule, Span
from dist_train.reduction.reduce import Reducer, reducer_for
from dist_train.step.several import Optimizers, Owners, Schedules, SeveralSteppers
from dist_train.step.step import Stepper
from dist_train.task.counting import Counting, counted_entries
from dist_train.task.entries import is_lower_better
from dist_train.task.task import OfOptimizer, SeveralLosses, WholeBatchTask
from dist_train.training.callbacks import Callback
from dist_train.training.due import StopWhen

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.data.plan import MicroBatch, StepWork
    from dist_train.runtime.world import World
    from dist_train.training.digests import StepDigests


@dataclass
class Parts(ModelParts):
    """The model, and what training needs besides.

    Attributes:
        datasets: those that the config has, by their split: train, val, test.
        placement: which of them live in the device's memory, for the log.
        plan: the order of the training samples.
        micro_batch_size: maximum number of samples per forward.
        augmentation: what is done to a training batch on the device.
        owners: which parameters each of several optimizers trains.
        eval_loaders: those of val and test, where the config has them.
        horizon: the optimizer steps that the schedule spans; None where the duration is a time.
        frozen: with `checkpoint.what: trained`, the weights that aren't saved.
        keep_best: the metric that decides which checkpoint is the best, and `min` or `max`.
        stop_when: the rule that ends the run early.
        evaluator: of the EMA weights where there are any.
    """

    datasets: dict[str, Any]
    placement: str
    callbacks: list[Callback]
    plan: Plan
    micro_batch_size: int
    augmentation: Augmentation | None
    train_loader: TrainLoader
    eval_loaders: dict[str, EvalLoader]
    optimizer: torch.optim.Optimizer | Optimizers
    owners: Owners | None
    horizon: int | None
    schedule: Schedule | Schedules | None
    ema: EMA | None
    frozen: Frozen | None
    keep_best: tuple[str, str] | None
    stop_when: StopWhen | None
    evaluator: Evaluator

    def learning_rates(self) -> dict[str, float]:
        """The lr of the first parameter group, as `lr`; of several optimizers, as `lr/<name>` of each."""
        if isinstance(self.optimizer, Optimizers):
            return {f"lr/{name}": one.param_groups[0]["lr"] for name, one in self.optimizer.by_name.items()}
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def micro_batch_counts(self, samples: int) -> list[int]:
        """How many micro-batches each rank has in a step of so many samples."""
        size = self.world.size
        return [len(self.plan.slices(samples, rank, size, self.micro_batch_size)) for rank in range(size)]

    @cached_property
    def _as_read(self) -> bool:
        """Whether the model gets micro-batches as they were read."""
        stays = self.world.device.type == "cpu" and self.memory_format is None and named_parts(self.config) is None
        return stays and self.augmentation is None and self.normalize is None

    def prepare(self, micro: MicroBatch, work: StepWork) -> Any:
        """A micro-batch on the device, augmented and normalized; the draws depend on (seed, epoch, sample)."""
        if self._as_read:
            return micro.batch
        if self.augmentation is None:
            return self.move(micro.batch)
        batch = self.to_device(micro.batch)
        return self.augmentation(batch, seed=self.config.seed, epoch=work.epoch, indices=micro.random_keys)


def build_parts(
    config: Config, world: World, *, fresh: bool = False, fits: int | None = None, horizon: int | None = None
) -> Parts:
    """Build all that training needs, always in this order: whatever is wrong with the config shows now.

    Args:
        fresh: the run begins, so that `transfer.weights` are loaded; otherwise a checkpoint's follow.
        fits: with `trainer.micro_batch_size: auto`, the maximum number of samples per forward after memory has run out.
        horizon: the optimizer steps that the schedule has spanned so far; None: the run begins.

    Raises:
        ConfigError: one of them can't be built; names its key.
    """
    built = build_model_parts(config, world, fresh=fresh)
    splits = [split for split in ("train", "val", "test") if getattr(config.data, split) is not None]
    datasets = {split: build_dataset(config, split, world) for split in splits}
    with building("callbacks"):
        callbacks = [build(spec) for spec in config.callbacks]
    options = loader_options(config, world)
    with building("data.weights"):
        weights = sampling_weights(datasets["train"], options)
    with building("data"):
        leaf = _leaf_size(config)
        plan = build_plan(datasets["train"], seed=config.seed, config=config.data, weights=weights, leaf_size=leaf)
    _check_leaf_count(plan, world)
    micro = leaf or _micro_batch_size(config, world, plan, fits)
    counted_entries(config.trainer.train_metrics, built.metrics, built.task)
    keep_best = _keep_best(built)
    check_batchnorm(built, plan, micro)
    check_watched(built, keep_best)
    with building("data.augment"):
        steps = [build(spec) for spec in config.data.augment]
        augmentation = Augmentation(steps, built.normalize) if steps else None
    neighbours = augmentation.neighbours if augmentation is not None else 0
    with building("data.placement"):
        placed, placement = place_datasets(datasets, options)
    with building("data"):
        train_loader = TrainLoader(placed["train"], plan, options, micro_batch_size=micro, neighbours=neighbours)
    held_out = {split: dataset for split, dataset in placed.items() if split != "train"}
    eval_loaders = {split: eval_loader(config, world, dataset, split) for split, dataset in held_out.items()}
    owners = Owners(built.modules, config.optimizer) if is_named(config.optimizer) else None
    optimizer = _optimizers(built, owners) if owners is not None else _optimizer(built, "optimizer", config.optimizer)
    horizon = _horizon(config, plan, horizon)
    schedule = _schedule(built, optimizer, plan, horizon, keep_best)
    for one in optimizer.by_name.values() if isinstance(optimizer, Optimizers) else [optimizer]:
        built.modules.add_optimizer(one)
    built.modules.synchronize(world)
    ema = _ema(built, optimizer, owners)
    frozen = Frozen(built.model, hashed=world.is_main) if config.checkpoint.what == "trained" else None
    stop_when = None
    if (rule := config.trainer.stop_when) is not None:
        stop_when = StopWhen(rule, plan.steps_per_epoch, is_lower_better(rule.metric, built.metrics))
    return Parts(
        **vars(built), datasets=datasets, callbacks=callbacks, plan=plan, micro_batch_size=micro, placement=placement,
        augmentation=augmentation, train_loader=train_loader, eval_loaders=eval_loaders, optimizer=optimizer, owners=owners,
        horizon=horizon, schedule=schedule, ema=ema, frozen=frozen, keep_best=keep_best, stop_when=stop_when,
        evaluator=Evaluator(built, ema),
    )  # fmt: skip


def _leaf_size(config: Config) -> int | None:
    """Samples of the fixed micro-batches of `distributed.reproducibility: bitwise`."""
    micro = config.trainer.micro_batch_size
    return int(micro) if config.distributed.reproducibility == "bitwise" and micro != "auto" else None


def _check_leaf_count(plan: Plan, world: World) -> None:
    """Raises ConfigError: a process would have no micro-batch at all; or one has another size than the others."""
    if plan.leaf_size is None:
        return
    batch, size = plan.global_batch_size, plan.leaf_size
    if batch % size or world.size > batch // size:
        fitting = [one for one in range(1, batch + 1) if batch % one == 0 and batch // one >= world.size]
        wanted = f"expected one of {', '.join(map(str, fitting[-12:]))}" if fitting else "start fewer processes"
        raise ConfigError.single(
            "trainer.micro_batch_size",
            f"with distributed.reproducibility=bitwise a global batch of {batch} samples is micro-batches of {size}, "
            f"{batch / size:g} of them for {world.size} process(es), and each needs at least one: {wanted}",
        )


def _micro_batch_size(config: Config, world: World, plan: Plan, fits: int | None) -> int:
    share = -(-plan.global_batch_size // world.size)
    asked = config.trainer.micro_batch_size
    return min(share, (fits or share) if asked == "auto" else int(asked))


def _keep_best(built: ModelParts) -> tuple[str, str] | None:
    choice = built.config.checkpoint.keep_best
    if choice is None or built.config.data.val is None:
        return None
    mode, _, name = str(choice).rpartition(" ")
    if name == "auto" and is_named(built.config.optimizer) and not built.metrics:
        return None  # the losses of several optimizers may be opposed
    if name == "auto":
        name = f"val/{built.metrics[0].primary if built.metrics else 'loss'}"
    return name, mode or ("min" if is_lower_better(name, built.metrics) else "max")


def _optimizer(built: ModelParts, key: str, spec: Any) -> torch.optim.Optimizer:
    """Over the parameters that require a gradient now."""
    config, world = built.config, built.world
    with building(key):
        optimizer = build_optimizer(spec, built.modules, world.device, key)
    if averages_weights(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    check_optimizer(
        optimizer,
        built.modules,
        world.device,
        world_size=world.size,
        skips=config.trainer.on_nonfinite == "skip",
        scaled=built.precision.name == "fp16",
    )
    return optimizer


def _optimizers(built: ModelParts, owners: Owners) -> Optimizers:
    """Several, in the config's order."""
    made = {}
    for name, spec in built.config.optimizer.items():
        with owners.only(name):
            own = {key: value for key, value in spec.items() if key != "match"}
            made[name] = _optimizer(built, f"optimizer.{name}", own)
        if averages_weights(made[name]):
            message = f"{type(made[name]).__name__} averages the weights itself, which is for one optimizer alone"
            raise ConfigError.single(f"optimizer.{name}", message)
        if takes_closure(made[name]) and not isinstance(built.task, SeveralLosses):
            message = (
                f"{type(made[name]).__name__} computes the gradient several times in a step, so it can't share one with other "
                "optimizers: use it alone, or give it a loss of its own by a task whose step takes the optimizer's name"
            )
            raise ConfigError.single(f"optimizer.{name}", message)
    return Optimizers(made)


def _horizon(config: Config, plan: Plan, before: int | None) -> int | None:
    """`scheduler.horizon`, else what the schedule has spanned before, else the duration."""
    named = is_named(config.scheduler)
    asked = config.scheduler.get("horizon") if isinstance(config.scheduler, dict) and not named else None
    if not asked and before is not None:
        return before
    return in_steps(Duration.parse(str(asked)) if asked else config.trainer.duration, plan.steps_per_epoch)


def _schedule(
    built: ModelParts,
    optimizer: torch.optim.Optimizer | Optimizers,
    plan: Plan,
    horizon: int | None,
    keep_best: tuple[str, str] | None,
) -> Schedule | Schedules | None:
    config = built.config
    if config.scheduler is None:
        return None
    span = Span(horizon, plan.steps_per_epoch, in_steps(config.trainer.duration, plan.steps_per_epoch))
    monitor = keep_best or ("val/loss", "min")
    if not isinstance(optimizer, Optimizers):
        return _one_schedule(built, "scheduler", config.scheduler, optimizer, span, monitor)
    made: dict[str, Schedule] = {}
    for name, one in optimizer.by_name.items():
        spec = config.scheduler.get(name) if is_named(config.scheduler) else config.scheduler
        if spec is not None:
            key = f"scheduler.{name}" if is_named(config.scheduler) else "scheduler"
            made[name] = _one_schedule(built, key, spec, one, span, monitor)
    return Schedules(made)


def _one_schedule(
    built: ModelParts, key: str, spec: Any, optimizer: torch.optim.Optimizer, span: Span, monitor: tuple[str, str]
) -> Schedule:
    config = built.config
    asked = spec.get("metric") if isinstance(spec, dict) else None
    if is_named(config.scheduler) and spec.get("horizon"):  # one scheduler's is in `span` already
        span = span._replace(horizon=span.steps(Duration.parse(str(spec["horizon"]))))
    if asked not in (None, monitor[0]):
        monitor = (asked, "min" if is_lower_better(asked, built.metrics) else "max")
    with building(key):
        schedule = Schedule(spec, optimizer, span, monitor)
    if schedule.on_plateau and (config.data.val is None or config.trainer.evaluate_every is None):
        message = "ReduceLROnPlateau follows evaluations during training: set data.val and trainer.evaluate_every"
        raise ConfigError.single(key, message)
    return schedule


def _ema(built: ModelParts, optimizer: torch.optim.Optimizer | Optimizers, owners: Owners | None) -> EMA | None:
    decay = built.config.trainer.ema_decay
    if not isinstance(optimizer, Optimizers) and averages_weights(optimizer):
        if decay is not None:
            message = f"{type(optimizer).__name__} averages the weights itself: leave it null"
            raise ConfigError.single("trainer.ema_decay", message)
        return OptimizerEMA(built.modules, lambda: optimizer)
    if decay is None:
        return None
    if not isinstance(decay, dict):
        return EMA(built.modules, decay)
    assert owners is not None
    return EMA(built.modules, {p: decay[name] for name, own in owners.parameters.items() if name in decay for p in own})


def losses_of(parts: Parts) -> list[str]:
    """Of several optimizers, each with a loss of its own: their names. Empty where there is one loss."""
    several = isinstance(parts.optimizer, Optimizers) and isinstance(parts.task, SeveralLosses)
    return list(parts.optimizer.by_name) if several else []  # type: ignore[union-attr]


def build_stepper(
    parts: Parts, prepare: Callable[[MicroBatch, StepWork], Any], digests: StepDigests | None = None
) -> Stepper | SeveralSteppers:
    """What runs optimizer steps, for the parameters that train now: to be built after a checkpoint was loaded.

    `prepare` makes the batch that the model gets from a micro-batch of a step; `digests` records what is reduced.
    """

    def make(task: Any, optimizer: Any, name: str = "") -> Stepper:
        objective = _objective(parts, task)
        new_reducer: Callable[[], Reducer] = partial(reducer_for, objective, parts.world, parts.config.distributed)
        if digests is not None:
            new_reducer = digests.watched(new_reducer, objective, name)
        trainer, clips = parts.config.trainer, {}
        for key in ("clip_grad_norm", "clip_grad_value"):
            value = getattr(trainer, key)
            if isinstance(value, dict) and not name:
                message = (
                    "the optimizers share one loss, and so one gradient, which is clipped at once: give one number"
                )
                raise ConfigError.single(f"trainer.{key}", message)
            clips[key] = value.get(name) if isinstance(value, dict) else value
        config = trainer.model_copy(update=clips)
        return Stepper(objective, optimizer, new_reducer, parts.plan, prepare, config)

    if not losses_of(parts):
        counted = counted_entries(parts.config.trainer.train_metrics, parts.metrics, parts.task)
        return make(Counting(parts.task, counted) if counted else parts.task, parts.optimizer)
    assert parts.owners is not None
    assert isinstance(parts.optimizer, Optimizers)
    assert isinstance(parts.task, SeveralLosses)
    task, by_name = parts.task, parts.optimizer.by_name
    return SeveralSteppers(
        lambda name: make(OfOptimizer(task.task, name), by_name[name], name), parts.owners, task.moves
    )


def _objective(parts: Parts, task: Any) -> Objective:
    scaler, world = parts.precision.scaler(), parts.world
    if isinstance(task, WholeBatchTask):
        return WholeBatch(parts.modules, task, parts.precision, scaler, world, parts.plan)
    if callable(getattr(task, "weights", None)):
        return OwnWeights(parts.modules, task, parts.precision, scaler, world, parts.micro_batch_counts)
    optimizers = parts.optimizer.by_name.values() if isinstance(parts.optimizer, Optimizers) else [parts.optimizer]
    between = [*map(bare_step, optimizers), reading_function(parts.datasets["train"])]
    torch_alone = draws_from_torch_alone(parts.config, parts.modules, parts.task, between)
    return Objective(parts.modules, task, parts.precision, scaler, world.size, torch_alone)
