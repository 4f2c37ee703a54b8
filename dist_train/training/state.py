"""What is saved of a run, and how it is put back."""

from __future__ import annotations

import hashlib
import math
import platform
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import dist_train
from dist_train.config.errors import ConfigError
from dist_train.config.fields import to_json
from dist_train.step.parameters import match_strides
from dist_train.training import unfreezing
from dist_train.training.callbacks import callback_states, load_callback_states
from dist_train.training.due import in_steps
from dist_train.training.evaluate import on_rank_zero
from dist_train.training.prepare import building
from dist_train.watch.status import SYNC, status

if TYPE_CHECKING:
    from dist_train.checkpoint.store import Found
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World
    from dist_train.step.modules import Modules
    from dist_train.training.parts import Parts
    from dist_train.training.trainer import Trainer

SAME_WEIGHTS = 1e-4  # unequal GPUs may round otherwise; what isn't reduced differs by far more


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        step: optimizer steps committed. samples: samples consumed by them. seconds: time trained, over all starts.
        evaluated_step: the step of the last complete evaluation, -1 before the first. evaluation_due: a stop broke one off.
        metrics: those of the last evaluation.
        best, best_step: the best value of the metric that is kept. best_loss: of equal ones, that with the least loss.
        finished: why training is over, once it is.
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    evaluated_step: int = -1
    evaluation_due: bool = False
    best: float | None = None
    best_loss: float = -math.inf
    best_step: int = 0
    finished: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def snapshot(
    parts: Parts, progress: Progress, ranks: list[dict[str, Any]], stream: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything that a run goes on from, as trees of tensors and plain values; `model` and `ema` are weights by name.

    `task` holds parameters and buffers of loss and task; `ranks` what `of_every_rank` gave, `stream` where the readers
    of a stream stand.
    """
    states: dict[str, Any] = {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict()}
    if parts.ema is not None:
        states["ema"] = parts.ema.state_dict()
    if task := parts.modules.task_state():
        states["task"] = task
    if any(ranks):
        states["ranks"] = ranks
    rest = {name: part.state_dict() for name, part in _small_parts(parts).items()}
    rest |= {"constants": parts.modules.constants(), "trained": unfreezing.state(parts)}
    callbacks = callback_states(parts.callbacks, parts.config.callbacks)
    return {**states, "trainer": {"progress": asdict(progress), **rest, "callbacks": callbacks, "stream": stream}}


def of_every_rank(modules: Modules, world: World) -> list[dict[str, Any]]:
    """On rank 0: what of it no state_dict holds, then in what each other rank's buffers and numbers differ from rank 0's.

    Every rank calls it; the others get nothing.

    Raises:
        ValueError: this rank's weights aren't those of rank 0.
    """
    if world.size == 1:
        return [modules.unsaved()]
    mine = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in modules.every_value().items()}
    digests = {name: _digest(value) for name, value in mine.items()}
    norms = _norms(modules)
    first, first_norms = world.broadcast((digests, norms))
    for name, norm in norms.items():
        if abs(norm - first_norms[name]) > SAME_WEIGHTS * abs(norm):  # not so for nan
            raise ValueError(
                f"the ranks' weights have become different: the norm of {name} is {norm:.6g} on rank {world.rank} and "
                f"{first_norms[name]:.6g} on rank 0. A forward, a callback or the optimizer changes it by what it sees or draws "
                "on its rank alone: let all ranks do the same, or make it a buffer, which each rank may have for itself"
            )
    status.phase = SYNC
    ranks = on_rank_zero(world, {name: value for name, value in mine.items() if digests[name] != first.get(name)})
    return [modules.unsaved(), *ranks[1:]] if world.is_main else []


@torch.no_grad()
def _norms(modules: Modules) -> dict[str, float]:
    parameters = dict(modules.named_parameters())
    norms = torch._foreach_norm(list(parameters.values()))
    return dict(zip(parameters, torch.stack([norm.double() for norm in norms]).tolist(), strict=True))


def _digest(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest() + str(tuple(value.shape))


def _small_parts(parts: Parts) -> dict[str, Any]:
    named = {"stepper": parts.stepper, "schedule": parts.schedule, "stop_when": parts.stop_when}
    return {name: part for name, part in named.items() if part is not None}


def facts(config: Config) -> dict[str, Any]:
    """What a run is trained with: goes into every manifest, and is shown in the report."""
    versions = {"dist_train": dist_train.__version__, "torch": torch.__version__, "python": platform.python_version()}
    found: dict[str, Any] = {"config": to_json(config.to_dict()), "versions": versions, "host": socket.gethostname()}
    for folder in config.run.code_paths[:1]:
        command = ["git", "-C", folder, "rev-parse", "HEAD"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            found["commit"] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # not a repository, or no git
    return found


def meta(trainer: Trainer) -> dict[str, Any]:
    """What the manifest of a checkpoint says about the run."""
    plan = trainer.plan
    return {
        "epoch": trainer.epoch,
        "samples": trainer.progress.samples,
        "world_size": trainer.world.size,
        "best": trainer.parts.keep_best,
        "plan": {"length": plan.length, "fingerprint": plan.fingerprint()},
        **trainer.record,
    }


class Saved(Protocol):
    """A checkpoint (`Found`), or what one would hold."""

    location: str
    parts: list[str]

    def load(self, part: str) -> Any:
        """The state tree of a part."""


def load_weights(modules: Modules, found: Saved, fresh: Sequence[str] = ()) -> None:
    """Put what was saved into a model, and into its loss or task where it comes with one; buffers are rank 0's.

    Args:
        fresh: `loss` or `task`, whose config has changed: what is the config's of them stays as it was built.

    Raises:
        ConfigError: they don't fit it.
        CorruptedError: the bytes aren't those that were saved.
    """
    if "ranks" in found.parts:
        modules.put(found.load("ranks")[0])
    if "task" in found.parts and len(list(modules.children())) > 1:
        constants = found.load("trainer").get("constants", []) if fresh else []
        modules.load_task_state(found.load("task"), keep=constants)
    try:
        modules.model.load_state_dict(found.load("model"))
    except RuntimeError as error:
        raise ConfigError.single("model", f"the weights in {found.location} don't fit this model: {error}") from None


def restore(parts: Parts, found: Found, changed: Sequence[str], note: Callable[[str], None]) -> Progress:
    """Put a checkpoint into the parts of a config, of which the keys `changed` are to have their new values.

    Raises:
        ConfigError: the model or the data aren't those that were trained.
    """
    _check_data(parts, found)
    load_weights(parts.modules, found, [key for key in changed if key.startswith(("loss", "task"))])
    parts.keep_horizon(found.value("horizon", int | None))
    schedule = parts.schedule  # built before the optimizer's state comes back: it writes its first lr into the groups
    state = found.load("trainer")
    _restore_optimizer(parts, found, state.get("trained"), changed, note)
    progress = Progress(**state["progress"])
    if any(key.startswith(("optimizer", "scheduler", "transfer.freeze")) for key in changed):
        state.pop("schedule", None)
        if schedule is not None:  # a new one is brought to where it would stand by now
            schedule.advance(progress.step // (in_steps(schedule.every, parts.plan.steps_per_epoch) or 1))
    if any(key.startswith("trainer.stop_when") for key in changed):
        state.pop("stop_when", None)
    if parts.ema is not None and "ema" in found.parts:
        parts.ema.load_state_dict(found.load("ema"))
    elif parts.ema is not None:
        note("the average of the weights begins at this step")
        parts.ema.restart()
    for name, part in _small_parts(parts).items():
        if name in state:
            part.load_state_dict(state[name])
    ranks = found.load("ranks") if "ranks" in found.parts else [{}]
    if len(ranks) == parts.world.size:
        parts.modules.put(ranks[parts.world.rank])
    load_callback_states(parts.callbacks, parts.config.callbacks, state["callbacks"], note)
    with building("data.train"):
        parts.train_loader.load_state_dict(state.get("stream"), progress.step)
    if found.value("best", list | None) != (list(parts.keep_best) if parts.keep_best else None):
        progress.best = None  # it is that of another metric
    if any(key.startswith(("trainer.duration", "trainer.stop_when")) for key in changed):
        progress.finished = None  # a run that had reached its end goes on where another end is asked for now
    return progress


def _check_data(parts: Parts, found: Found) -> None:
    """The dataset must still be the one that the position counts in."""
    old, plan = found.value("plan", dict), parts.plan
    if old.get("length") != plan.length:
        raise ConfigError.single(
            "data.train",
            f"this run has trained on {old.get('length')} samples, but the dataset now has {plan.length}: a position in it means "
            "something else. Give the run another run.name, or restore the dataset",
        )
    if old.get("fingerprint") != plan.fingerprint():
        message = "the order of samples has changed (numpy's RandomState gives other numbers here)"
        raise ConfigError.single("data.train", message)


def _restore_optimizer(
    parts: Parts, found: Found, trained: dict[str, Any] | None, changed: Sequence[str], note: Callable[[str], None]
) -> None:
    other = any(
        key in ("optimizer", "optimizer.groups") or ".match" in key or key.startswith("transfer.freeze")
        for key in changed
    )
    if other or not (trained is None or unfreezing.put_back(parts, trained)):
        note("another optimizer, or other parameters for it: its state begins anew")
        return
    groups = parts.optimizer.param_groups
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    parts.optimizer.load_state_dict(found.load("optimizer"))
    match_strides(parts.optimizer)
    if any(key.startswith(("optimizer", "scheduler")) for key in changed):
        # The saved groups would silently bring the old values back.
        for group, values in zip(parts.optimizer.param_groups, fresh, strict=False):  # not those of callbacks
            group.update(values)
