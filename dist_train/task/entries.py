"""The entries of `metrics` in a config: each a metric, what it is computed of, and what it is recorded as."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config.components import build, is_spec, locate, signature
from dist_train.config.errors import ConfigError
from dist_train.config.fields import RECORD_FIELDS, better_is_lower, dotted
from dist_train.config.metrics import MetricSpec, metric_spec, wrong_reserved
from dist_train.task.batch import logits_of, shapes_of
from dist_train.task.metrics import Metric
from dist_train.task.selection import Selection
from dist_train.task.whole import NonDecomposable

RESERVED = ("loss", "eval_samples", *RECORD_FIELDS)  # names in the records that no metric can have
BACKGROUND = ("background", "bg")  # of a detector's first class


@dataclass(frozen=True)
class MetricEntry:
    """A metric as the config has it.

    Attributes:
        key: of the config: `metrics.0`.
        name: what its value is recorded as; several values get this name in front.
        of: what it is computed of; None: of the task's outputs and targets as they are.
    """

    key: str
    metric: Metric
    name: str
    of: Selection | None = None

    @property
    def size(self) -> int | None:
        """How many numbers it adds up; 0 for one that isn't decomposable, None until `settle`."""
        return self.metric.size

    @property
    def whole(self) -> NonDecomposable | None:
        """The metric, if it must see every batch on rank 0."""
        return self.metric if isinstance(self.metric, NonDecomposable) else None

    @property
    def primary(self) -> str:
        """The record that is its first value."""
        return self._record(self._own)

    @property
    def open(self) -> bool:
        """Whether only a result shows all of its records."""
        return self.whole is not None or getattr(type(self.metric), "result", None) is not Metric.result

    @property
    def _own(self) -> str:
        """The name that the metric has itself; "" without one."""
        return getattr(self.metric, "name", "")

    def classes_in(self, outputs: Any, targets: Any) -> int:
        """The number of classes that the outputs of a batch show, of a metric without a size."""
        outputs, targets = self._selected(outputs, targets)
        with self.errors(outputs, targets):
            return self.metric.classes_in(outputs, targets)  # type: ignore[attr-defined, no-any-return]

    def settle(self, classes: int) -> None:
        """Give a metric without a size the number of classes."""
        self.metric.settle(classes)  # type: ignore[attr-defined]

    def sums(self, outputs: Any, targets: Any) -> Tensor:
        """What a batch adds, float64 (size,).

        Raises:
            RuntimeError: the metric fails, or returns something else; names it, and what it got.
        """
        outputs, targets = self._selected(outputs, targets)
        with self.errors(outputs, targets):
            sums = self.metric.sums(outputs, targets)
            expected = f"sums must give a tensor of shape ({self.size},), float64 or integers"
            if not isinstance(sums, Tensor):
                raise TypeError(f"{expected}, but gave a {type(sums).__name__}")
            if sums.shape != (self.size,) or (sums.is_floating_point() and sums.dtype != torch.float64):
                raise ValueError(
                    f"{expected}, but gave {tuple(sums.shape)} of {sums.dtype}; `size` says how many there are"
                )
        return sums.double()

    def reset(self) -> None:
        """Make one that isn't decomposable forget its batches."""
        assert self.whole is not None
        self.whole.metric.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        """Give a metric that isn't decomposable a batch. Raises RuntimeError as `sums`."""
        assert self.whole is not None
        outputs, targets = self._selected(outputs, targets)
        with self.errors(outputs, targets):
            self.whole.update(outputs, targets)

    def results(self, sums: Tensor, classes: Sequence[str] = ()) -> dict[str, float]:
        """The values, by the names that they are recorded under.

        Args:
            sums: over the whole dataset, (size,) float64 on the CPU; empty for one that isn't decomposable.
            classes: the names of the dataset's classes, where they are known.

        Raises:
            RuntimeError: the metric fails, or gives something else than numbers and vectors.
        """
        with self.errors():
            value = self.whole.compute() if self.whole is not None else self.metric.result(sums)
            named = value if isinstance(value, Mapping) else {self._own: value}
            return {
                key: number
                for name, part in named.items()
                for key, number in _numbers(self._record(str(name)), part, classes)
            }

    def members(self) -> dict[str, tuple[str, Any]]:
        """The metrics that it holds, by their record, each with its own name; a result may show more records."""
        inside = self.whole.members if self.whole is not None else {self._own: self.metric}
        return {self._record(name): (name, metric) for name, metric in inside.items()}

    @contextlib.contextmanager
    def errors(self, *got: Any) -> Iterator[None]:
        """Errors of a metric's own code say which metric it is, and what outputs and targets it got.

        Raises:
            RuntimeError: instead of whatever it raised, except torch.OutOfMemoryError.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            head = f"metric {self.name}"
            if str(error).startswith(head):
                raise
            what = ""
            if got:
                what = f"; it got outputs {shapes_of(got[0])} and targets {shapes_of(got[1])}"
                what += f" (of: {self.of})" if self.of is not None else ""
                if self.of is None and not isinstance(got[0], Tensor):
                    what += "; its key `of` says which part of the outputs it takes, as in of: logits"
            raise RuntimeError(f"{head}: {type(error).__name__}: {error}{what}") from error

    def _selected(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        if self.of is None:
            metric = self.whole.metric if self.whole is not None else self.metric
            ready = type(metric).__module__.startswith(("dist_train.task.", "torchmetrics."))
            return logits_of(outputs) if ready else outputs, targets
        with self.errors(outputs, targets):
            return self.of(outputs, targets)

    def _record(self, name: str) -> str:
        """What one of its own names is recorded as: `name` of the config takes the metric's own place."""
        own = self._own
        if self.name == own:
            return name
        if name == own and not (self.whole is not None and isinstance(self.whole.metric, nn.ModuleDict)):
            return self.name
        return f"{self.name}_{name.removeprefix(f'{own}_')}"


def build_metric(entry: Any, function: Any, key: str = "metrics.0") -> MetricEntry:
    """One entry, built. Of the loss's `function`, or a task, it gets where logits are cut (`threshold`), `ignore_index` and the
    dim of the classes, unless it has its own.

    Raises:
        ConfigError: `name` or `of` is wrong.
        TypeError: it isn't a metric.
    """
    form = signature(locate(entry["_target_"])) if is_spec(entry) else None
    spec = metric_spec(entry, form.parameters if form is not None else ())
    for wrong, message in wrong_reserved(spec):
        raise ConfigError.single(dotted((key, *wrong)), message)
    of = Selection(spec.of) if spec.of is not None else None
    component = spec.component
    if spec.alias is not None and function is not None:
        component = {**_from_loss(spec, of, function), **component}
    try:
        metric = build(component)
    except ModuleNotFoundError as error:
        raise (ConfigError.single(key, str(error)) if spec.alias is not None else error) from error
    if not hasattr(metric, "sums"):
        metric = NonDecomposable(metric)
    name, size = spec.name or getattr(metric, "name", None), getattr(metric, "size", None)
    sized = isinstance(size, int) or hasattr(metric, "settle")
    if not isinstance(name, str) or not name or not sized or not hasattr(metric, "result"):
        missing = "a name (a string), a size (how many numbers sums gives), sums and result"
        raise TypeError(f"{type(metric).__name__} needs {missing}: subclass dist_train.metrics.Metric")
    return MetricEntry(key, metric, name, of)


def _from_loss(spec: MetricSpec, of: Selection | None, function: Any) -> dict[str, Any]:
    """Arguments of a built-in metric that follow from the loss."""
    form = signature(locate(spec.component["_target_"]))
    accepted = form.parameters if form is not None else {}
    found: dict[str, Any] = {}
    if isinstance(function, nn.BCEWithLogitsLoss) and "threshold" in accepted and not (of is not None and of.scales):
        if of is not None and of.function is not None and "threshold" not in spec.component:
            raise ValueError(
                "the loss takes logits, but what `of` gives isn't known: give threshold (0.5, or 0 for logits)"
            )
        found["threshold"] = 0.0
    ignored = getattr(function, "ignore_index", None)
    if isinstance(ignored, int) and "ignore_index" in accepted:
        found["ignore_index"] = ignored
    dim = getattr(function, "classes_dim", None)  # of a task
    if isinstance(dim, int) and "dim" in accepted and of is None and spec.alias != "perplexity":  # it prefers the last
        found["dim"] = dim
    return found


def _numbers(key: str, value: Any, classes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """A value under its name; a vector under a name for each number, as is a mapping of labels (or of names) to numbers."""
    if isinstance(value, Mapping):
        names = _labels(value, classes)
        for name, part in value.items():
            yield from _numbers(f"{key}_{names.get(name, name)}", part, ())
        return
    numbers = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value, dtype=np.float64))
    if numbers.numel() == 1:
        yield key, float(numbers)
    elif numbers.dim() == 1 and len(numbers):
        named = class_records(classes) if len(numbers) == len(classes) else [*map(str, range(len(numbers)))]
        yield from ((f"{key}_{name}", float(number)) for name, number in zip(named, numbers, strict=True))
    else:
        raise TypeError(f"{key} has shape {tuple(numbers.shape)}; only numbers and vectors can be recorded")


def _labels(values: Mapping[Any, Any], classes: Sequence[str]) -> dict[Any, str]:
    """The names of labels, where the first class is the background or a label 0 occurs: else they may begin at 1."""
    if not classes or not all(type(label) is int for label in values):
        return {}
    if 0 not in values and classes[0].strip("_ ").lower() not in BACKGROUND:
        return {}
    names = class_records(classes)
    return {label: names[label] for label in values if 0 <= label < len(names)}


def class_records(classes: Sequence[str]) -> list[str]:
    """Class names as parts of names in the records (letters, digits, _, - and dots); numbers where two would be the same."""
    names = [re.sub(r"[^\w.-]+", "_", name).strip("_") for name in classes]
    count = Counter(names)
    return [name if name and count[name] == 1 else str(number) for number, name in enumerate(names)]


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError: a name is reserved in the records, or two metrics have the same."""
    for name, count in Counter(names).items():
        if name in RESERVED or name.startswith("raw_"):
            raise ValueError(f"a metric can't be called {name}: that name is reserved in the records")
        if count > 1:
            raise ValueError(
                f"{count} metrics are called {name}, and only one could be recorded: give one of them another `name`"
            )


def check_entries(entries: Sequence[MetricEntry]) -> None:
    """Raises ValueError: as `check_names`, for the names that are known before the first result."""
    check_names([record for entry in entries for record in entry.members()])


def monitored(metrics: Mapping[str, float], name: str) -> float:
    """The value of the metric that a key of the config monitors.

    Raises:
        ValueError: the evaluation didn't give it; says what it gave.
    """
    if name not in metrics:
        keys = "checkpoint.keep_best, trainer.stop_when.metric and scheduler.metric"
        raise ValueError(
            f"{name} is monitored, but this evaluation gave {', '.join(metrics)}: name one of these in {keys}"
        )
    return metrics[name]


def misnamed(entries: Sequence[MetricEntry]) -> dict[str, str]:
    """`min` or `max` of the metrics whose `higher_is_better` says otherwise than their names, by which views judge them."""
    names = [name for entry in entries for name in entry.members()]
    lower = {name: is_lower_better(name, entries) for name in names}
    return {name: "min" if lower[name] else "max" for name in names if lower[name] != better_is_lower(name)}


def is_lower_better(name: str, entries: Sequence[MetricEntry]) -> bool:
    """Whether a lower value of `val/<name>` is better: as its metric says (`higher_is_better`), else by its own name."""
    record = name.removeprefix("val/").removeprefix("raw_")
    members = {key: member for entry in entries for key, member in entry.members().items()}
    fitting = [key for key in members if f"{record}_".startswith(f"{key}_")]  # `iou_cat` is one of `iou`'s
    if not fitting:
        return better_is_lower(name)
    own, metric = members[max(fitting, key=len)]
    higher = getattr(metric, "higher_is_better", None)
    return better_is_lower(own) if higher is None else not higher
