"""Several optimizers, each with parameters of its own: with a loss for each (GANs), or one loss for all (Muon and AdamW)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from dist_train.config.errors import ConfigError
from dist_train.models.transfer import match_parameters
from dist_train.objective.modules import Modules
from dist_train.optim.schedule import Schedule
from dist_train.task.batch import clone_batch

if TYPE_CHECKING:
    from dist_train.data.plan import StepWork
    from dist_train.step.step import Stepper


class Owners:
    """Which of several optimizers trains which parameters: the first whose `match` fits; one without `match` takes the rest.

    Raises:
        ConfigError: a parameter that trains belongs to none, or an optimizer gets none.
    """

    def __init__(self, modules: Modules, specs: Mapping[str, Any]):
        left = modules.trained()
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for name, spec in sorted(specs.items(), key=lambda item: item[1].get("match") is None):
            patterns, key = spec.get("match"), f"optimizer.{name}.match"
            patterns = [patterns] if isinstance(patterns, str) else patterns
            taken = (
                list(left) if patterns is None else [n for n in match_parameters(modules, patterns, key) if n in left]
            )
            if not taken:
                raise ConfigError.single(key, f"no parameter that trains is left for the optimizer {name}")
            self.parameters[name] = [left.pop(parameter) for parameter in taken]
        if left:
            shown = ", ".join(list(left)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise ConfigError.single(
                "optimizer",
                f"no optimizer's `match` fits {shown}: leave `match` out for one of them, which then gets the rest, or freeze "
                "them by transfer.freeze",
            )

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Only the parameters of one optimizer require gradients inside."""
        others = [p for other, own in self.parameters.items() if other != name for p in own if p.requires_grad]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


class HasState(Protocol):
    """An optimizer, a schedule, a stepper."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


T = TypeVar("T", bound=HasState)


class ByName(Generic[T]):
    """What each of several optimizers has of its own, by their names."""

    def __init__(self, by_name: Mapping[str, T]):
        self.by_name = dict(by_name)

    def state_dict(self) -> dict[str, Any]:
        """The state of each, by its name."""
        return {name: one.state_dict() for name, one in self.by_name.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, one in self.by_name.items():
            one.load_state_dict(state[name])


class Optimizers(ByName[torch.optim.Optimizer]):
    """Several optimizers with the attributes of one, as far as they make sense: `by_name` has each.

    With one loss for all it is what a `Stepper` has as its optimizer: one backward, clipping and non-finite check, then `step`.
    """

    def step(self) -> None:
        """The step of each, on the gradients that there are."""
        for optimizer in self.by_name.values():
            optimizer.step()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them, by their names: a config may list them in another order when it resumes."""
        return [group for _, optimizer in sorted(self.by_name.items()) for group in optimizer.param_groups]

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError: it isn't known to which one."""
        raise ValueError("of several optimizers add to one: trainer.optimizer.by_name[name].add_param_group(...)")

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> None:
        """Before each of their steps."""
        for optimizer in self.by_name.values():
            optimizer.register_step_pre_hook(hook)


class Schedules(ByName[Schedule]):
    """The schedules of several optimizers."""

    @property
    def note(self) -> str:
        """What to tell the user (see `Schedule.note`)."""
        return "; ".join(filter(None, (schedule.note for schedule in self.by_name.values())))

    def after_step(self, done: int) -> None:
        """After `done` optimizer steps of the run."""
        for schedule in self.by_name.values():
            schedule.after_step(done)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """After an evaluation."""
        for schedule in self.by_name.values():
            schedule.evaluated(metrics)

    def extend(self) -> None:
        """Include groups that were added."""
        for schedule in self.by_name.values():
            schedule.extend()

    def advance(self, steps: int) -> None:
        """Bring new ones to where they would be after `steps` steps of the run."""
        for schedule in self.by_name.values():
            schedule.advance(steps)


class SeveralSteppers(ByName["Stepper"]):
    """A step of the run is a step of each optimizer that moves, in order, on the same global batch with the same seeds.

    Args:
        make: the stepper of an optimizer, called where only its parameters require gradients.
        moves: the optimizers that move in a step (from 0).
    """

    def __init__(self, make: Callable[[str], Stepper], owners: Owners, moves: Callable[[int], list[str]]):
        self.owners, self.moves = owners, moves
        made = {}
        for name in owners.parameters:
            with owners.only(name):
                made[name] = make(name)
        super().__init__(made)

    def __call__(self, work: StepWork, want_norm: bool) -> None:
        """Raises NonFiniteError: see `Stepper`."""
        micros = list(work.micro_batches)
        for name in self.moves(work.step):
            copies = (micro._replace(batch=clone_batch(micro.batch)) for micro in micros)
            with self.owners.only(name):
                self.by_name[name](replace(work, micro_batches=copies), want_norm)

    def take_row(self) -> dict[str, float]:
        """As `Stepper.take_row`: loss/<optimizer>, loss/<optimizer>/<name>, grad_norm/<optimizer>, ...; loss is their sum."""
        return self._joined({name: stepper.take_row() for name, stepper in self.by_name.items()})

    def take_means(self) -> dict[str, float]:
        """As `Stepper.take_means`, by the same names."""
        return self._joined({name: stepper.take_means() for name, stepper in self.by_name.items()})

    def _joined(self, rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        row: dict[str, float] = {"loss": 0.0}
        for name, own in rows.items():
            for key, value in own.items():
                row[key.replace("loss", f"loss/{name}", 1) if key.startswith("loss") else f"{key}/{name}"] = value
            if row[f"loss/{name}"] == row[f"loss/{name}"]:  # not nan, as of one that hasn't moved
                row["loss"] += row[f"loss/{name}"]
        return row

    def read(self) -> None:
        """Read the flags of all steps so far. Raises as `FiniteGuard.read`."""
        for stepper in self.by_name.values():
            stepper.read()
