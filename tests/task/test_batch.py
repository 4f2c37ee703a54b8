"""One walk over whatever holds tensors: types are kept, values changed, and what has none stays the same object."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dist_train.objective.precision import Precision
from dist_train.task.batch import batch_length, first_rows, in_full_precision, move_batch, tensors_in
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised, call_model


class Output(collections.OrderedDict[str, Any]):
    """As transformers and diffusers have it: values are items and attributes, and copying goes through the constructor."""

    def __init__(self, logits: Tensor, states: Any = None):
        super().__init__(logits=logits, states=states)
        self.logits, self.states = logits, states

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), (self.logits, self.states)


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    nested: list[Any]
    name: str = "x"


@dataclasses.dataclass(slots=True)
class Slots:
    logits: Tensor


class Pair(NamedTuple):
    logits: Tensor
    length: int


class Encoding(collections.UserDict[str, Any]):
    pass


class Own:
    def __init__(self, logits: Tensor):
        self.logits, self.me, self.model = logits, self, nn.Linear(1, 1)


def half() -> Tensor:
    return torch.ones(2, 3, dtype=torch.bfloat16)


HOLDERS: dict[str, Any] = {
    "list": [half(), "s"],
    "tuple": (half(), 1),
    "namedtuple": Pair(half(), 3),
    "dict": {"logits": [half()]},
    "defaultdict": collections.defaultdict(list, logits=half()),
    "UserDict": Encoding(logits=half()),
    "ModelOutput": Output(half(), (half(),)),
    "frozen dataclass": Frozen(half(), [{"deep": half()}]),
    "dataclass with slots": Slots(half()),
    "namespace": types.SimpleNamespace(logits=half()),
    "own class": Own(half()),
    "deque": collections.deque([half()]),
    "distribution": torch.distributions.Normal(half(), half()),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_types_are_kept_and_every_tensor_is_reached(name: str) -> None:
    value = HOLDERS[name]
    full = in_full_precision(value)
    assert type(full) is type(value)
    count = len(list(tensors_in(value)))
    assert [tensor.dtype for tensor in tensors_in(full)] == [torch.float32] * count
    assert {tensor.dtype for tensor in tensors_in(value)} == {torch.bfloat16}, "what was handed in has changed"
    assert in_full_precision(full) is full
    if hasattr(value, "logits"):
        assert full.logits.dtype == torch.float32, "attribute and item are one"
    assert batch_length(value) == 2
    assert [len(tensor) for tensor in tensors_in(first_rows(value, 1))] == [1] * count
    assert {tensor.device.type for tensor in tensors_in(move_batch(value, torch.device("meta")))} == {"meta"}


def test_images_alone_take_the_memory_format() -> None:
    batch = Encoding(images=torch.zeros(2, 3, 4, 4), volumes=torch.zeros(2, 3, 4, 4, 4), labels=torch.zeros(2))
    moved = move_batch(batch, torch.device("cpu"), torch.channels_last)
    assert moved["images"].is_contiguous(memory_format=torch.channels_last)
    assert moved["volumes"].is_contiguous()


def test_a_mapping_goes_by_name_and_the_loss_of_any_output_runs_in_float32() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return Output(super().forward(x))

    seen: list[Any] = []

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        seen.extend([type(outputs), outputs.logits.dtype, (outputs.logits @ outputs.logits.t()).dtype])
        return nn.functional.cross_entropy(outputs["logits"], targets, reduction="none")

    with Precision("bf16", "cpu").autocast():
        result = Supervised(Loss(loss)).step(Net(3, 4), (Encoding(x=torch.ones(2, 3)), torch.tensor([0, 1])))
    assert seen == [Output, torch.float32, torch.float32]
    assert result.loss.dtype == torch.float32
    assert call_model(nn.Identity(), Encoding(input=1)) == 1
