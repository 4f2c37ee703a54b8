"""Language models: the next token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dist_train.task.batch import in_full_precision, shapes_of
from dist_train.task.task import full_precision
from dist_train.task.terms import StepOutput


def logits_of(outputs: Any) -> Tensor:
    """The logits among a model's outputs: a tensor itself, `logits` of a mapping or object, the first of a tuple.

    Raises:
        TypeError: there are none.
    """
    found = outputs
    if isinstance(found, Mapping):
        found = found.get("logits")
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    elif not isinstance(found, Tensor):
        found = getattr(found, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "expected the model to return its logits: a tensor, a mapping or object with `logits`, or a tuple that begins with "
            f"them; found {shapes_of(outputs)}"
        )
    return found


class LanguageModel:
    """Cross-entropy of the next token, over the tokens that count: loss = -1/T * sum over t of log p(x_t | x_<t).

    A batch is one of

    - (inputs, targets): int64 (N, T) each, targets already shifted by one (packed windows, as nanoGPT's and `data.Tokens`),
    - a mapping as of transformers' tokenizers and collators: `input_ids` (N, T), `attention_mask` and whatever else the model
      takes, by name; and `labels` (N, T), not shifted, which are the `input_ids` without padding if they aren't given,
    - `input_ids` alone, (N, T): each token is the target of those before it.

    The model maps tokens to logits (N, T, vocabulary), also as (logits, loss) (nanoGPT's; it gets the targets where its forward
    has a parameter `targets`, without which it would give the last token's logits) or as an object with `logits` (transformers,
    peft). A model's own loss is never used: it is a mean over its micro-batch, where the mean over the tokens of the whole global
    batch is meant.

    The weight is the number of tokens that count, so `loss` is per token and the metric `perplexity` its exp. The outputs for
    metrics are logits (N, T, vocabulary) and targets (N, T). `predict` returns the logits.

    Args:
        ignore_index: targets that don't count.
    """

    classes_dim = -1  # of what `predict` returns: see `training.meaning`

    def __init__(self, ignore_index: int = -100):
        self.ignore_index = ignore_index

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of a batch, summed over tokens.

        Raises:
            TypeError, ValueError: the batch has another form, or the model gives no logits for each token.
        """
        inputs, targets, shifted = self._parts(batch)
        logits = logits_of(_call(model, inputs, targets if shifted else None))
        if logits.dim() != 3 or logits.shape[:2] != targets.shape:
            raise ValueError(
                f"expected logits of shape (N, T, vocabulary) for each of the tokens {tuple(targets.shape)}, but the model gave "
                f"{shapes_of(logits)}"
            )
        if not shifted:  # the last token has no next one
            logits, targets = logits[:, :-1], targets[:, 1:]
        with full_precision(logits):
            wide = in_full_precision(logits)
            total = functional.cross_entropy(
                wide.reshape(-1, wide.shape[-1]), targets.reshape(-1), ignore_index=self.ignore_index, reduction="sum"
            )
        return StepOutput(total, (targets != self.ignore_index).sum(), logits, targets)

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits (N, T, vocabulary) of the inputs of a batch."""
        inputs = batch if isinstance(batch, Tensor) else self._parts(batch)[0]
        return logits_of(_call(model, inputs, None))

    def _parts(self, batch: Any) -> tuple[Any, Tensor, bool]:
        """(inputs of the model, targets, whether these are shifted already)."""
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            labels = batch.get("labels")
            if labels is None:
                labels = batch["input_ids"]
                if (mask := batch.get("attention_mask")) is not None:
                    labels = labels.masked_fill(mask == 0, self.ignore_index)
            return inputs, labels, False
        parts = [batch] if isinstance(batch, Tensor) else batch if isinstance(batch, list | tuple) else []
        if len(parts) in (1, 2) and all(isinstance(part, Tensor) and part.dim() == 2 for part in parts):
            return (*parts, True) if len(parts) == 2 else (parts[0][:, :-1], parts[0][:, 1:], True)
        raise TypeError(
            "a LanguageModel expects a batch of (inputs, targets), each int64 (N, T), targets shifted by one; a mapping with "
            f"input_ids and, where they differ, labels; or input_ids alone; found {shapes_of(batch)}"
        )


def _call(model: nn.Module, inputs: Any, targets: Tensor | None) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if targets is not None and "targets" in inspect.signature(model.forward).parameters:
        return model(inputs, targets=targets)
    return model(inputs)
