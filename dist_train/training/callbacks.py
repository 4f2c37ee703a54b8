"""Hooks for user code: a few named moments of a run, and a state that is saved with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dist_train.config.fields import Duration, in_steps, plain
from dist_train.models.transfer import match_parameters
from dist_train.optim.groups import Grouping, Home, add_group

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dist_train.config.schema import Config
    from dist_train.data.plan import Plan
    from dist_train.objective.modules import Modules
    from dist_train.runtime.world import World


class Training(Protocol):
    """What a callback sees of the run that calls it: to be read only, unless the list says otherwise.

    Attributes:
        config: the resolved config.
        world: `rank`, `size`, `is_main`, `device`.
        plan: the order of the training samples; `plan.steps_per_epoch`.
        model: the module itself, without DDP around it; `requires_grad_` may be called on its parameters.
        modules: the model together with what its loss or task trains: `named_parameters()` names all of it.
        optimizer: `add_param_group` may be called, and the options in `param_groups` may be changed.
        step: optimizer steps done, over all starts of the run.
        epoch: the one, from 1, that the last step done belongs to; 0 before the first.
        seconds: seconds trained, over all starts of the run.
        outcome: None while training; in `on_end`, `completed` or `preempted`.
    """

    config: Config
    world: World
    plan: Plan
    model: nn.Module
    modules: Modules
    optimizer: torch.optim.Optimizer
    outcome: str | None

    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def seconds(self) -> float: ...

    def log(self, name: str, value: float) -> None:
        """Add a metric to the next train row (that of rank 0 is recorded)."""


class Callback:
    """Base class of callbacks. Every hook runs on every rank, in the order of the config; see `Training` for its argument.

    A hook must not change how many batches a rank runs, nor call collectives on some ranks only.
    """

    def on_start(self, trainer: Training) -> None:
        """Before the first step of this start, after a checkpoint was loaded."""

    def on_step_end(self, trainer: Training) -> None:
        """After an optimizer step, its schedule and EMA; reading a tensor here makes the host wait for the device."""

    def on_epoch_end(self, trainer: Training) -> None:
        """After the last step of an epoch, before an evaluation that is due."""

    def on_evaluation_end(self, trainer: Training, metrics: dict[str, float]) -> None:
        """After an evaluation; `metrics` as in metrics.jsonl, with their split (`val/loss`, ...)."""

    def on_end(self, trainer: Training) -> None:
        """After the last step of this start, before the final save."""

    def state_dict(self) -> dict[str, Any]:
        """What is saved in checkpoints: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` returned."""


class Unfreeze(Callback):
    """Gradual unfreezing: parameters that `transfer.freeze` has frozen train from some moment on.

    Args:
        match: name patterns, as in `transfer.freeze`.
        after: when, in epochs or steps: `3ep`, `500step`.
        lr: their lr, which the schedule takes up from there, in a parameter group of their own (one for each of the config's
            groups that would take them, whose other options they have; layer_decay applies). None: they join the config's
            groups, at the lr that those have by now.
    """

    def __init__(self, match: str | list[str], after: str, lr: float | None = None):
        self.match = [match] if isinstance(match, str) else list(match)
        self.after, self.lr = Duration.parse_count(after), lr

    def on_start(self, trainer: Training) -> None:
        """Look the names up at once, so that a mistake shows before the first step."""
        self._names = match_parameters(trainer.modules, self.match, "callbacks")
        self._at = in_steps(self.after, trainer.plan.steps_per_epoch) or 0
        if trainer.step >= self._at:
            self._unfreeze(trainer)

    def on_step_end(self, trainer: Training) -> None:
        """Once, before the evaluation and the save that are due at that step."""
        if trainer.step == self._at:
            self._unfreeze(trainer)

    def _unfreeze(self, trainer: Training) -> None:
        known = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        parameters = dict(trainer.modules.named_parameters())
        frozen = [name for name in self._names if not parameters[name].requires_grad]
        for name in frozen:
            parameters[name].requires_grad_(True)
        if self.lr is None:
            return
        grouping = Grouping(trainer.modules, trainer.config.optimizer)
        new: dict[Home, dict[str, nn.Parameter]] = {}
        for name in frozen:
            if id(parameters[name]) not in known:
                new.setdefault(grouping.home[name], {})[name] = parameters[name]
        for home, members in new.items():
            options = {key: value for key, value in grouping.options(home).items() if key != "lr_scale"}
            options["lr"] = self.lr * grouping.scale(home)
            add_group(trainer.optimizer, members, options)


def callback_states(callbacks: Sequence[Callback], specs: Sequence[Any]) -> list[dict[str, Any]]:
    """What a checkpoint holds of the callbacks that `specs`, of the config, describe: class, arguments and state of each."""
    return [
        {"name": _name(callback), "spec": _text(spec), "state": callback.state_dict()}
        for callback, spec in zip(callbacks, specs, strict=True)
    ]


def load_callback_states(
    callbacks: Sequence[Callback], specs: Sequence[Any], saved: Sequence[Any], note: Callable[[str], None]
) -> None:
    """Give each saved state to the callback of its class and arguments; of several such, by their order.

    A class that occurs once, then and now, keeps its state under other arguments. The rest starts over.
    """
    named = [(_name(callback), _text(spec), callback) for callback, spec in zip(callbacks, specs, strict=True)]
    if not all(isinstance(entry, dict) and "name" in entry for entry in saved):  # of a version that went by position
        saved = [{"name": n, "spec": t, "state": state} for (n, t, _), state in zip(named, saved, strict=False)]
    left, waiting = list(saved), []
    for name, text, callback in named:
        index = next((k for k, entry in enumerate(left) if (entry["name"], entry["spec"]) == (name, text)), None)
        if index is None:
            waiting.append((name, callback))
        else:
            callback.load_state_dict(left.pop(index)["state"])
    for name, callback in waiting:
        states = [entry["state"] for entry in left if entry["name"] == name]
        if len(states) == 1 and [other for other, _ in waiting].count(name) == 1:
            callback.load_state_dict(states[0])
        elif states:
            note(f"callbacks: the state of {name} starts over: which of several callbacks it belongs to isn't known")


def _name(callback: Callback) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"


def _text(spec: Any) -> str:
    return json.dumps(plain(spec), sort_keys=True)
