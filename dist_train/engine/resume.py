"""Going on with a run: whether there is one, whether the config still fits it, and which checkpoint it goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import CheckpointStore, find_at, step_name
from dist_train.config.changes import compare, refusal_message
from dist_train.config.errors import ConfigError
from dist_train.config.names import expand_path

if TYPE_CHECKING:
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.checkpoint.store import Found
    from dist_train.config.schema import Config
    from dist_train.engine.rundir import RunDir
    from dist_train.runtime.world import World


@dataclass
class Decision:
    """What a start does, decided by rank 0 from what it finds in the run's directory; nothing is changed there.

    Attributes:
        action: `fresh`, `resume`, or `completed` (nothing to do).
        changes: what differs from the config of the last start, as lines to log. changed: the keys.
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
    store, resume = CheckpointStore(run.storage.sub("checkpoints")), config.checkpoint.resume
    # What is left of a save that was killed under a URL is no checkpoint; a damaged one that was set aside was one.
    known = [step_name(step) for step in store.steps() if store.is_there(step)]
    known += [name for name in store.asides() if name.startswith("damaged-")]
    begun = run.storage.exists("config.yaml")
    if resume == "never" and (known or begun):
        raise ConfigError.single(
            "checkpoint.resume",
            f"`never` begins a new run, but {run.location} holds one already ({len(known)} checkpoint(s)); give it another "
            "run.name, or delete that directory",
        )
    location, source = run.location, None
    old: dict[str, Any]
    if known and begun:
        old = yaml.safe_load(run.storage.read_bytes("config.yaml"))
    elif not known and resume not in ("auto", "never"):
        try:
            found = find_at(expand_path(resume))
        except CheckpointError as error:
            raise ConfigError.single("checkpoint.resume", str(error)) from None
        old, location, source = found.meta["config"], found.location, found.location
    else:
        return Decision()
    changes = compare(old, config.to_dict())
    asked = [change for change in changes if change.kind == "consent"]
    bad = [change for change in changes if change.kind == "refused"]
    if bad or (asked and not config.checkpoint.accept_changes):
        raise ConfigError.single("", refusal_message(bad + asked, location))
    same_end = not asked and not any(change.key.startswith("trainer.duration") for change in changes)
    result = run.read_json("result.json")
    over = same_end and source is None and result is not None and result["state"] == "completed"
    lines = [str(change) for change in changes]
    return Decision("completed" if over else "resume", lines, [change.key for change in changes], source)


def find_checkpoint(world: World, decision: Decision, manager: CheckpointManager) -> Found:
    """The newest checkpoint that verifies, or that of another run: rank 0 looks, and all take the same.

    Raises:
        CheckpointError: none of those that are there is whole.
    """

    def look() -> str:
        if decision.source is not None:
            return find_at(decision.source).location
        found = manager.newest()
        assert found is not None  # `decide` has seen some; where none of them is whole, `newest` says so
        return found.location

    return find_at(world.on_main(look))
