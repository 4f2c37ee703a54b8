"""Going on with a run: whether there is one, whether the config still fits it, and putting its state back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import yaml

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import CheckpointStore, find_at, step_name
from dist_train.config.errors import ConfigError
from dist_train.engine.trainer import Progress

if TYPE_CHECKING:
    from dist_train.checkpoint.store import Found
    from dist_train.config.changes import Change
    from dist_train.config.schema import Config
    from dist_train.engine.build import Blueprint
    from dist_train.engine.ema import EMA
    from dist_train.engine.optim import Schedule
    from dist_train.engine.rundir import RunDir


@dataclass
class Decision:
    """What a start does, decided by rank 0 from what it finds in the run's directory; nothing is changed there.

    Attributes:
        action: `fresh`, `resume`, or `completed` (nothing to do).
        changes: what differs from the config of the last start, as lines to log.
        changed: the keys among them that a restored state would undo (taken by consent).
        source: the checkpoint of another run to begin from.
    """

    action: str = "fresh"
    changes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    source: str | None = None


def decide(config: Config, run: RunDir) -> Decision:
    """See `Decision`.

    Raises:
        ConfigError: the run can't be continued under this config; says with what differs, and what to do.
    """
    source = config.checkpoint.resume
    store = CheckpointStore(run.storage.sub("checkpoints"))
    # What is left of a save that was killed under a URL is no checkpoint; a damaged one that was set aside was one.
    known = [step_name(step) for step in store.steps() if store.is_there(step)]
    known += [name for name in store.asides() if name.startswith("damaged-")]
    if config.checkpoint.resume == "never" and (known or run.storage.exists("config.yaml")):
        raise ConfigError.single(
            "checkpoint.resume",
            f"`never` begins a new run, but {run.location} holds one already ({len(known)} checkpoint(s)); give it another "
            "run.name, or delete that directory",
        )
    if not known and source not in ("auto", "never"):
        return _begin_from(config, source)
    if not known or not run.storage.exists("config.yaml"):
        return Decision("fresh")
    from dist_train.config.changes import compare

    old = yaml.safe_load(run.storage.read_bytes("config.yaml"))
    changes = compare(old, config.to_dict())
    _refuse(changes, config, run.location)
    lines = [str(change) for change in changes]
    changed = [change.key for change in changes if change.kind == "consent"]
    result = run.read_json("result.json")
    same_end = not any(change.key.startswith("trainer.duration") for change in changes)
    if result is not None and result["state"] == "completed" and same_end and not changed:
        return Decision("completed", lines)
    return Decision("resume", lines, changed)


def _begin_from(config: Config, source: str) -> Decision:
    """A new run that begins with another run's checkpoint (`checkpoint.resume: PATH`), under the same rules."""
    try:
        found = find_at(source)
    except CheckpointError as error:
        raise ConfigError.single("checkpoint.resume", str(error)) from None
    from dist_train.config.changes import compare

    changes = compare(found.meta["config"], config.to_dict())
    _refuse(changes, config, found.location)
    changed = [change.key for change in changes if change.kind == "consent"]
    return Decision("resume", [str(change) for change in changes], changed, found.location)


def _refuse(changes: list[Change], config: Config, location: str) -> None:
    bad = [change for change in changes if change.kind == "refused"]
    asked = [change for change in changes if change.kind == "consent"]
    from dist_train.config.changes import refusal_message

    if bad or (asked and not config.checkpoint.accept_changes):
        raise ConfigError.single("", refusal_message(bad + asked, location))


def find_checkpoint(decision: Decision, manager: CheckpointManager) -> Found:
    """The newest checkpoint that verifies, or that of another run (rank 0).

    Raises:
        CheckpointError: none of those that are there is whole.
    """
    if decision.source is not None:
        return find_at(decision.source)
    found = manager.newest()
    assert found is not None  # `decide` has seen some; where none of them is whole, `newest` says so
    manager.resume_from(found)
    return found


def check_fits(found: Found, blueprint: Blueprint) -> None:
    """The dataset must still be the one that the position counts in.

    Raises:
        ConfigError: its length, or the order made from it, has changed.
    """
    old = found.meta["plan"]
    if old["length"] != blueprint.plan.length:
        raise ConfigError.single(
            "data.train",
            f"this run has trained on {old['length']} samples, but the dataset now has {blueprint.plan.length}: a position "
            "in it means something else. Give the run another run.name, or restore the dataset",
        )
    if old["fingerprint"] != blueprint.plan.fingerprint():
        raise ConfigError.single(
            "data.train", "the order of samples has changed (numpy's RandomState gives other numbers here)"
        )


def load_model(found: Found, blueprint: Blueprint) -> None:
    """Put the saved weights into the model.

    Raises:
        ConfigError: they don't fit it.
    """
    try:
        blueprint.model.load_state_dict(found.load("model"))
    except RuntimeError as error:
        raise ConfigError.single("model", f"the weights in {found.location} don't fit this model: {error}") from None


def load_training(
    found: Found,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule | None,
    ema: EMA | None,
    changed: list[str],
    steps_per_epoch: int,
) -> tuple[dict[str, Any], Progress, list[str]]:
    """Put optimizer, schedule and EMA back; (the trainer's state, the progress, notes on what a changed config did)."""
    state = found.load("trainer")
    progress = Progress(**state["progress"])
    notes: list[str] = []
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    regrouped = any(key.startswith(("optimizer._target_", "optimizer.groups", "transfer.freeze")) for key in changed)
    lr_changed = regrouped or any(key.split(".")[0] in ("optimizer", "scheduler") for key in changed)
    if regrouped:
        notes.append("another optimizer, or other parameters for it: its state begins anew")
    else:
        optimizer.load_state_dict(found.load("optimizer"))
        if lr_changed:
            # The saved groups would silently bring the old values back.
            for group, values in zip(optimizer.param_groups, fresh, strict=True):
                group.update(values)
    if schedule is not None:
        if not lr_changed and state["schedule"] is not None:
            schedule.load_state_dict(state["schedule"])
        elif not schedule.on_plateau:
            steps = schedule.every.value * (steps_per_epoch if schedule.every.unit == "ep" else 1)
            for _ in range(int(progress.step // steps)):
                schedule.step()
    if ema is not None:
        if "ema" in found.parts:
            ema.load_state_dict(found.load("ema"))
        else:
            notes.append("the average of the weights begins at this step")
            ema.restart()
    return state, progress, notes
