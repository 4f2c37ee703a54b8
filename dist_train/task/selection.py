"""`of` of a metric: how its two arguments are taken from what the task gives as outputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_train.config.components import build_callable, is_spec
from dist_train.task.batch import shapes_of

# A word in a path, once it has arrived at a tensor; a number takes its column.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda tensor: tensor.argmax(1),
    "softmax": lambda tensor: tensor.softmax(1),
    "sigmoid": torch.sigmoid,
}


class Selection:
    """What `of` says, applied to a batch.

    A path is a dotted string: each part is a key of a mapping, an attribute of an object or the index of a sequence; of a
    tensor it is a column (a number: `[:, k]`) or one of FUNCTIONS, over dim 1. One path alone takes from the outputs, and
    from the targets too where they are a mapping that has its first key.

    Args:
        of: a path, {outputs: path, targets: path}, or a function (outputs, targets) -> (outputs, targets) as a spec or live.

    Attributes:
        function: the function, if it is one.
        path: the outputs' path; () if they are taken as they are.
    """

    def __init__(self, of: Any):
        self.of = of
        self.function: Callable[[Any, Any], Any] | None = None
        self.path: tuple[str, ...] = ()
        self._targets: tuple[str, ...] | None = None
        if is_spec(of) or callable(of):
            self.function = build_callable(of)
        elif isinstance(of, dict):
            self.path = _parts(of["outputs"]) if "outputs" in of else ()
            self._targets = _parts(of["targets"]) if "targets" in of else ()
        else:
            self.path = _parts(of)

    def __str__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__) if self.function else str(self.of)

    @property
    def scales(self) -> bool:
        """Whether it gives probabilities: then a threshold for logits isn't meant."""
        return "sigmoid" in self.path or "softmax" in self.path

    def __call__(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """The arguments of the metric.

        Raises:
            ValueError: there is no such part; says what there is.
        """
        if self.function is not None:
            pair = self.function(outputs, targets)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"of: {self} must return (outputs, targets), but gave {shapes_of(pair)}")
            return pair[0], pair[1]
        path = self._targets
        if path is None:
            path = _keys(self.path) if isinstance(targets, Mapping) and self.path[0] in targets else ()
        return _take(outputs, self.path, "outputs"), _take(targets, path, "targets")


def _parts(path: Any) -> tuple[str, ...]:
    return tuple(str(path).split("."))


def _keys(path: tuple[str, ...]) -> tuple[str, ...]:
    """The part of a path before its first function."""
    for index, part in enumerate(path):
        if part in FUNCTIONS:
            return path[:index]
    return path


def _take(value: Any, path: tuple[str, ...], what: str) -> Any:
    at = f"the {what}"
    for part in path:
        value = _of_tensor(value, part, at) if isinstance(value, Tensor) else _member(value, part, at)
        at = f"{part} of {at}"
    return value


def _of_tensor(tensor: Tensor, part: str, at: str) -> Tensor:
    if part == "sigmoid":
        return torch.sigmoid(tensor)
    if part not in FUNCTIONS and not part.isdigit():
        raise ValueError(
            f"{at} are a tensor, {shapes_of(tensor)}, which has no {part}: of a tensor there are "
            f"{', '.join(FUNCTIONS)} and the number of a column"
        )
    least = int(part) + 1 if part.isdigit() else 2
    if tensor.dim() < 2 or tensor.shape[1] < least:
        raise ValueError(f"{part} is taken over dim 1, of at least {least} columns, but {at} are {shapes_of(tensor)}")
    return tensor[:, int(part)] if part.isdigit() else FUNCTIONS[part](tensor)


def _member(value: Any, part: str, at: str) -> Any:
    if isinstance(value, Mapping):
        for key in (part, int(part) if part.isdigit() else part):
            if key in value:
                return value[key]
    elif isinstance(value, list | tuple) and part.isdigit():
        if int(part) < len(value):
            return value[int(part)]
    elif hasattr(value, part) and not callable(getattr(value, part)):
        return getattr(value, part)
    hint = f"; {part} is taken of a tensor, so name that first: KEY.{part}" if part in FUNCTIONS else ""
    raise ValueError(f"{at} have no {part}: they are {shapes_of(value)}{hint}")
