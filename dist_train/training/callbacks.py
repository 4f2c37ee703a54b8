"""Hooks for one's own code: a few named moments, and a state that is saved with the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dist_train.config.fields import plain

if TYPE_CHECKING:
    from dist_train.training.trainer import Trainer


class Callback:
    """Base of all callbacks. Every hook runs on every rank, in the order of the config, and may read anything of the trainer:
    `step`, `epoch`, `model`, `optimizer`, `config`, `world`, and `log(name, value)` for a figure in the next record.

    A hook must not change how many batches a rank runs, nor call collectives on some ranks only.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this start, after a checkpoint was loaded."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After an optimizer step, its schedule and EMA; reading a tensor here makes the device wait."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After the last step of an epoch, before an evaluation that is due."""

    def on_evaluation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After an evaluation; `metrics` as in the records (`val/loss`, ...)."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this start, before the final save."""

    def state_dict(self) -> dict[str, Any]:
        """What is to be saved: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


def callback_states(callbacks: Sequence[Callback], specs: Sequence[Any]) -> list[dict[str, Any]]:
    """What a checkpoint holds of them. `specs` are those of the config, to which our own callbacks are behind."""
    return [{**name, "state": callback.state_dict()} for name, callback in _named(callbacks, specs)]


def load_callback_states(
    callbacks: Sequence[Callback], specs: Sequence[Any], saved: Sequence[Any], note: Callable[[str], None]
) -> None:
    """Each state goes to the callback of its class and arguments, and of several such by their index.

    A class that is there once, before and now, keeps its state under other arguments. What has no counterpart begins anew.
    """
    named = _named(callbacks, specs)
    if not all(isinstance(entry, dict) and "name" in entry for entry in saved):  # of a version that went by position
        saved = [{**name, "state": state} for (name, _), state in zip(named, saved, strict=False)]
    left = list(saved)
    waiting = []
    for name, callback in named:
        index = next((k for k, entry in enumerate(left) if entry.items() >= name.items()), None)
        if index is None:
            waiting.append((name["name"], callback))
        else:
            callback.load_state_dict(left.pop(index)["state"])
    kinds = [kind for kind, _ in waiting]
    for kind, callback in waiting:
        states = [entry["state"] for entry in left if entry["name"] == kind]
        if kinds.count(kind) == len(states) == 1:
            callback.load_state_dict(states[0])
        elif states:
            note(f"callbacks: the state of {kind} begins anew: which of several was whose can't be told")


def _named(callbacks: Sequence[Callback], specs: Sequence[Any]) -> list[tuple[dict[str, str], Callback]]:
    texts = [json.dumps(plain(spec), sort_keys=True) for spec in specs]
    texts += [""] * (len(callbacks) - len(texts))
    names = [f"{type(callback).__module__}.{type(callback).__qualname__}" for callback in callbacks]
    return [({"name": name, "spec": text}, one) for name, text, one in zip(names, texts, callbacks, strict=True)]
