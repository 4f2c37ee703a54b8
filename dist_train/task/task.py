"""How a batch becomes a loss: the default for (inputs, target), and the interface for everything else."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_train.task.batch import (
    batch_length,
    call_model,
    clone_batch,
    in_full_precision,
    is_pair,
    logits_of,
    split_batch,
    tensors_in,
)
from dist_train.task.losses import Loss
from dist_train.task.terms import Computed, StepOutput, computed


@runtime_checkable
class Task(Protocol):
    """One class, used unchanged by train, evaluate and predict. docs/tasks.md has the methods that it may have besides.

    `step` runs under autocast where the precision asks for it and returns a `StepOutput` or a tuple (loss, weight, outputs,
    targets), the last two as the metrics need them. `predict` returns the outputs for a batch that may have no target.
    """

    def step(self, model: nn.Module, batch: Any) -> StepOutput | tuple[Any, ...]:
        """The loss of a batch."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The outputs of a batch."""


class Supervised:
    """The default task: a batch is (inputs, target) and the loss is `loss(model(inputs), target)`.

    A tuple of inputs is spread over the model's arguments, a mapping is passed by name. Of outputs with an entry `logits`
    (transformers' ModelOutput) a loss of torch's own gets that. The loss runs in float32, outside autocast.

    Args:
        loss: of training, a `Loss` or what one is made of (torch's losses, a function of (outputs, targets)).
        val_loss: of evaluation, where that is another.
    """

    def __init__(self, loss: Loss | Callable[..., Any], val_loss: Loss | Callable[..., Any] | None = None):
        self.loss = loss if isinstance(loss, Loss) else Loss(loss)
        self.val_loss = self.loss
        if val_loss is not None:
            self.val_loss = val_loss if isinstance(val_loss, Loss) else Loss(val_loss)

    @property
    def summed(self) -> bool:
        """Whether the loss asks for a plain sum (see `Loss.summed`)."""
        return self.loss.summed

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """`loss(model(inputs), target)`.

        Raises:
            ValueError: the batch isn't (inputs, target), or the loss doesn't fit.
        """
        return _with_loss(self.loss.forward, *self.outputs(model, batch))

    def evaluate(self, model: nn.Module, batch: Any) -> StepOutput:
        """`val_loss(model(inputs), target)`. Raises as `step`."""
        inputs, targets = split_batch(batch)
        return _with_loss(self.val_loss.forward, _taken(self.val_loss, call_model(model, inputs)), targets)

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """(`model(inputs)`, target): what `loss` takes."""
        inputs, targets = split_batch(batch)
        return _taken(self.loss, call_model(model, inputs)), targets

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """`model(inputs)`; the batch may be (inputs, target) or the inputs alone."""
        return call_model(model, batch[0] if is_pair(batch) else batch)

    def scores(self, outputs: Any) -> Any:
        """What of the model's outputs is compared with targets: the entry `logits`, where the loss takes one tensor."""
        return _taken(self.val_loss, outputs)


def scores_of(task: Any, outputs: Any) -> Any:
    """What a task's predictions say about targets, of what its `predict` returned, which may hold more."""
    while task is not None and not isinstance(task, Supervised):
        task = getattr(task, "task", None)
    return outputs if task is None else task.scores(outputs)


def _taken(loss: Loss, outputs: Any) -> Any:
    return outputs if isinstance(outputs, Tensor) or not loss.takes_tensor else logits_of(outputs)


def _with_loss(loss: Callable[[Any, Any], tuple[Any, Any]], outputs: Any, targets: Any) -> StepOutput:
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return StepOutput(*loss(outputs, targets), outputs, targets)
    device = _device_of([outputs, targets])
    if not torch.is_autocast_enabled(device):
        return StepOutput(*loss(outputs, targets), outputs, targets)
    with torch.autocast(device, enabled=False):
        return StepOutput(*loss(outputs, targets), outputs, targets)


def full_precision(value: Any) -> Any:
    """A context without autocast on the device of the tensors in `value`."""
    device = _device_of(value)
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _device_of(value: Any) -> str:
    return next((tensor.device.type for tensor in tensors_in(value)), "cpu")


class WholeBatchTask:
    """A task whose loss compares samples with each other, made of `outputs(model, batch)` and `loss(outputs, targets)`.

    In training the loss is of the outputs of the whole global batch (`objective.whole_batch`), in evaluation of an eval batch's.
    """

    def __init__(self, task: Any):
        self.task = task

    @property
    def summed(self) -> bool:
        """Whether the loss asks for a plain sum (see `Loss.summed`)."""
        return getattr(self.task, "summed", False)

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of this batch alone."""
        outputs, targets = self.outputs(model, batch)
        return _with_loss(self.loss, outputs, targets)

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        """The task's own, or the loss of this batch alone."""
        return getattr(self.task, "evaluate", self.step)(model, batch)

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """What the loss needs of a batch: outputs and targets whose tensors have a row for each sample.

        Raises:
            TypeError: the task returned something else.
        """
        found = self.task.outputs(model, batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                f"a task's outputs(model, batch) must return (outputs, targets), found {type(found).__name__}; None for "
                "targets where the loss needs none"
            )
        return found

    def loss(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """The loss and its weight; a loss without a weight is a mean over the samples."""
        value = self.task.loss(in_full_precision(outputs), targets)
        if isinstance(value, tuple):
            return value  # type: ignore[return-value]
        samples = batch_length(outputs)
        if isinstance(value, Mapping):
            return {name: part if isinstance(part, tuple) else part * samples for name, part in value.items()}, samples
        return value * samples, samples

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The task's own, else its outputs."""
        own = getattr(self.task, "predict", None)
        return self.task.outputs(model, batch)[0] if own is None else own(model, batch)


class OfOptimizer:
    """What one of several optimizers minimizes: `step(model, batch, name)` of a task; anything else is the task's."""

    def __init__(self, task: Any, name: str):
        self.task, self.name = task, name

    def step(self, model: nn.Module, batch: Any) -> Any:
        """The loss that this optimizer minimizes."""
        return self.task.step(model, batch, self.name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "task":
            raise AttributeError(name)
        found = getattr(self.task, name)
        return functools.partial(_named_last, found, self.name) if name == "weights" else found


def minimizes_by_name(task: Any) -> bool:
    """Whether a task's `step` takes the name of an optimizer: each of several then has a loss of its own."""
    third = list(inspect.signature(task.step).parameters.values())[2:3] if hasattr(task, "step") else []
    return any(parameter.default is parameter.empty or parameter.name == "optimizer" for parameter in third)


def _named_last(method: Callable[[Any, str], Any], name: str, batch: Any) -> Any:
    return method(batch, name)


class SeveralLosses:
    """A task of several optimizers, with what each of them minimizes as a loss of its name; in evaluation they are added up."""

    def __init__(self, task: Any, names: Sequence[str]):
        self.task, self.names = task, list(names)

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """The losses by the optimizers' names, and named losses inside them as `<optimizer>/<name>`, which count once."""
        terms: dict[str, Any] = {}
        outputs = targets = None
        for name in self.names:
            one = computed(self.task.step(model, clone_batch(batch), name))
            if one.shared:
                terms[name] = (one.loss, one.weight)
            for inner, term in one.terms.items():  # they count once: as their sum, or each where it has its own weight
                terms[f"{name}/{inner}"] = (term.total, term.weight, 0.0 if one.shared else term.factor)
            if outputs is None:
                outputs, targets = one.outputs, one.targets
        return StepOutput(terms, None, outputs, targets)

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        """The task's own, or `step`."""
        return getattr(self.task, "evaluate", self.step)(model, batch)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The task's own."""
        return self.task.predict(model, batch)

    def moves(self, step: int) -> list[str]:
        """The optimizers that move in a step (from 0), in order: as the task's own `moves` says, else all.

        Raises:
            ValueError: it names one that there isn't, one twice, or none.
        """
        own = getattr(self.task, "moves", None)
        names = self.names if own is None else list(own(step))
        if not names or not set(names) <= set(self.names) or len(set(names)) < len(names):
            raise ValueError(
                f"the task's moves({step}) gave {names}: expected one or more of {', '.join(self.names)}, each once"
            )
        return names


def evaluated(task: Task, model: nn.Module, batch: Any) -> Computed:
    """What a task gives in evaluation: by `evaluate` where it has one. Raises as `computed`."""
    return computed(getattr(task, "evaluate", task.step)(model, batch))


MAX_DEPTH = 3  # objects inside objects that `modules_in` searches
MAX_ITEMS = 1000  # of a collection: longer ones are data


def modules_in(value: Any, known: Collection[nn.Module] = ()) -> dict[str, nn.Module | nn.Parameter]:
    """Modules and parameters inside an object that may be none itself, except those `known`; named by where they are."""
    found: dict[str, nn.Module | nn.Parameter] = {}
    seen: set[int] = set()

    def search(value: Any, name: str, depth: int) -> None:
        if id(value) in seen or (isinstance(value, nn.Module) and value in known):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module | nn.Parameter):
            found[name] = value
        elif depth:
            for key, item in _inside(value):
                inner = str(key).replace(".", "_")
                search(item, f"{name}_{inner}" if name else inner, depth - 1)

    search(value, "", MAX_DEPTH)
    return found


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """What an object holds, by name."""
    if isinstance(value, functools.partial):
        return [("function", value.func), *enumerate(value.args), *value.keywords.items()]
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return list(items) if len(value) <= MAX_ITEMS else []
    if inspect.ismethod(value):
        return [("self", value.__self__)]
    return list(vars(value).items()) if hasattr(value, "__dict__") and not isinstance(value, type) else []
