"""What the first micro-batch of a start shows of a config's loss and model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_train.building.unsaved import unsaved_at_start
from dist_train.task.samplewise import BatchDependence, batch_dependence
from dist_train.task.task import WholeBatchTask

if TYPE_CHECKING:
    from dist_train.training.meter import Meter
    from dist_train.training.parts import Parts


class FirstBatch:
    """Whether the loss is a sum over samples, so that micro-batches give the gradient of the global batch (`samplewise`); and of
    a fresh run, whether a checkpoint holds all that training changes (`unsaved`). The meter counts its operations.
    """

    def __init__(self, built: Parts, fresh: bool, meter: Meter):
        self.parts, self.fresh, self.meter = built, fresh, meter
        self.pieces = -(-built.plan.global_batch_size // built.micro_batch_size)  # of a global batch, over all ranks
        self.needed = self.pieces > 1 or fresh or meter.needed
        self._dependence: BatchDependence | None = None
        self._unsaved = ""

    def look(self, batch: Any, length: int, samples: int) -> None:
        """Examine a micro-batch of `length` samples of a step of `samples`; all ranks call it at their first, while `needed`."""
        self.needed = False
        if self.meter.needed:
            self.meter.look(batch, length)
        built, size = self.parts, self.parts.world.size
        if self.fresh and built.world.is_main:
            self._unsaved = unsaved_at_start(built, batch, length)
        if self.pieces == 1 or isinstance(built.task, WholeBatchTask):
            return
        of_ranks = [built.plan.slices(samples, rank, size, built.micro_batch_size) for rank in range(size)]
        least = min(min((part.stop - part.start for part in mine), default=0) for mine in of_ranks)
        with built.evaluator.serving(ema=False):
            self._dependence = batch_dependence(built.task, built.model, batch, length=length, samples=least)

    def warnings(self) -> list[str]:
        """What to warn of after the first step, when the loss has been called."""
        return list(filter(None, (self._inexactness(), self._unsaved)))

    def _inexactness(self) -> str:
        built, count = self.parts, self.pieces
        loss, world_size = built.loss, built.world.size
        if (found := self._dependence) is not None:
            what = f"the loss {loss.name}" if loss is not None and built.config.task is None else "the task's loss"
            own = " unless it gathers the outputs of all ranks itself" if count == world_size > 1 else ""
            return (
                f"{what} isn't a sum over samples: {found.samples} of them at once give {found.whole:.4g}, in two halves "
                f"{found.halves:.4g}. It compares samples with each other, or divides by something else than the weight that "
                f"it returns; a step is split into {count} micro-batches here (over {world_size} process(es)), so training "
                f"differs from that on unsplit batches, and depends on the split{own}. trainer.whole_batch=true computes it of "
                "the whole global batch (of a task by its outputs(model, batch) and loss(outputs, targets))"
            )
        if loss is None or loss.exact is not False or count == 1:
            return ""
        return (
            f"the loss {loss.name} returns one number, taken for a mean over samples: over {count} micro-batches a "
            "step the gradient is exact only if it is one. Return (sum, weight), or one value per sample, to be sure"
        )
