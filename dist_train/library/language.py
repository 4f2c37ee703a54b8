"""Language models: the next token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.task.batch import in_full_precision, is_pair, shapes_of
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

    - (inputs, targets): int64 (N, T) each, targets already shifted by one (packed windows, as nanoGPT's and `data.Tokens`); no
      attention mask, which a mapping has,
    - a mapping as of transformers' tokenizers and collators: `input_ids` (N, T), `attention_mask` and whatever else the model
      takes, by name; and `labels` (N, T), not shifted, which are the `input_ids` without padding if they aren't given; or a pair
      of such a mapping and labels, as `data.inputs` and `data.target` make it,
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

    classes_dim = -1  # of what `predict` returns: see `evaluation.meaning`

    def __init__(self, ignore_index: int = -100):
        self.ignore_index = ignore_index
        self._checked = False

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of a batch, summed over tokens.

        Raises:
            TypeError, ValueError: the batch has another form, or other targets than the next tokens, or the model gives no logits
                for each token.
        """
        inputs, targets, shifted = self._parts(batch)
        if not self._checked:
            self._check(inputs, targets, shifted)
            self._checked = True
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
        if is_pair(batch) and isinstance(batch[0], Mapping):  # by data.inputs and data.target
            batch = {**batch[0], "labels": batch[1]}
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

    def _check(self, inputs: Any, targets: Tensor, shifted: bool) -> None:
        """What would train without an error on something else; on the first batch only, as it reads values."""
        tokens = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
        if tokens.shape != targets.shape or not targets.numel():
            return
        counted = targets != self.ignore_index
        same = float((tokens == targets)[counted].double().mean())
        if not shifted:
            if same < 0.5:
                raise ValueError(
                    "a LanguageModel shifts labels by one itself: expected the input_ids, -100 where they don't count, but "
                    f"{1 - same:.0%} of those that count are other tokens. Leave the shift to it, or return a tuple (inputs, "
                    "targets); for masked language models (BERT) write a task of your own"
                )
            return
        following = bool((tokens[:, 1:] == targets[:, :-1])[counted[:, :-1]].all())
        only_bits = targets.dtype == torch.bool or bool(((targets == 0) | (targets == 1)).all() and tokens.max() > 1)
        if only_bits and not following:
            raise ValueError(
                "a LanguageModel expects a batch of (inputs, targets), but the second tensor holds only 0 and 1, as an "
                "attention mask does: return dicts {input_ids: ..., attention_mask: ...} from the dataset; the labels follow "
                "from them"
            )
        if same == 1 and not following:
            raise ValueError(
                "a LanguageModel expects targets that are shifted by one, each the token behind its input, but here they are "
                "the inputs themselves: return (tokens[:-1], tokens[1:]), or a dict {input_ids: ..., labels: ...}, which it "
                "shifts"
            )


def _call(model: nn.Module, inputs: Any, targets: Tensor | None) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if targets is not None and "targets" in inspect.signature(model.forward).parameters:
        return model(inputs, targets=targets)
    return model(inputs)
