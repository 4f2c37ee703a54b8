"""Resuming a run: whether there is one, whether the config still fits it, and which checkpoint it resumes from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import CheckpointStore, find_at, step_name
from dist_train.config.changes import compare, refusal_message
from dist_train.config.code import source_files
from dist_train.config.errors import ConfigError
from dist_train.config.fields import expand_path, from_json, in_steps
from dist_train.run.objects import differences, facts_of, sample_digests
from dist_train.runtime.location import MICRO_BATCHES
from dist_train.runtime.sidefiles import SideFileError, read_lines, read_mapping

if TYPE_CHECKING:
    from dist_train.building.frozen import Frozen
    from dist_train.checkpoint.manager import CheckpointManager
    from dist_train.checkpoint.store import Found
    from dist_train.config.schema import Config
    from dist_train.runtime.rundir import RunDir
    from dist_train.runtime.world import World


_FIX = "Put it back from a copy, give the run another run.name, or delete that directory"
_LAST_SECTION = "debug"  # of config.yaml: a truncated one lacks it


@dataclass
class Decision:
    """What a start does, decided by rank 0 from what it finds in the run's directory; nothing is changed there.

    Attributes:
        action: `fresh`, `resume`, or `completed` (nothing to do).
        changes: what differs from the config of the last start, as lines to log. changed: the keys.
        source: the checkpoint of another run to start from.
        done: step and seconds of a completed run that a changed config may train longer.
        fits: maximum number of samples per forward after memory has run out.
        warnings: what can't be read there, and what is used instead.
        horizon: the optimizer steps that the schedule has spanned so far.
    """

    action: str = "fresh"
    changes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    source: str | None = None
    done: tuple[int, float] | None = None
    fits: int | None = None
    warnings: list[str] = field(default_factory=list)
    horizon: int | None = None

    def is_over(self, config: Config, steps_per_epoch: int) -> bool:
        """Whether the run is completed, and has been trained for at least the duration of this config."""
        if self.done is None:
            return False
        duration, (step, seconds) = config.trainer.duration, self.done
        end = in_steps(duration, steps_per_epoch)
        return seconds >= duration.value if end is None else step >= end


def decide(config: Config, run: RunDir) -> Decision:
    """See `Decision`. Nothing that the config names is imported.

    Raises:
        ConfigError: the run can't be resumed under this config or with these objects; names the differences and what to do.
    """
    decision = _compare_configs(config, run)
    if decision.action != "fresh" and decision.source is None:
        decision.warnings += _compare_code(config, run, completed=decision.action == "completed")
    return decision


def _compare_code(config: Config, run: RunDir, completed: bool) -> list[str]:
    """Warnings where the user's files have changed since the last start. Raises ConfigError where live objects have."""
    records, _ = read_lines(run.storage, "attempts.jsonl")  # `Start` reports what is wrong with it
    start = next((record for record in reversed(records) if isinstance(record.get("code"), dict)), None)
    if start is None:
        return []
    differing = differences(start.get("objects"), facts_of(config))
    if completed:
        end: dict[str, Any] = next((record for record in reversed(records) if "samples" in record), {"samples": {}})
        differing += differences(end["samples"], sample_digests(config))
    if differing and (completed or not config.checkpoint.accept_changes):
        fix = "start another run: another run.name"
        if not completed:
            fix += ", or resume with them: checkpoint.accept_changes=true"
        done = "is completed, and its result is that of" if completed else "was started with"
        raise ConfigError.single("run.name", f"{run.location} {done} other objects ({'; '.join(differing)}); {fix}")
    old, new = start["code"], source_files(config)
    # A file is added or dropped with another that imports it.
    changed = [name for name in new if name in old and old[name] != new[name]] or sorted(old.keys() ^ new.keys())
    if not changed:
        return []
    was, then = "last started", "The run resumes with the code as it is now; another run.name starts over with it"
    if completed:
        was, then = "trained", "This is the result of the code before; another run.name trains with what it is now"
    return [f"the code has changed since {run.location} was {was}: {', '.join(changed)}. {then}"]


def _compare_configs(config: Config, run: RunDir) -> Decision:
    store, resume = CheckpointStore(run.storage.sub("checkpoints")), config.checkpoint.resume
    # Under a URL, the leftovers of a killed save are no checkpoint; a quarantined one was one.
    known = [step_name(step) for step in store.steps() if store.has(step)]
    known += store.quarantined()
    begun = run.storage.exists("config.yaml")
    if resume == "never" and (known or begun):
        raise ConfigError.single(
            "checkpoint.resume",
            f"`never` starts a new run, but {run.location} holds one already ({len(known)} checkpoint(s)); give it another "
            "run.name, or delete that directory",
        )
    location, source, warnings = run.location, None, list[str]()
    newest = next(store.published(), None)
    fits = (run.read_json(MICRO_BATCHES, warnings.append) or {}).get("micro_batch_size")
    result = run.read_json("result.json", warnings.append)
    completed = result is not None and result["state"] == "completed"
    old: dict[str, Any]
    if known or completed:
        old = _config_before(run, store, warnings)
    elif begun and result is None and run.storage.exists("result.json"):
        message = (
            f"{warnings[-1]}, and {run.location} has no checkpoint, so it isn't known whether it is completed. {_FIX}"
        )
        raise ConfigError.single("run.name", message)
    elif resume not in ("auto", "never"):
        try:
            found = find_at(expand_path(resume))
        except CheckpointError as error:
            raise ConfigError.single("checkpoint.resume", str(error)) from None
        old, location, source, newest = from_json(found.value("config", dict)), found.location, found.location, found
    else:
        return Decision(fits=fits, warnings=warnings)
    changes = compare(old, config.to_dict())
    asked = [change for change in changes if change.kind == "consent"]
    bad = [change for change in changes if change.kind == "refused"]
    if bad or (asked and not config.checkpoint.accept_changes):
        raise ConfigError.single("", refusal_message(bad + asked, location))
    lines, keys = [str(change) for change in changes], [change.key for change in changes]
    done = (result["step"], float(result["seconds"])) if result is not None and completed and source is None else None
    if done and not asked and not any(key.startswith("trainer.duration") for key in keys):
        return Decision("completed", lines, keys, warnings=warnings)
    if done and not known:
        message = f"{run.location} is completed, and its checkpoints are gone: it can't be trained further. {_FIX}"
        raise ConfigError.single("run.name", message)
    return Decision("resume", lines, keys, source, done, fits, warnings, newest.meta.get("horizon") if newest else None)


def _config_before(run: RunDir, store: CheckpointStore, warnings: list[str]) -> dict[str, Any]:
    """The config of the last start: config.yaml's, or where that is lost the newest manifest's.

    Raises:
        ConfigError: neither can be read.
    """
    place = run.storage.join("config.yaml")
    try:
        old = read_mapping(run.storage, "config.yaml")
        if old is not None and _LAST_SECTION in old:
            return old
        wrong = f"{place}: {'missing' if old is None else f'truncated: section {_LAST_SECTION} is missing'}"
    except SideFileError as error:
        wrong = str(error)
    for found in store.published():
        if isinstance(config := found.meta.get("config"), dict):
            warnings.append(f"{wrong}: the config in {found.name} is used instead")
            return from_json(config)
    raise ConfigError.single("run.name", f"{wrong}, and no manifest has the config of {run.location}. {_FIX}")


def compare_frozen(frozen: Frozen, decision: Decision, run: RunDir) -> None:
    """Whether the frozen weights are those that the newest checkpoint leaves out; nothing is quarantined or changed.

    Raises:
        ConfigError: names the first one that isn't.
    """
    store = CheckpointStore(run.storage.sub("checkpoints"))
    with contextlib.suppress(CheckpointError):  # reported where it is loaded
        found = find_at(decision.source) if decision.source is not None else next(store.published(), None)
        if found is not None and "frozen" in found.parts:
            frozen.compare(found.load("frozen"), found.location)


def find_checkpoint(world: World, decision: Decision, manager: CheckpointManager) -> Found:
    """The newest valid checkpoint, or that of another run: rank 0 looks, and all ranks take the same.

    Raises:
        CheckpointError: there are some, and none is valid.
    """

    def look() -> str:
        if decision.source is not None:
            return find_at(decision.source).location
        found = manager.newest()
        assert found is not None  # `decide` has seen some; where none of them is valid, `newest` raises
        return found.location

    return find_at(world.on_main(look))
