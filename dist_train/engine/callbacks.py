"""Hooks for one's own code: a few named moments, and a state that is saved with the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.engine.trainer import Trainer


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
