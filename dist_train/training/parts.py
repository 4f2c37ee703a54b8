"""Everything that a config names, built: what training, evaluation and prediction are made of. Nothing is written here."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_train.config.components import build, build_callable
from dist_train.config.errors import ConfigError
from dist_train.config.fields import Duration
from dist_train.data.augment import Augmentation
from dist_train.data.loader import EvalLoader, TrainLoader, build_plan
from dist_train.data.plan import Plan, parts, smallest_part
from dist_train.models.layers import begin_training
from dist_train.step.ema import EMA, OwnAverage
from dist_train.step.modules import Modules
from dist_train.step.optim import averages, build_optimizer
from dist_train.step.parameters import check_optimizer, check_parameters
from dist_train.step.precision import Precision, agreed, resolve_precision
from dist_train.step.reduce import Reducer, reducer_for
from dist_train.step.schedule import Schedule, Span
from dist_train.step.step import Stepper
from dist_train.task.batch import move_batch
from dist_train.task.losses import Loss
from dist_train.task.metrics import Metric, Whole, build_metrics, is_lower_better
from dist_train.task.samplewise import Parted, parted
from dist_train.task.task import Supervised, Task
from dist_train.training.callbacks import Callback
from dist_train.training.due import StopWhen, in_steps
from dist_train.training.evaluate import Evaluator
from dist_train.training.forgotten import Trainee, forgotten_at_start
from dist_train.training.prepare import (
    build_dataset,
    build_model,
    building,
    eval_loader,
    reading_of,
    seed_everything,
)
from dist_train.views.boundary import BoundaryFrames
from dist_train.views.network import Pictures

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Parts:
    """The parts of a config, each built when it is first asked for: an evaluation builds no optimizer.

    Args:
        fresh: the run begins, so that `transfer.weights` are loaded; otherwise a checkpoint's follow.
        fits: with `trainer.micro_batch_size: auto`, the most samples of a forward, where memory has run out before.
        horizon: the optimizer steps that the schedule has spanned so far; None: the run begins.

    Attributes:
        notes: lines for the person, on what `transfer` did to the model.
        memory_format: that of images, once the model is built.
        parted: how the loss differs on whole batches, once the first one has shown that it does.
        forgotten: what training leaves behind that no checkpoint holds, once the first one has shown that it does.

    Every part raises ConfigError, naming its key, where it can't be built.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        fresh: bool = False,
        fits: int | None = None,
        horizon: int | None = None,
    ):
        self.config, self.world = config, world
        self.fresh, self.fits, self._horizon = fresh, fits, horizon
        self.notes: list[str] = []
        self.memory_format: torch.memory_format | None = None
        self.parted: Parted | None = None
        self.forgotten = ""
        if config.distributed.deterministic is True:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's BLAS is first used
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False

    def build(self) -> None:
        """Build all that training needs, in an order that never changes: whatever is wrong with the config shows now."""
        for name in ("model", "datasets", "loss", "task", "modules", "metrics", "callbacks", "plan"):
            getattr(self, name)
        self._check_batchnorm()
        self._check_watched()
        for name in ("train_loader", "eval_loaders", "optimizer", "schedule"):
            getattr(self, name)
        self.modules.take_in(self.optimizer)
        self.modules.agree(self.world)
        for name in ("ema", "stop_when"):
            getattr(self, name)

    # What every command needs.

    @cached_property
    def model(self) -> nn.Module:
        """The model on its device, in the memory format and with the BatchNorm that the config asks for."""
        config, world = self.config, self.world
        model = build_model(config, world, fresh=self.fresh, notes=self.notes)
        channels_last = config.trainer.channels_last
        if channels_last == "auto":
            convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
            channels_last = world.device.type == "cuda" and convolutional
        self.memory_format = torch.channels_last if channels_last else None
        model = model.to(world.device)
        for tensor in (*model.parameters(), *model.buffers()):
            if channels_last and tensor.dim() == 4:  # Module.to(memory_format) fails on 5-D ones
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        begin_training(model)
        if world.size > 1 and config.distributed.strategy == "none":
            message = f"`none` trains one process alone, but {world.size} were started; use auto or ddp"
            raise ConfigError.single("distributed.strategy", message)
        if world.size > 1 and config.distributed.sync_batchnorm:
            if world.device.type != "cuda":
                message = "torch's SyncBatchNorm needs CUDA, but this run is on the CPU"
                raise ConfigError.single("distributed.sync_batchnorm", message)
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.trainer.compile:
            model.compile(dynamic=False)  # with dynamic shapes one batch size changes the bits of another
        return model

    @cached_property
    def loss(self) -> Loss | None:
        """None where the task computes it."""
        if self.config.loss is None:
            return None
        seed_everything(self.config.seed)
        with building("loss"):
            return Loss(build_callable(self.config.loss)).to(self.world.device)

    @cached_property
    def task(self) -> Task:
        """How a batch becomes a loss."""
        if self.config.task is None:
            assert self.loss is not None
            return Supervised(self.loss)
        seed_everything(self.config.seed)
        with building("task"):
            return build(self.config.task)

    @cached_property
    def modules(self) -> Modules:
        """The model, and what the loss or the task has of parameters, buffers and numbers."""
        if self.config.task is not None:
            modules = Modules(self.model, task=self.task)
        else:
            function = self.loss.function if self.loss is not None else None
            own = isinstance(function, nn.Module) and type(function).__module__.startswith("torch.nn.")
            torchs = own and next(function.parameters(), None) is None  # type: ignore[union-attr]
            # The buffers of torch's own losses are arguments of the config.
            modules = Modules(self.model) if torchs else Modules(self.model, loss=function)
        check_parameters(modules)
        return modules.to(self.world.device)

    @cached_property
    def metrics(self) -> list[Metric]:
        """What an evaluation measures beside the loss."""
        with building("metrics"):
            return build_metrics(self.config.metrics, self.loss)

    @cached_property
    def precision(self) -> Precision:
        """What the forward runs in."""
        return agreed(resolve_precision(self.config.trainer.precision, self.world.device), self.world)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Evaluates the model, without the DDP wrapper."""
        return Evaluator(
            self.modules,
            self.task,
            self.metrics,
            world=self.world,
            precision=self.precision,
            prepare=self.move,
            seed=self.config.seed,
        )

    def trainee(self) -> Trainee:
        """The model and its task, as far as their forwards need."""
        return Trainee(self.modules, self.task, self.precision, self.world.device, self.config.seed)

    def move(self, batch: Any) -> Any:
        """The batch on the model's device."""
        return move_batch(batch, self.world.device, self.memory_format)

    # What training needs beside it.

    @cached_property
    def datasets(self) -> dict[str, Any]:
        """Those that the config has, of train, val and test."""
        splits = [split for split in ("train", "val", "test") if getattr(self.config.data, split) is not None]
        return {split: build_dataset(self.config, split, self.world) for split in splits}

    @cached_property
    def callbacks(self) -> list[Callback]:
        """The config's, and our own."""
        with building("callbacks"):
            callbacks = [*(build(spec) for spec in self.config.callbacks), BoundaryFrames()]
        if self.config.tracking.tensorboard:
            callbacks.append(Pictures(self.config.tracking, self.model))
        return callbacks

    @cached_property
    def plan(self) -> Plan:
        """The order of the training samples."""
        with building("data"):
            return build_plan(self.datasets["train"], seed=self.config.seed, config=self.config.data)

    @cached_property
    def micro_batch_size(self) -> int:
        """The most samples of one forward."""
        share = -(-self.plan.global_batch_size // self.world.size)
        wanted = self.config.trainer.micro_batch_size
        return min(share, (self.fits or share) if wanted == "auto" else int(wanted))

    @cached_property
    def augmentation(self) -> Augmentation | None:
        """What is done to a training batch on the device."""
        with building("data.augment"):
            augment = [build(spec) for spec in self.config.data.augment]
        return Augmentation(augment) if augment else None

    @cached_property
    def train_loader(self) -> TrainLoader:
        """The training batches of this rank."""
        neighbours = self.augmentation.neighbours if self.augmentation is not None else 0
        reading, micro = reading_of(self.config, self.world), self.micro_batch_size
        with building("data"):
            return TrainLoader(
                self.datasets["train"], self.plan, reading, micro_batch_size=micro, neighbours=neighbours
            )

    @cached_property
    def eval_loaders(self) -> dict[str, EvalLoader]:
        """The loaders of val and test, where the config has them."""
        held_out = [(split, dataset) for split, dataset in self.datasets.items() if split != "train"]
        return {split: eval_loader(self.config, self.world, dataset, split) for split, dataset in held_out}

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over the parameters that train."""
        config, world = self.config, self.world
        with building("optimizer"):
            optimizer = build_optimizer(config.optimizer, self.modules, world.device)
        if averages(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
        check_optimizer(
            optimizer,
            self.modules,
            world.device,
            world_size=world.size,
            skips=config.trainer.on_nonfinite == "skip",
            scaled=self.precision.name == "fp16",
        )
        return optimizer

    @cached_property
    def horizon(self) -> int | None:
        """The optimizer steps that a schedule spans: `scheduler.horizon`, else the duration; None if that is a time."""
        asked = self.config.scheduler.get("horizon") if isinstance(self.config.scheduler, dict) else None
        if not asked and self._horizon is not None:
            return self._horizon
        duration = Duration.parse(str(asked)) if asked else self.config.trainer.duration
        return in_steps(duration, self.plan.steps_per_epoch)

    @cached_property
    def schedule(self) -> Schedule | None:
        """The schedule of the learning rate."""
        if self.config.scheduler is None:
            return None
        asked = self.config.scheduler.get("metric") if isinstance(self.config.scheduler, dict) else None
        metric, mode = self.keep_best or ("val/loss", "min")
        if asked not in (None, metric):
            metric, mode = asked, "min" if is_lower_better(asked, self.metrics) else "max"
        steps = self.plan.steps_per_epoch
        span = Span(self.horizon, steps, in_steps(self.config.trainer.duration, steps))
        with building("scheduler"):
            schedule = Schedule(self.config.scheduler, self.optimizer, span, (metric, mode))
        if schedule.on_plateau and ("val" not in self.datasets or self.config.trainer.evaluate_every is None):
            message = "ReduceLROnPlateau looks at evaluations during training: set data.val and trainer.evaluate_every"
            raise ConfigError.single("scheduler", message)
        return schedule

    def keep_horizon(self, horizon: int | None) -> None:
        """Let the schedule span what it did when the run was begun, unless the config says it."""
        asked = isinstance(self.config.scheduler, dict) and self.config.scheduler.get("horizon")
        if not asked and horizon not in (None, self.horizon):
            self.horizon = horizon
            for name in ("optimizer", "schedule"):  # a schedule leaves its traces in the optimizer
                self.__dict__.pop(name, None)

    @cached_property
    def ema(self) -> EMA | None:
        """The average of the weights."""
        decay = self.config.trainer.ema_decay
        if averages(self.optimizer):
            if decay is not None:
                message = f"{type(self.optimizer).__name__} averages the weights itself: leave it null"
                raise ConfigError.single("trainer.ema_decay", message)
            return OwnAverage(self.modules, lambda: self.optimizer)
        return EMA(self.modules, decay) if decay is not None else None

    @cached_property
    def stop_when(self) -> StopWhen | None:
        """The rule that ends the run early."""
        rule = self.config.trainer.stop_when
        if rule is None:
            return None
        return StopWhen(rule, self.plan.steps_per_epoch, is_lower_better(rule.metric, self.metrics))

    @cached_property
    def keep_best(self) -> tuple[str, str] | None:
        """The metric that decides which checkpoint is best, and `min` or `max`."""
        choice = self.config.checkpoint.keep_best
        if choice is None or "val" not in self.datasets:
            return None
        mode, _, name = str(choice).rpartition(" ")
        if name == "auto":
            name = f"val/{self.metrics[0].name if self.metrics else 'loss'}"
        return name, mode or ("min" if is_lower_better(name, self.metrics) else "max")

    @cached_property
    def stepper(self) -> Stepper:
        """Runs optimizer steps."""
        config, world, scaler = self.config, self.world, self.precision.scaler()
        return Stepper(
            self.modules,
            self.optimizer,
            self.new_reducer(scaler),
            scaler=scaler,
            device=world.device,
            seed=config.seed,
            summed=getattr(self.task, "summed", False),
            prepare=self._prepare,
            indices_of=self.plan.batch,
            clip_norm=config.trainer.clip_grad_norm,
            clip_value=config.trainer.clip_grad_value,
            skip=config.trainer.on_nonfinite == "skip",
            look=self._look if self._pieces > 1 or self.fresh else None,
        )

    def new_reducer(self, scaler: torch.amp.GradScaler | None) -> Reducer:
        """For the parameters that train now."""
        return reducer_for(self.modules, self.task, self.precision, scaler, self.world, self.config.distributed)

    def _prepare(self, batch: Any, epoch: int, indices: Any) -> Any:
        """A training micro-batch, moved and augmented; the draws depend on (seed, epoch, sample)."""
        batch = self.move(batch)
        if self.augmentation is None:
            return batch
        return self.augmentation(batch, seed=self.config.seed, epoch=epoch, indices=indices)

    # What micro-batches change.

    def what_splitting_changes(self) -> str:
        """What smaller micro-batches change beside the memory: "" where they give the same gradient.

        A loss that isn't torch's own shows its denominator when it is called: before that it isn't known.
        """
        for module in self.model.modules():
            drops = [getattr(module, name, 0.0) for name in ("p", "dropout") if not isinstance(module, nn.Sequential)]
            if isinstance(module, _NORMS) and module.training:
                return "BatchNorm then takes its statistics over fewer samples"
            if any(isinstance(p, float) and p > 0 for p in drops):
                return "dropout then draws other numbers"
        if self.loss is None or not self.loss.exact:
            return "it isn't known that the loss is then still the mean over the global batch"
        return ""

    def _check_equal_counts(self) -> None:
        """SyncBatchNorm is a collective in every forward: with unequal numbers of them, ranks would wait forever."""
        plan, world_size, micro = self.plan, self.world.size, self.micro_batch_size
        for size in (plan.batch_samples(0), plan.batch_samples(plan.steps_per_epoch - 1)):
            counts = [len(parts(size, rank, world_size, micro)) for rank in range(world_size)]
            if len({*counts}) > 1:
                raise ConfigError.single(
                    "distributed.sync_batchnorm",
                    f"SyncBatchNorm needs as many forwards on every rank, but of a step of {size} samples the {world_size} ranks "
                    f"run {', '.join(map(str, counts))} micro-batches of at most {micro}: make data.global_batch_size a "
                    f"multiple of {world_size * micro}, with data.drop_last=true, or change trainer.micro_batch_size",
                )

    @property
    def _pieces(self) -> int:
        """The micro-batches that a global batch is cut into, over all ranks."""
        return -(-self.plan.global_batch_size // self.micro_batch_size)

    def _look(self, batch: Any, length: int, samples: int) -> None:
        """Find out on the first micro-batch of a start whether the loss is one of samples; all ranks take as many of theirs.

        On that of a run, rank 0 alone also finds out whether a checkpoint will hold all that training leaves behind.
        """
        if self.fresh and self.world.is_main:
            self.forgotten = forgotten_at_start(self.trainee(), batch, length)
        if self._pieces == 1:
            return
        sizes = [
            min(
                (cut.stop - cut.start for cut in parts(samples, rank, self.world.size, self.micro_batch_size)),
                default=0,
            )
            for rank in range(self.world.size)
        ]
        with self.evaluator.serving(average=False):
            self.parted = parted(self.task, self.model, batch, length=length, samples=min(sizes))

    def inexactness(self) -> str | None:
        """What is to be said of a loss that isn't one of samples, or whose denominator isn't known, once it has been called."""
        count = self._pieces
        if (found := self.parted) is not None:
            what = (
                f"the loss {self.loss.name}"
                if self.loss is not None and self.config.task is None
                else "the task's loss"
            )
            own = " unless it gathers the outputs of all ranks itself" if count == self.world.size > 1 else ""
            return (
                f"{what} isn't a sum over samples: {found.samples} of them at once give {found.whole:.4g}, in two halves "
                f"{found.halves:.4g}. It compares samples with each other, or divides by something else than the weight that "
                f"it returns; a step is cut into {count} micro-batches here (over {self.world.size} process(es)), so training "
                f"differs from that on whole batches, and with the cut{own}. One process with trainer.micro_batch_size="
                f"{self.plan.global_batch_size} takes them whole"
            )
        if self.loss is None or self.loss.exact is not False or count == 1:
            return None
        return (
            f"the loss {self.loss.name} returns one number, taken for a mean over samples: over {count} micro-batches a "
            "step the gradient is exact only if it is one. Return (sum, weight), or one value a sample, to be sure"
        )

    def _check_watched(self) -> None:
        """What is watched is a figure of the evaluation; what torchmetrics' classes give shows in the first one only."""
        if "val" not in self.datasets or any(isinstance(metric, Whole) for metric in self.metrics):
            return
        known = ["val/loss", *(f"val/{metric.name}" for metric in self.metrics)]
        known += [name.replace("val/", "val/raw_") for name in known if self.config.trainer.ema_decay is not None]
        rule, schedule = self.config.trainer.stop_when, self.config.scheduler
        watched = {
            "checkpoint.keep_best": self.keep_best[0] if self.keep_best else None,
            "trainer.stop_when.metric": rule.metric if rule else None,
            "scheduler.metric": schedule.get("metric") if isinstance(schedule, dict) else None,
        }
        for key, name in watched.items():
            if name is not None and name not in known:
                raise ConfigError.single(key, f"{name} isn't computed; the config gives {', '.join(known)}")

    def _check_batchnorm(self) -> None:
        """BatchNorm can't take statistics over one sample: if some forward of training would get one, name sizes that work."""
        plan, world_size, micro = self.plan, self.world.size, self.micro_batch_size
        if world_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in self.model.modules()):
            self._check_equal_counts()
        trained = (module for module in self.model.modules() if isinstance(module, _NORMS[:3]) and module.training)
        if next(trained, None) is None or smallest_part(plan, world_size, micro) > 1:
            return
        good: list[str] = []
        for size in range(max(2, plan.global_batch_size - 8), min(plan.global_batch_size + 8, plan.length) + 1):
            candidate = Plan(plan.seed, plan.length, size, plan.shuffle, plan.drop_last)
            if smallest_part(candidate, world_size, max(micro, 2)) > 1:
                good.append(str(size))
        raise ConfigError.single(
            "data.global_batch_size",
            f"with {plan.length} samples, global batches of {plan.global_batch_size}, {world_size} process(es) and micro-batches "
            f"of {micro}, some forward gets a single sample, over which BatchNorm can't take statistics; sizes that work: "
            f"{', '.join(good[:4]) or f'{2 * world_size} or more'} (with micro-batches of at least 2), or data.drop_last=true",
        )
