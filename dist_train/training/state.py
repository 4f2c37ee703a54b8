"""What is saved of a run, and how it is restored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.building.model import load_weights
from dist_train.building.prepare import building, frozen_source
from dist_train.checkpoint.store import ranking_key
from dist_train.config.errors import ConfigError
from dist_train.data.digest import content_digest
from dist_train.evaluation.evaluate import on_rank_zero
from dist_train.optim.parameters import match_strides
from dist_train.reduction.leaves import changed
from dist_train.step.several import Optimizers
from dist_train.task.entries import monitored
from dist_train.task.task import SeveralLosses
from dist_train.training.callbacks import callback_states, load_callback_states
from dist_train.training.unfreezing import load_trainable_state, trainable_state
from dist_train.watch.status import SYNC, status

if TYPE_CHECKING:
    from dist_train.checkpoint.store import Found
    from dist_train.objective.modules import Modules
    from dist_train.runtime.world import World
    from dist_train.step.several import SeveralSteppers
    from dist_train.step.step import Stepper
    from dist_train.training.parts import Parts

SAME_WEIGHTS = 1e-4  # unequal GPUs may round otherwise; what isn't reduced differs by far more


@dataclass
class Progress:
    """The progress of a run; all of it is in every checkpoint.

    Attributes:
        step: optimizer steps done. samples: consumed by them. seconds: trained, over all starts.
        skipped_samples: of these, those that couldn't be read and were replaced (`data.on_error: skip`).
        evaluated_step: `step` of the last complete evaluation, -1 before the first.
        evaluation_due: a stop has interrupted one.
        metrics: those of the last evaluation.
        best, best_step: the best value of the metric that decides which checkpoint is kept. best_loss: val/loss of that one.
        finished: why training is over, once it is.
    """

    step: int = 0
    samples: int = 0
    skipped_samples: int = 0
    seconds: float = 0.0
    evaluated_step: int = -1
    evaluation_due: bool = False
    best: float | None = None
    best_loss: float = -math.inf
    best_step: int = 0
    finished: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def take_best(self, name: str, mode: str) -> bool:
        """Whether the last evaluation is the best so far by metric `name`; it is then remembered as that."""
        if not self.is_best(name, mode):
            return False
        now = ranking_key(self.metrics, name, mode)
        assert now is not None
        self.best, self.best_loss, self.best_step = monitored(self.metrics, name), now[1], self.step
        return True

    def is_best(self, name: str, mode: str) -> bool:
        """Whether the last evaluation is better than the best before it, by metric `name`."""
        now = ranking_key(self.metrics, name, mode)
        before = None if self.best is None else ranking_key({"val/loss": self.best_loss, name: self.best}, name, mode)
        return now is not None and (before is None or now < before)


def snapshot(
    parts: Parts,
    stepper: Stepper | SeveralSteppers,
    progress: Progress,
    ranks: list[dict[str, Any]],
    stream: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that a run resumes from, as trees of tensors and plain values; `model` and `ema` are weights by name.

    Args:
        ranks: from `of_every_rank`. stream: the position of a stream's readers.
    """
    states: dict[str, Any] = {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict()}
    if parts.frozen is not None:
        states["model"], digests = parts.frozen.split(states["model"])
        if digests:
            states["frozen"] = {"sha256": digests, "from": frozen_source(parts.config)}
    if parts.ema is not None:
        states["ema"] = parts.ema.state_dict()
    if task := parts.modules.task_state():  # parameters and buffers of loss and task
        states["task"] = task
    if any(ranks):
        states["ranks"] = ranks
    small = {"stepper": stepper, "schedule": parts.schedule, "stop_when": parts.stop_when}
    states["trainer"] = {
        "progress": asdict(progress),
        **{name: part.state_dict() for name, part in small.items() if part is not None},
        "constants": parts.modules.constants(),
        "trained": trainable_state(parts),
        "optimizers": _optimizer_names(parts),
        "order": _order(parts),
        "callbacks": callback_states(parts.callbacks, parts.config.callbacks),
        "stream": stream,
    }
    return states


def of_every_rank(modules: Modules, world: World, *, equal: bool = False) -> list[dict[str, Any]]:
    """On rank 0: what no state_dict holds of its modules, then what differs from it in each other rank's buffers and numbers.

    Every rank calls it; the others get nothing.

    Args:
        equal: buffers and numbers must not differ either (`distributed.reproducibility: bitwise`).

    Raises:
        ValueError: this rank's weights aren't those of rank 0, or what must be `equal`.
    """
    if world.size == 1:
        return [modules.unsaved()]
    mine = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in modules.values().items()}
    digests = {name: content_digest(value) for name, value in mine.items()}
    norms = _norms(modules)
    first, first_norms = world.broadcast((digests, norms))
    for name, norm in norms.items():
        if abs(norm - first_norms[name]) > SAME_WEIGHTS * abs(norm):  # false for nan
            raise ValueError(
                f"the ranks' weights have become different: the norm of {name} is {norm:.6g} on rank {world.rank} and "
                f"{first_norms[name]:.6g} on rank 0. A forward, a callback or the optimizer changes it by what it sees or draws "
                "on its rank alone: let all ranks do the same, or make it a buffer, which each rank may have for itself"
            )
    status.phase = SYNC
    differing = {name: value for name, value in mine.items() if digests[name] != first.get(name)}
    if equal and differing:
        raise ValueError(changed(next(iter(differing))))
    ranks = on_rank_zero(world, differing)
    return [modules.unsaved(), *ranks[1:]] if world.is_main else []


@torch.no_grad()
def _norms(modules: Modules) -> dict[str, float]:
    parameters = dict(modules.named_parameters())
    norms = torch._foreach_norm(list(parameters.values()))
    return dict(zip(parameters, torch.stack([norm.double() for norm in norms]).tolist(), strict=True))


def restore(
    parts: Parts, found: Found, changed: Sequence[str], note: Callable[[str], None]
) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint into the parts of a config, of which the keys `changed` are to have their new values.

    Returns:
        The position, and the state of the stepper, which is built for the parameters that train now.

    Raises:
        ConfigError: the model or the data aren't those that were trained.
    """
    _check_data(parts, found)
    state = found.load("trainer")
    _check_optimizers(parts, state, changed)

    def has_changed(*sections: str) -> bool:
        return any(key.startswith(sections) for key in changed)

    load_weights(parts.modules, found, [key for key in changed if key.startswith(("loss", "task"))], parts.frozen)
    _restore_optimizer(parts, found, state.get("trained"), changed, note)
    progress = Progress(**state["progress"])
    if parts.schedule is not None:
        if has_changed("optimizer", "scheduler", "transfer.freeze"):  # brought to where the new one would be by now
            parts.schedule.advance(progress.step)
        elif "schedule" in state:
            parts.schedule.load_state_dict(state["schedule"])
    if parts.stop_when is not None and "stop_when" in state and not has_changed("trainer.stop_when"):
        parts.stop_when.load_state_dict(state["stop_when"])
    if parts.ema is not None and "ema" in found.parts:
        parts.ema.load_state_dict(found.load("ema"))
    elif parts.ema is not None:
        note("the EMA weights start at this step")
        parts.ema.restart()
    ranks = found.load("ranks") if "ranks" in found.parts else [{}]
    if len(ranks) == parts.world.size and parts.plan.leaf_size is None:  # bitwise, all ranks have rank 0's
        parts.modules.load_values(ranks[parts.world.rank])
    load_callback_states(parts.callbacks, parts.config.callbacks, state["callbacks"], note)
    with building("data.train"):
        parts.train_loader.load_state_dict(state.get("stream"), progress.step)
    if found.value("best", list | None) != (list(parts.keep_best) if parts.keep_best else None):
        progress.best = None  # it is that of another metric
    if has_changed("trainer.duration", "trainer.stop_when"):
        progress.finished = None  # a run that had reached its end resumes where another end is asked for now
    return progress, state["stepper"]


def _check_data(parts: Parts, found: Found) -> None:
    """The dataset must still be the one that the position counts in."""
    old, plan = found.value("plan", dict), parts.plan
    if old.get("length") != plan.length:
        raise ConfigError.single(
            "data.train",
            f"this run has trained on {old.get('length')} samples, but the dataset now has {plan.length}: a position in it means "
            "something else. Give the run another run.name, or restore the dataset",
        )
    mine = plan.record()
    if old.get("weights") != mine.get("weights"):
        raise ConfigError.single(
            "data.weights",
            f"this run has drawn its samples by other weights (digest {old.get('weights', 'none')}) than these "
            f"({mine.get('weights', 'none')}): give the run another run.name, or restore the weights",
        )
    if old.get("fingerprint") != mine["fingerprint"]:
        message = "the order of samples has changed (numpy's RandomState gives different random numbers here)"
        raise ConfigError.single("data.train", message)


def _check_optimizers(parts: Parts, saved: dict[str, Any], changed: Sequence[str]) -> None:
    """The optimizers must be as many, and have the same names, as when the run was started; in another order of the config, too,
    the same parameters and turns."""
    of_steppers = (
        [] if "totals" in saved["stepper"] else list(saved["stepper"])
    )  # before there were several on one loss
    before, now = set(saved.get("optimizers", of_steppers)), set(_optimizer_names(parts))
    if before != now:
        raise ConfigError.single(
            "optimizer",
            f"this run was started with {', '.join(sorted(before)) or 'one optimizer'}, and the config has "
            f"{', '.join(sorted(now)) or 'one optimizer'}: give the new one another run.name, or keep the names",
        )
    order = _order(parts)
    if order != saved.get("order", order):
        raise ConfigError.single(
            "optimizer",
            f"without `moves` in the task optimizers move in the order of the config, which was {', '.join(saved['order'])} when "
            f"this run was started and is {', '.join(order)}: restore it, or give the run another run.name",
        )
    if not now or saved.get("trained") is None or any(key.startswith(("optimizer", "transfer")) for key in changed):
        return
    if saved["trained"]["groups"] != trainable_state(parts)["groups"]:
        raise ConfigError.single(
            "optimizer",
            "some parameters are matched by several optimizers, of which the first trains them, and in this order that is "
            "another one than when the run was started: restore the order, or give the run another run.name",
        )


def _order(parts: Parts) -> list[str]:
    """In which optimizers move in each step, where the config's order says so; else none."""
    task = parts.task
    return task.names if isinstance(task, SeveralLosses) and not hasattr(task.task, "moves") else []


def _optimizer_names(parts: Parts) -> list[str]:
    """Of several optimizers; none for one."""
    return list(parts.optimizer.by_name) if isinstance(parts.optimizer, Optimizers) else []


def _restore_optimizer(
    parts: Parts, found: Found, trained: dict[str, Any] | None, changed: Sequence[str], note: Callable[[str], None]
) -> None:
    other = any(
        key == "optimizer"
        or (isinstance(parts.optimizer, Optimizers) and key.removeprefix("optimizer.") in parts.optimizer.by_name)
        or key.startswith("transfer.freeze")
        or key.endswith((".groups", ".ndim_below"))
        or ".match" in key
        for key in changed
    )
    if any(key.endswith(".layer_decay") for key in changed):  # one group for each layer, or no longer
        now = trainable_state(parts)["groups"]
        other = other or trained is None or trained["groups"][: len(now)] != now
    if other or not (trained is None or load_trainable_state(parts, trained)):
        note("another optimizer, or other parameters for it: its state starts over")
        return
    groups = parts.optimizer.param_groups
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    parts.optimizer.load_state_dict(found.load("optimizer"))
    for one in parts.optimizer.by_name.values() if isinstance(parts.optimizer, Optimizers) else [parts.optimizer]:
        match_strides(one)
    if any(key.startswith(("optimizer", "scheduler")) for key in changed):
        # The saved groups would silently bring the old values back.
        for group, values in zip(parts.optimizer.param_groups, fresh, strict=False):  # not those of callbacks
            group.update(values)
