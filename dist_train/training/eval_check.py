"""What evaluation needs, tried before the first step of a run: a few samples of each split through the model and every metric.

What is wrong with a metric would else show after an epoch, what is wrong with the test data after the whole run.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError, Problem
from dist_train.data.errors import DataError, SampleError
from dist_train.runtime.seeding import undisturbed_generators
from dist_train.step.modules import BufferSnapshot
from dist_train.task.batch import clone_batch
from dist_train.task.entries import MetricEntry, check_names
from dist_train.task.task import modules_in
from dist_train.training.evaluate import Evaluator, class_names
from dist_train.training.model import watched
from dist_train.training.unsaved import copied, is_cheap_to_copy, training_forward
from dist_train.watch import failure

if TYPE_CHECKING:
    from dist_train.data.loader import EvalLoader
    from dist_train.training.model import ModelParts
    from dist_train.training.parts import Parts

# Few, since keys, shapes, types and exceptions show on any number, and reading or computing a whole batch may take seconds;
# spread over the dataset, which is often sorted by class. A metric whose value can't be computed from them gets a whole batch.
SAMPLES, OF_LARGE = 8, 2
LARGE = 10_000_000  # parameters: 8 samples of a ResNet-50 would be 8 % of a start on the CPU, 2 are 4 %
BYTES = 64 << 20  # of a metric's own weights: one with more is used itself, and reset


class _TooFewError(Exception):
    """A metric's value can't be computed from the samples; perhaps from more."""


def check_evaluation(parts: Parts) -> None:
    """Try it for val and test; nothing remains of it: modes, buffers, generators and metrics are as before. All ranks call it.

    Metrics whose size depends on the number of classes get it here. Where the forward fails in training, too, or memory runs out,
    training is left to report that.

    Raises:
        ConfigError: it fails; names the metric (`metrics.<k>`), the data, the task or model, or the key that monitors a metric.
    """
    large = sum(parameter.numel() for parameter in parts.model.parameters()) > LARGE
    for split, loader in parts.eval_loaders.items():
        whole = min(loader.plan.batch_size, loader.plan.length)
        found = _on_every_rank(parts, loader, split, min(OF_LARGE if large else SAMPLES, whole))
        if found.get("too_few"):
            found = _on_every_rank(parts, loader, split, whole)
        if not found:
            return
        for entry in parts.metrics:
            if entry.size is None:
                entry.settle(found["classes"][entry.key])
        if split == "val":
            _check_watched(parts, found["records"])


def _on_every_rank(parts: Parts, loader: EvalLoader, split: str, count: int) -> dict[str, Any]:
    """Every rank tries the same samples, and all agree on what was found: rank 0's, or the first problem."""
    last = count >= min(loader.plan.batch_size, loader.plan.length)
    try:
        mine = _tried(parts, loader, split, count)
    except _TooFewError as error:
        cause = error.__cause__
        assert isinstance(cause, ConfigError)
        mine = {"problems": [vars(problem) for problem in cause.problems]} if last else {"too_few": True}
    except ConfigError as error:
        mine = {"problems": [vars(problem) for problem in error.problems]}
    except torch.OutOfMemoryError:
        mine = {}  # training has a way round to offer
    ranks = parts.world.all_gather(mine)
    for found in ranks:
        if "problems" in found:
            raise ConfigError([Problem(**problem) for problem in found["problems"]])
    return next((found for found in ranks if not found or found.get("too_few")), ranks[0])


def _tried(parts: Parts, loader: EvalLoader, split: str, count: int) -> dict[str, Any]:
    """The records that an evaluation gives, in order, and the number of classes by key of those that have asked for it."""
    device = parts.world.device
    entries = [_private(entry) for entry in parts.metrics]
    private = copied(parts) if is_cheap_to_copy([parts.modules, parts.task]) else parts
    evaluator = Evaluator(replace(private, metrics=entries))
    with (
        undisturbed_generators(device, loader.dataset),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # of a metric: too few samples
        with _failing(f"data.{split}", "reading some samples failed"):
            number, batch = loader.some(count)
        what = f"evaluating {number} samples of data.{split} failed"
        try:
            with _failing("task" if parts.config.task is not None else "model", what), evaluator.serving():
                output = evaluator.forward(range(number), clone_batch(batch))
                Evaluator(replace(private, metrics=[])).sums(output, number)
        except ConfigError:
            if _training_fails(private, batch):
                return {}  # its report has the whole traceback
            raise
        classes, records = {}, list[str]()
        for entry in entries:
            with _failing(entry.key, what):
                if entry.size is None:
                    classes[entry.key] = entry.classes_in(output.outputs, output.targets)
                    entry.settle(classes[entry.key])
                sums = _fed(entry, evaluator, output, parts.world.size)
            records += _records(entry, sums, loader, what)
    with _failing("metrics", what):
        check_names(records)
    return {"classes": classes, "records": ["loss", *(f"loss/{name}" for name in output.terms), *records]}


def _training_fails(parts: ModelParts, batch: Any) -> bool:
    """Whether a forward as in training fails on a batch, too."""
    kept = BufferSnapshot(parts.modules)
    try:
        with torch.enable_grad():
            training_forward(parts, parts.move(batch))
    except Exception:
        return True
    finally:
        kept.restore()
    return False


def _fed(entry: MetricEntry, evaluator: Evaluator, output: Any, world_size: int) -> Tensor:
    """The sums of a metric over one batch; of one that isn't decomposable none."""
    if entry.whole is None:
        return entry.sums(output.outputs, output.targets).cpu()
    outputs, targets = evaluator.seen(output)
    if world_size > 1:
        outputs, targets = pickle.loads(pickle.dumps((outputs, targets)))  # as they go to rank 0
    entry.reset()
    entry.update(outputs, targets)
    return torch.zeros(0, dtype=torch.float64)


def _records(entry: MetricEntry, sums: Tensor, loader: EvalLoader, what: str) -> list[str]:
    try:
        with _failing(entry.key, what):
            return [*entry.results(sums, class_names(loader.dataset))]
    except ConfigError as error:
        raise _TooFewError from error
    finally:
        if entry.whole is not None:
            entry.reset()


def _private(entry: MetricEntry) -> MetricEntry:
    """The entry with a copy of its metric: torchmetrics' collections, say, decide by their first batch which states to share."""
    size = sum(
        tensor.untyped_storage().nbytes()
        for found in modules_in(entry.metric).values()
        for tensor in ([*found.parameters(), *found.buffers()] if isinstance(found, nn.Module) else [found])
    )
    with contextlib.suppress(Exception):
        return replace(entry, metric=copy.deepcopy(entry.metric)) if size <= BYTES else entry
    return entry


@contextlib.contextmanager
def _failing(key: str, what: str) -> Iterator[None]:
    """Turn whatever is raised, except torch.OutOfMemoryError, into a ConfigError of the key."""
    try:
        yield
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:
        record = failure.describe(error)
        named = isinstance(error, DataError | SampleError) or str(error).startswith("metric ")
        text, place = str(error) if named else record["error"], f" ({record['line']})" if record["line"] else ""
        raise ConfigError.single(key, f"{what}, before the first step: {text}{place}") from error


def _check_watched(parts: Parts, records: list[str]) -> None:
    """Raises ConfigError: a monitored metric isn't among the records."""
    stems = {name.rpartition("_")[0] for name in records if any(entry.whole for entry in parts.metrics)}
    for key, name in watched(parts.config, parts.keep_best).items():
        record = name.removeprefix("val/")
        record = record.removeprefix("raw_") if parts.ema is not None else record
        grows = any(record.startswith(f"{stem}_") for stem in stems if stem)  # labels that these samples don't have
        if record not in records and not grows:
            gives = ", ".join(f"val/{name}" for name in records)
            raise ConfigError.single(key, f"{name} isn't computed; the evaluation gives {gives}: name one of these")
