"""Contrastive learning over the whole global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.task.batch import call_model, in_full_precision, is_pair, shapes_of
from dist_train.task.terms import StepOutput

MAX_SCALE = math.log(100.0)  # of CLIP: the similarities are multiplied by at most 100


class Contrastive(nn.Module):
    """SimCLR's NT-Xent and CLIP's loss, over all pairs of the global batch: of all micro-batches and processes.

    With s(u, v) the cosine similarity over the temperature, and N pairs (a_k, b_k):

    - `nt_xent` (SimCLR, Chen et al. 2020): the mean over all 2N embeddings u of -log(exp s(u, u') / sum over v != u of
      exp s(u, v)), u' the other one of its pair;
    - `clip` (CLIP, Radford et al. 2021; InfoNCE, van den Oord et al. 2018): the mean of two cross-entropies over the matrix
      s(a_i, b_j), of its rows and of its columns, with k as the class of the k-th.

    A batch is a pair of views (one, other), or ((one, other), labels), as `dist_train.data.TwoViews` gives them; labels aren't
    used. The model maps both views (concatenated, in one forward) to embeddings (N, d). With `towers` it is called with both,
    and gives a tuple (a, b) of embeddings, (a, b, scale) as open_clip's, or an object with `image_embeds` and `text_embeds` as
    CLIP of transformers; its own `logit_scale` is then the temperature.

    In evaluation the loss is that of an eval batch, the outputs are the similarities (N, N) of a to b, and the targets
    0 ... N - 1: `accuracy` is how often the right partner is the most similar of its eval batch. `predict` gives embeddings of
    length 1: of the first view or of inputs without a second one; with `towers` a tuple (a, b).

    Args:
        loss: `nt_xent` or `clip`.
        temperature: what similarities are divided by; to begin with, where it is learned.
        learned: a temperature that is trained (`task.log_scale`, saved in task.pt); at least 0.01, as CLIP's.
        towers: the model is called with both inputs.
    """

    whole_batch = True

    def __init__(self, loss: str = "nt_xent", temperature: float = 0.1, learned: bool = False, towers: bool = False):
        super().__init__()
        if loss not in ("nt_xent", "clip"):
            raise ValueError(f"Contrastive: expected loss to be nt_xent or clip, found {loss!r}")
        if temperature <= 0:
            raise ValueError(f"Contrastive: expected a temperature above 0, found {temperature}")
        self.kind, self.towers = loss, towers
        self.scale = 1.0 / temperature
        self.log_scale = nn.Parameter(torch.tensor(math.log(self.scale))) if learned else None

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, None]:
        """The embeddings of both views, (N, d) each, of length 1; with the model's own scale behind them where it has one.

        Raises:
            TypeError: the batch has no two views, or the model gives something else.
        """
        one, other = self._views(batch)
        if self.towers:
            return _of_towers(model, model(one, other)), None
        joined = _embeddings(call_model(model, torch.cat([one, other])))
        first, second = joined.chunk(2)
        return (first, second), None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean over the pairs (0-dim)."""
        one, other, scale = self._scaled(outputs)
        labels = torch.arange(len(one), device=one.device)
        if self.kind == "clip":
            similarity = scale * one @ other.T
            return (functional.cross_entropy(similarity, labels) + functional.cross_entropy(similarity.T, labels)) / 2
        every = torch.cat([one, other])
        similarity = (scale * every @ every.T).fill_diagonal_(-math.inf)
        return functional.cross_entropy(similarity, torch.cat([labels + len(one), labels]))

    def evaluate(self, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of an eval batch, and the similarities (N, N) of its pairs. Raises as `outputs`."""
        outputs = in_full_precision(self.outputs(model, batch)[0])
        one, other, scale = self._scaled(outputs)
        labels = torch.arange(len(one), device=one.device)
        return StepOutput(self.loss(outputs, None) * len(one), len(one), scale * one @ other.T, labels)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """Embeddings (N, d), or with `towers` a tuple of two."""
        if self.towers:
            return self.outputs(model, batch)[0][:2]
        inputs = batch[0] if is_pair(batch) else batch
        return _embeddings(call_model(model, inputs[0] if is_pair(inputs) else inputs))

    def _scaled(self, outputs: Any) -> tuple[Tensor, Tensor, Tensor | float]:
        if len(outputs) == 3:
            return outputs
        learned = None
        if self.log_scale is not None:  # a clamp would take the gradient away, with which the scale comes back
            free = self.log_scale.to(outputs[0].dtype)
            learned = (free - (free - MAX_SCALE).clamp(min=0).detach()).exp()
        return outputs[0], outputs[1], self.scale if learned is None else learned

    def _views(self, batch: Any) -> tuple[Any, Any]:
        pair = batch[0] if is_pair(batch) and is_pair(batch[0]) else batch
        if not is_pair(pair):
            raise TypeError(
                "Contrastive expects a batch of two views (one, other), or ((one, other), labels), as dist_train.data.TwoViews "
                f"makes it; found {shapes_of(batch)}"
            )
        return pair[0], pair[1]


def _embeddings(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        raise TypeError(f"Contrastive expects that the model gives embeddings (N, d), found {shapes_of(outputs)}")
    return functional.normalize(in_full_precision(outputs), dim=1)


def _of_towers(model: nn.Module, outputs: Any) -> tuple[Tensor, ...]:
    """Embeddings of length 1, and the model's own scale."""
    scale = None
    if isinstance(outputs, Mapping) and {"image_embeds", "text_embeds"} <= outputs.keys():
        found = (outputs["image_embeds"], outputs["text_embeds"])
        own = getattr(model, "logit_scale", None)
        scale = own.exp() if isinstance(own, Tensor) else None
    elif isinstance(outputs, tuple | list) and len(outputs) in (2, 3):
        found, scale = (outputs[0], outputs[1]), outputs[2] if len(outputs) == 3 else None
    else:
        raise TypeError(
            "Contrastive with towers expects that model(one, other) gives (a, b) or (a, b, scale), or image_embeds and "
            f"text_embeds; found {shapes_of(outputs)}"
        )
    return (*map(_embeddings, found), *([] if scale is None else [scale.reshape(())]))
