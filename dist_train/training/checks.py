"""What can be known of a config only once its parts are built, and what only the first micro-batch shows of its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from dist_train.config.errors import ConfigError
from dist_train.data.plan import Plan, parts, smallest_part
from dist_train.task.metrics import Whole
from dist_train.task.samplewise import Parted, parted
from dist_train.training.forgotten import forgotten_at_start

if TYPE_CHECKING:
    from dist_train.training.model import ModelParts
    from dist_train.training.parts import Parts

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_batchnorm(built: ModelParts, plan: Plan, micro: int) -> None:
    """BatchNorm takes statistics of a forward's samples: each has more than one, and SyncBatchNorm's ranks run equally many.

    Args:
        micro: the most samples of a forward.

    Raises:
        ConfigError: names sizes that work.
    """
    world_size, modules = built.world.size, list(built.model.modules())
    if world_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        _check_equal_counts(plan, world_size, micro)
    if not any(isinstance(module, _BATCHNORMS) and module.training for module in modules):
        return
    if smallest_part(plan, world_size, micro) > 1:
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


def _check_equal_counts(plan: Plan, world_size: int, micro: int) -> None:
    """SyncBatchNorm is a collective in every forward: with unequal numbers of forwards, ranks would wait forever."""
    for size in (plan.batch_samples(0), plan.batch_samples(plan.steps_per_epoch - 1)):
        counts = [len(parts(size, rank, world_size, micro)) for rank in range(world_size)]
        if len({*counts}) > 1:
            raise ConfigError.single(
                "distributed.sync_batchnorm",
                f"SyncBatchNorm needs as many forwards on every rank, but of a step of {size} samples the {world_size} ranks "
                f"run {', '.join(map(str, counts))} micro-batches of at most {micro}: make data.global_batch_size a "
                f"multiple of {world_size * micro}, with data.drop_last=true, or change trainer.micro_batch_size",
            )


def check_watched(built: ModelParts, keep_best: tuple[str, str] | None) -> None:
    """What is watched is computed by an evaluation. (What torchmetrics' classes give is known after the first one only.)

    Raises:
        ConfigError: it isn't; names the metrics there are.
    """
    config = built.config
    if config.data.val is None or any(isinstance(metric, Whole) for metric in built.metrics):
        return
    known = ["val/loss", *(f"val/{metric.name}" for metric in built.metrics)]
    known += [name.replace("val/", "val/raw_") for name in known if config.trainer.ema_decay is not None]
    rule, schedule = config.trainer.stop_when, config.scheduler
    watched = {
        "checkpoint.keep_best": keep_best[0] if keep_best else None,
        "trainer.stop_when.metric": rule.metric if rule else None,
        "scheduler.metric": schedule.get("metric") if isinstance(schedule, dict) else None,
    }
    for key, name in watched.items():
        if name is not None and name not in known:
            raise ConfigError.single(key, f"{name} isn't computed; the config gives {', '.join(known)}")


def splitting_changes(built: ModelParts) -> str:
    """What smaller micro-batches change beside the memory: "" where they give the same gradient.

    A loss that isn't torch's own shows its denominator when it is called: before that it isn't known.
    """
    for module in built.model.modules():
        drops = [getattr(module, name, 0.0) for name in ("p", "dropout") if not isinstance(module, nn.Sequential)]
        if isinstance(module, (*_BATCHNORMS, nn.SyncBatchNorm)) and module.training:
            return "BatchNorm then takes its statistics over fewer samples"
        if any(isinstance(p, float) and p > 0 for p in drops):
            return "dropout then draws other numbers"
    if built.loss is None or not built.loss.exact:
        return "it isn't known that the loss is then still the mean over the global batch"
    return ""


class FirstBatch:
    """What the first micro-batch of a start shows: whether the loss is a sum over samples, so that micro-batches give the
    gradient of the global batch (`samplewise`); and of a run, whether a checkpoint holds all that training changes (`forgotten`).
    """

    def __init__(self, built: Parts, fresh: bool):
        self.parts, self.fresh = built, fresh
        self.pieces = -(-built.plan.global_batch_size // built.micro_batch_size)  # of a global batch, over all ranks
        self.needed = self.pieces > 1 or fresh
        self._parted: Parted | None = None
        self._forgotten = ""

    def look(self, batch: Any, length: int, samples: int) -> None:
        """Look at a micro-batch of `length` samples, of a step of `samples`; all ranks call it at their first."""
        built, size = self.parts, self.parts.world.size
        if self.fresh and built.world.is_main:
            self._forgotten = forgotten_at_start(built, batch, length)
        if self.pieces == 1:
            return
        of_ranks = [parts(samples, rank, size, built.micro_batch_size) for rank in range(size)]
        least = min(min((part.stop - part.start for part in mine), default=0) for mine in of_ranks)
        with built.evaluator.serving(ema=False):
            self._parted = parted(built.task, built.model, batch, length=length, samples=least)

    def warnings(self) -> list[str]:
        """What to warn of after the first step, when the loss has been called."""
        return list(filter(None, (self._inexactness(), self._forgotten)))

    def _inexactness(self) -> str:
        built, count = self.parts, self.pieces
        loss, world_size = built.loss, built.world.size
        if (found := self._parted) is not None:
            what = f"the loss {loss.name}" if loss is not None and built.config.task is None else "the task's loss"
            own = " unless it gathers the outputs of all ranks itself" if count == world_size > 1 else ""
            return (
                f"{what} isn't a sum over samples: {found.samples} of them at once give {found.whole:.4g}, in two halves "
                f"{found.halves:.4g}. It compares samples with each other, or divides by something else than the weight that "
                f"it returns; a step is split into {count} micro-batches here (over {world_size} process(es)), so training "
                f"differs from that on whole batches, and with the split{own}. One process with trainer.micro_batch_size="
                f"{built.plan.global_batch_size} takes them whole"
            )
        if loss is None or loss.exact is not False or count == 1:
            return ""
        return (
            f"the loss {loss.name} returns one number, taken for a mean over samples: over {count} micro-batches a "
            "step the gradient is exact only if it is one. Return (sum, weight), or one value a sample, to be sure"
        )
