"""Prediction: what the task gives for every sample once, on any number of processes, as columns with an entry per sample."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_train.config.errors import ConfigError
from dist_train.evaluation.evaluate import in_rounds, on_rank_zero
from dist_train.runtime.seeding import seed_forward
from dist_train.task.batch import in_full_precision, is_pair, map_tensors, shapes_of
from dist_train.task.task import scores_of

if TYPE_CHECKING:
    from dist_train.data.loader import EvalLoader
    from dist_train.evaluation.evaluate import Evaluator

PLAIN = (str, int, float, bool)  # of one sample, beside tensors

Column = Tensor | list[Any]  # a tensor with a row per sample, or a list with a tensor or a plain value per sample


class Predicted(NamedTuple):
    """Consecutive samples of a dataset.

    Attributes:
        start: the index of the first.
        samples: how many.
        outputs: what the task's `predict` returned, or what of it is compared with targets, on the CPU, bf16 and fp16 as float32.
        targets: the second part of a batch of (inputs, targets), on the CPU; None without one.
    """

    start: int
    samples: int
    outputs: Any
    targets: Any

    @property
    def range(self) -> range:
        """Their indices."""
        return range(self.start, self.start + self.samples)


def predict(evaluator: Evaluator, loader: EvalLoader, raw: bool = False) -> Iterator[Predicted | None]:
    """Predictions of this rank's eval batches, in order; None in a last round without one: all ranks run the same number."""
    with evaluator.serving():
        for mine in in_rounds(loader):
            yield None if mine is None else predict_batch(evaluator, *mine, raw)


def predict_batch(evaluator: Evaluator, samples: range, batch: Any, raw: bool = False) -> Predicted:
    """The prediction of an eval batch, of a model that is `serving`.

    Args:
        raw: all that the task's `predict` returns.
    """
    seed_forward(evaluator.seed, 0, samples.start, evaluator.world.device)
    with evaluator.precision.autocast():
        batch = evaluator.prepare(batch, labeled=False)
        outputs = evaluator.task.predict(evaluator.model, batch)
        outputs = in_full_precision(outputs if raw else scores_of(evaluator.task, outputs))
    outputs, targets = map_tensors(Tensor.cpu, (outputs, batch[1] if is_pair(batch) else None))
    return Predicted(samples.start, len(samples), outputs, targets)


def gathered(
    evaluator: Evaluator,
    loader: EvalLoader,
    first: Callable[[Predicted], Any],
    change: Callable[[Predicted, Any], Any],
    raw: bool = False,
) -> Iterator[Any]:
    """`change(part, settled)` of every sample once, in dataset order, on rank 0; [] on the others, which must call it too.

    Args:
        first: called with the first samples, on rank 0; what it returns (as JSON) is `settled` on all ranks, as is its
            ConfigError.
        change: called on the rank that predicted the part.
        raw: as for `predict_batch`.
    """
    settled: Any = None
    for number, mine in enumerate(predict(evaluator, loader, raw)):
        if number == 0:  # rank 0 always has a batch in the first round
            settled = evaluator.world.on_main(partial(first, mine))  # type: ignore[arg-type]
        changed = None if mine is None else change(mine, settled)
        yield from (part for part in on_rank_zero(evaluator.world, changed) if part is not None)


class Rows(NamedTuple):
    """Outputs as columns, and the names of what has no entry per sample."""

    columns: dict[str, Column]
    left_out: list[str]


def rows_of(value: Any, samples: int, name: str = "output", nested: bool = False) -> Rows:
    """Outputs (or targets) of a batch as columns with an entry for each of its samples.

    A tensor is one column, `name`. The parts of a mapping, a dataclass, a named tuple or a tuple are columns of their own:
    `key`, `field`, `output_0`; `outer.inner` where they are nested. A list has an item per sample, as torchvision's detectors
    give it, and so has a tuple of mappings: the tensors and plain values in the items are the columns. None, numbers for the
    whole batch and objects without tensors (a cache) are left out.

    Args:
        nested: the names of parts begin with `name`, as in `target.boxes`.

    Raises:
        ConfigError: a tensor or a list hasn't one entry per sample, or there is no column.
    """
    found = Rows({}, [])
    _add(found, value, samples, name, nested)
    if not found.columns:
        raise _refusal(name, f"there is none in {shapes_of(value)}", samples)
    return found


def _refusal(name: str, found: str, samples: int) -> ConfigError:
    return ConfigError.single(
        "task",
        "predictions have a row for each sample: expected predict(model, batch) to give a tensor, a tuple or a mapping of "
        f"tensors with {samples} rows, or a list of {samples} items, for a batch of {samples}; in {name} {found}. "
        "Change what the task's predict returns, or use dist_train.load",
    )


def _add(found: Rows, value: Any, samples: int, name: str, nested: bool) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        if not value.dim():
            found.left_out.append(name)
        elif len(value) != samples or value.layout != torch.strided:
            raise _refusal(name, f"there is a tensor of shape {tuple(value.shape)}", samples)
        else:
            found.columns[name] = value
        return
    parts = _parts(value, name, nested)
    if _is_per_sample(value):
        found.columns.update(_of_items(value, samples, name, nested))
    elif parts is not None:
        for key, part in parts.items():
            _add(found, part, samples, key, nested=True)
    elif value is not None:
        found.left_out.append(name)


def _parts(value: Any, name: str, nested: bool) -> dict[str, Any] | None:
    """The named parts of a container; None for anything else."""
    prefix = f"{name}." if nested else ""
    if isinstance(value, Mapping):
        return {f"{prefix}{key}": part for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f"{prefix}{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {f"{prefix}{key}": part for key, part in zip(value._fields, value, strict=True)}
    if isinstance(value, list | tuple):
        return {f"{name}_{k}": part for k, part in enumerate(value)}
    return None


def _is_per_sample(value: Any) -> bool:
    return isinstance(value, list) or (
        isinstance(value, tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _of_items(items: Any, samples: int, name: str, nested: bool) -> dict[str, Column]:
    """The columns of a list with an item per sample."""
    if len(items) != samples:
        raise _refusal(name, f"there is a list of {len(items)}; several outputs are a tuple or a mapping", samples)
    columns: dict[str, Column] = {}
    for number, item in enumerate(items):
        entries = _entries(item, name, nested)
        if number and entries.keys() != columns.keys():
            raise _refusal(name, f"item 0 holds {', '.join(columns)}, item {number} {', '.join(entries)}", samples)
        for key, entry in entries.items():
            columns.setdefault(key, []).append(entry)  # type: ignore[union-attr]
    return {key: _of_numbers(list(column)) for key, column in columns.items()}


def _of_numbers(column: list[Any]) -> list[Any]:
    """Lists of numbers as tensors of one dtype."""
    numbers = itertools.chain.from_iterable(entry for entry in column if isinstance(entry, list))
    dtype = torch.int64 if all(isinstance(number, int) for number in numbers) else torch.float64
    return [torch.tensor(entry, dtype=dtype) if isinstance(entry, list) else entry for entry in column]


def _entries(item: Any, name: str, nested: bool) -> dict[str, Any]:
    """The tensors and plain values of one sample, by name."""
    if isinstance(item, np.ndarray):
        item = torch.from_numpy(item)
    if isinstance(item, Tensor | str | int | float | bool):
        return {name: item}
    if isinstance(item, list) and all(isinstance(part, int | float) for part in item):
        return {name: item}  # becomes a tensor once the dtype is known
    parts = _parts(item, name, nested)
    if parts is None:
        raise ConfigError.single(
            "task",
            f"predictions are tensors, numbers and texts: in {name} of a sample there is a {type(item).__name__}",
        )
    entries: dict[str, Any] = {}
    for key, part in parts.items():
        entries |= _entries(part, key, True) if part is not None else {}
    return entries
