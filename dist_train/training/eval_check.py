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

from dist_train.building.model import watched
from dist_train.building.unsaved import copied, is_cheap_to_copy, training_forward
from dist_train.config.errors import ConfigError, Problem
from dist_train.data.errors import DataError, SampleError
from dist_train.evaluation.evaluate import Evaluator, class_names
from dist_train.objective.modules import BufferSnapshot
from dist_train.runtime.compiler import uncompiled
from dist_train.runtime.seeding import undisturbed_generators
from dist_train.task.batch import clone_batch
from dist_train.task.entries import MetricEntry, check_names
from dist_train.task.task import modules_in
from dist_train.task.terms import Computed
from dist_train.watch import failure

if TYPE_CHECKING:
    from dist_train.building.model import ModelParts
    from dist_train.data.loader import EvalLoader
    from dist_train.data.plan import EvalPlan
    from dist_train.training.parts import Parts

# Few, since keys, shapes, types and exceptions show on any number, and reading or computing a whole batch may take seconds;
# spread over the dataset, which is often sorted by class. What fails with them gets a whole eval batch, and a metric whose value
# can't be computed from that (R2 of one sample, KID with subset_size) more of them, up to MOST samples.
SAMPLES, OF_LARGE = 8, 2
MOST, GROWTH = 512, 4
LARGE = 10_000_000  # parameters: 8 samples of a ResNet-50 would be 8 % of a start on the CPU, 2 are 4 %
BYTES = 64 << 20  # of a metric's own weights: one with more is used itself, and reset
# No other samples help against these.
OF_CODE = (TypeError, AttributeError, NameError, NotImplementedError, ImportError)


class _TooFewError(Exception):
    """Something fails with these samples; perhaps not with a whole eval batch."""


def check_evaluation(parts: Parts) -> list[str]:
    """Try it for val and test; nothing remains of it: modes, buffers, generators and metrics are as before. All ranks call it.

    Metrics whose size depends on the number of classes get it here. Where the forward fails in training, too, or memory runs out,
    training is left to report that.

    Returns:
        Warnings, of metrics that may be computable from the whole split alone.

    Raises:
        ConfigError: it fails; names the metric (`metrics.<k>`), the data, the task or model, or the key that monitors a metric.
    """
    large = sum(parameter.numel() for parameter in parts.model.parameters()) > LARGE
    warnings: list[str] = []
    for split, loader in parts.eval_loaders.items():
        for count, batches in _tries(loader.plan, OF_LARGE if large else SAMPLES):
            found = _on_every_rank(parts, loader, split, count, batches)
            if not (found.get("too_few") or found.get("uncomputed")):
                break
        if not found:
            break
        for entry in parts.metrics:
            if entry.size is None:
                entry.settle(found["classes"][entry.key])
        warnings += [
            f"{key}: {message}; the whole split may be enough, else the first evaluation ends the run"
            for key, message in found["uncomputed"].items()
        ]
        if split == "val":
            _check_watched(parts, found["records"], [*found["uncomputed"]])
    return warnings


def _tries(plan: EvalPlan, few: int) -> list[tuple[int, int]]:
    """(samples of a batch, batches) of each try."""
    whole = min(plan.batch_size, plan.length)
    most = min(max(2, -(-MOST // whole)), len(plan))
    tries = [(min(few, whole), 1), *((whole, GROWTH**k) for k in range(most) if GROWTH**k < most), (whole, most)]
    return list(dict.fromkeys(tries))


def _on_every_rank(parts: Parts, loader: EvalLoader, split: str, count: int, batches: int) -> dict[str, Any]:
    """Every rank tries the same samples, and all agree on what was found: rank 0's, or the first problem."""
    try:
        mine = _tried(parts, loader, split, count, batches)
    except _TooFewError:
        mine = {"too_few": True}
    except ConfigError as error:
        mine = {"problems": [vars(problem) for problem in error.problems]}
    except torch.OutOfMemoryError:
        mine = {}  # training has a way round to offer
    ranks = parts.world.all_gather(mine)
    for found in ranks:
        if "problems" in found:
            raise ConfigError([Problem(**problem) for problem in found["problems"]])
    unsure = (found for found in ranks if not found or found.get("too_few") or found["uncomputed"])
    return next(unsure, ranks[0])


def _tried(parts: Parts, loader: EvalLoader, split: str, count: int, batches: int) -> dict[str, Any]:
    """Of some samples: the records that an evaluation gives, in order; the number of classes by key of the metrics that have
    asked for it; by key, why a metric can't be computed from them.

    Raises:
        ConfigError: it fails with any number of samples.
        _TooFewError: it may not fail with a whole eval batch.
    """
    device = parts.world.device
    entries = [_private(entry) for entry in parts.metrics]
    private = copied(parts) if is_cheap_to_copy([parts.modules, parts.task]) else parts
    evaluator = Evaluator(replace(private, metrics=entries))
    classes, sums, samples = dict[str, int](), dict[str, Tensor](), 0
    with (
        undisturbed_generators(device, loader.dataset),
        uncompiled(),
        warnings.catch_warnings(),
        torch.no_grad(),
        contextlib.closing(loader.some(count, batches)) as given,
    ):
        warnings.simplefilter("ignore")  # of a metric: too few samples
        for entry in entries:
            if entry.whole is not None:
                entry.reset()
        while True:
            with _failing(f"data.{split}", "reading some samples failed"):
                number, batch = next(given, (0, None))
            if not number:
                break
            what = f"evaluating {samples + number} samples of data.{split} failed"
            try:
                output = _evaluated(evaluator, private, range(samples, samples + number), batch, what)
                _feed(entries, evaluator, output, (classes, sums), what)
            except ConfigError as error:
                if number < min(loader.plan.batch_size, loader.plan.length) and not _is_of_code(error):
                    raise _TooFewError from error
                if error.problems[0].key in ("task", "model") and _training_fails(private, batch):
                    return {}  # its report has the whole traceback
                raise
            samples += number
        records, uncomputed = _values(entries, sums, loader, what, samples)
    with _failing("metrics", what):
        check_names(records)
    losses = ["loss", *(f"loss/{name}" for name in output.terms)]
    return {"classes": classes, "records": [*losses, *records], "uncomputed": uncomputed}


def _evaluated(evaluator: Evaluator, parts: ModelParts, samples: range, batch: Any, what: str) -> Computed:
    with _failing("task" if parts.config.task is not None else "model", what), evaluator.serving():
        output = evaluator.forward(samples, clone_batch(batch))
        Evaluator(replace(parts, metrics=[])).sums(output, len(samples))
    return output


def _feed(
    entries: list[MetricEntry],
    evaluator: Evaluator,
    output: Computed,
    found: tuple[dict[str, int], dict[str, Tensor]],
    what: str,
) -> None:
    """Give each metric a batch; to `found` go the number of classes where one needs it, and its sums, by its key."""
    classes, sums = found
    for entry in entries:
        with _failing(entry.key, what):
            if entry.size is None:
                classes[entry.key] = entry.classes_in(output.outputs, output.targets)
                entry.settle(classes[entry.key])
            added = _fed(entry, evaluator, output)
            sums[entry.key] = sums[entry.key] + added if entry.key in sums else added


def _values(
    entries: list[MetricEntry], sums: dict[str, Tensor], loader: EvalLoader, what: str, samples: int
) -> tuple[list[str], dict[str, str]]:
    """The records of the metrics; by key, why one can't be computed from these samples, where it may be from all."""
    records, uncomputed = list[str](), dict[str, str]()
    for entry in entries:
        try:
            with _failing(entry.key, what):
                records += entry.results(sums[entry.key], class_names(loader.dataset))
        except ConfigError as error:
            if samples == loader.plan.length or _is_of_code(error):
                raise
            uncomputed[entry.key] = error.problems[0].message
        finally:
            if entry.whole is not None:
                entry.reset()
    return records, uncomputed


def _is_of_code(error: BaseException | None) -> bool:
    """Whether it fails with any samples."""
    while error is not None and not isinstance(error, OF_CODE):
        error = error.__cause__
    return error is not None


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


def _fed(entry: MetricEntry, evaluator: Evaluator, output: Computed) -> Tensor:
    """The sums of a metric over one batch; of one that isn't decomposable none."""
    if entry.whole is None:
        return entry.sums(output.outputs, output.targets).cpu()
    outputs, targets = evaluator.seen(output)
    if evaluator.world.size > 1:
        outputs, targets = pickle.loads(pickle.dumps((outputs, targets)))  # as they go to rank 0
    entry.update(outputs, targets)
    return torch.zeros(0, dtype=torch.float64)


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
        if isinstance(error, DataError) and str(error).startswith("data.normalize"):
            key = "data.normalize"
        named = isinstance(error, DataError | SampleError) or str(error).startswith("metric ")
        text, place = str(error) if named else record["error"], f" ({record['line']})" if record["line"] else ""
        raise ConfigError.single(key, f"{what}, before the first step: {text}{place}") from error


def _check_watched(parts: Parts, records: list[str], uncomputed: list[str]) -> None:
    """Raises ConfigError: a monitored metric isn't among the records, nor of a metric that couldn't be computed."""
    stems = {name.rpartition("_")[0] for name in records if any(entry.whole for entry in parts.metrics)}
    unknown = [name for entry in parts.metrics if entry.key in uncomputed for name in (entry.name, *entry.members())]
    for key, name in watched(parts.config, parts.keep_best).items():
        record = name.removeprefix("val/")
        record = record.removeprefix("raw_") if parts.ema is not None else record
        grows = any(record.startswith(f"{stem}_") for stem in stems if stem)  # labels that these samples don't have
        if record not in records and not grows and not any(f"{record}_".startswith(f"{stem}_") for stem in unknown):
            gives = ", ".join(f"val/{name}" for name in records)
            raise ConfigError.single(key, f"{name} isn't computed; the evaluation gives {gives}: name one of these")
