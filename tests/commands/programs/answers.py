"""Tasks whose predictions aren't tables, of the digits that the tests' run classifies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.models import MLP


class Task:
    def step(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        raise AssertionError("predict has no use for a loss")


class Boxes(Task):
    """None to two boxes a sample, as torchvision's detectors give them, with a text beside."""

    def predict(self, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
        inputs = batch[0]
        return [boxes_of(row) for row in inputs]


def boxes_of(row: Tensor) -> dict[str, Any]:
    count = int((row * 16).round().sum()) % 3
    return {"boxes": row[: 4 * count].view(count, 4), "labels": torch.arange(count), "says": f"{count} of them"}


class Masks(Task):
    """Scores of two classes for each pixel."""

    classes_dim = 1

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        images = batch[0].view(-1, 1, 8, 8)
        return torch.cat([images, 0.5 - images], dim=1)


class Tokens(Task):
    """Scores of 10 tokens at each of some places; batches have 4 or 3, as padded ones do."""

    classes_dim = -1

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        length = 4 if len(batch[0]) == 50 else 3
        return model(batch[0])[:, None].expand(-1, length, -1)


class Pairs(Task):
    """Several outputs, of which two have no row for a sample."""

    def predict(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        logits = model(batch[0])
        cache, nothing = object(), None
        parts = {"logits": logits, "inner": (logits.argmax(1), functional.normalize(logits).bfloat16())}
        return {**parts, "loss": logits.sum(), "cache": cache, "nothing": nothing}


class Diverged(Task):
    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]) / 0


class Transposed(Task):
    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).T


class Heads(Task):
    """A list of outputs, which would be one item per sample."""

    def predict(self, model: nn.Module, batch: Any) -> list[Tensor]:
        return [model(batch[0])] * 2


class Branching(MLP):
    """Has the weights of an MLP; its forward goes two ways by what its inputs hold."""

    def forward(self, input: Tensor) -> Tensor:
        outputs = super().forward(input)
        return outputs if input.sum() > 0 else -outputs


class Embedding(MLP):
    """Has the weights of an MLP; gives what its last layer takes beside the logits, as transformers' models."""

    def forward(self, input: Tensor) -> Any:
        (layers,) = self.children()
        hidden = layers[:-1](input)
        return {"logits": layers[-1](hidden), "emb": hidden}


class ByName(Task):
    """Calls the model with a keyword."""

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(input=batch[0])


class Parts(Task):
    """Never calls the model itself."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return next(model.children())(batch[0])
