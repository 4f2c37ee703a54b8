"""Whether two runs are bitwise identical, and where they part if not: from their records alone, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_train.checkpoint.manifest import MANIFEST, CheckpointError, Manifest
from dist_train.config import changes
from dist_train.config.errors import ConfigError, mask
from dist_train.runtime.sidefiles import SideFileError, read_lines, read_mapping
from dist_train.runtime.storage import Storage, open_storage
from dist_train.tracking.digests import FOLDER, Digests, rank_of
from dist_train.views.parting import Parting, common_steps, disagreement, parting

# Metrics that the clock gives, not the training.
_CLOCK = ("time", "samples_per_s", "data_wait", "mfu", "peak_memory", "step_s_", "data_wait_s_")
# Keys that say where and what a run records and how long it may take, not what it trains.
_APART = (
    "run.",
    "tracking.",
    "debug.",
    "checkpoint.",
    "trainer.log_every",
    "trainer.stop_at",
    "distributed.hang_timeout",
)
_LISTED = 10  # keys of the configs
_SHOWN = 5  # metrics of a row
HINT = "debug.digest=true in both runs compares every step, and shows the first one and the tensor at which they part"


@dataclass
class Record:
    """What is compared of a run: the content of its files, and `digests` by rank."""

    name: str
    storage: Storage
    config: dict[str, Any]
    status: dict[str, Any]
    result: dict[str, Any]
    rows: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    digests: dict[int, Digests]

    @property
    def bitwise(self) -> bool:
        """Whether even buffers must be the same on all ranks."""
        return bool((self.config.get("distributed") or {}).get("reproducibility", "fast") == "bitwise")

    @property
    def reached(self) -> int:
        """The last step that any record has."""
        steps = [int(digests.steps[-1]) for digests in self.digests.values() if len(digests.steps)]
        return max([0, self.status.get("step", 0), *(row["step"] for row in self.rows), *steps])

    @property
    def end(self) -> str:
        """How far it has come, such as `completed at step 40`."""
        return f"{self.status.get('state', 'without a status')} at step {self.reached:,}"


@dataclass
class Verdict:
    """`lines` for people; whether the runs are equal, and ended in the same way at the same step."""

    equal: bool
    lines: list[str] = field(default_factory=list)


def compare_runs(one: str, other: str) -> Verdict:
    """Compare two runs by their directories or URLs.

    Raises:
        ConfigError: one of them isn't a run or has files that can't be read, or they have nothing in common to compare.
    """
    pair = read_run(one), read_run(other)
    steps = common_steps(pair[0].digests, pair[1].digests)
    saved = sorted(set.intersection(*(set(_manifests(run)) for run in pair)) - set(steps))  # what no digest has
    found = [parting(pair[0].digests, pair[1].digests) if steps else None, _checkpoints(*pair, saved)]
    rows = list(_rows(*pair))
    found += [next((parted for parted in rows if parted is not None), None), _final(*pair)]
    disagreements = [(run, disagreement(run.digests, buffers=run.bitwise)) for run in pair]
    compared = _compared(pair, steps, len(rows), saved)
    if not compared:
        raise ConfigError.single(
            "RUN",
            f"{one} ({pair[0].end}) and {other} ({pair[1].end}) have no step in common with anything recorded to compare: train "
            "both with debug.digest=true, for at least one common step",
        )
    first = min((parted for parted in found if parted is not None), key=lambda parted: parted.step, default=None)
    lines = []
    if first is not None:
        lines.append(f"different: {one} and {other} part at step {first.step:,}, in {first.where}")
        lines += [f"  {line}" for line in first.details]
    for run, parted in disagreements:
        if parted is not None:
            lines.append(f"different: the ranks of {run.name} part at step {parted.step:,}, in {parted.where}")
            lines += [f"  {line}" for line in parted.details]
    if lines:
        return Verdict(False, lines + _causes(*pair) + ([] if steps else [HINT]))
    return _so_far(pair, compared, [] if steps else [HINT])


def read_run(location: str) -> Record:
    """The records of a run. Raises ConfigError if it isn't one, or they can't be read."""
    storage = open_storage(location)
    try:
        config = read_mapping(storage, "config.yaml")
        if config is None:
            raise ConfigError.single("RUN", f"{storage.location} is not a run's directory: it has no config.yaml")
        status = read_mapping(storage, "status.json") or {}
        result = read_mapping(storage, "result.json", whole=False) or {}
        rows, wrong = read_lines(storage, "metrics.jsonl")
        attempts, also_wrong = read_lines(storage, "attempts.jsonl")
        if wrong or also_wrong:
            raise SideFileError(wrong or also_wrong)
        digests = {}
        for name in storage.list(FOLDER):
            if (rank := rank_of(name)) is not None:
                digests[rank] = _digests(storage, f"{FOLDER}/{name}")
    except SideFileError as error:
        raise ConfigError.single("RUN", mask(str(error))) from None
    starts = [line for line in attempts if line["event"] == "start"]
    return Record(location, storage, config, status, result, rows, starts, dict(sorted(digests.items())))


def _digests(storage: Storage, name: str) -> Digests:
    try:
        return Digests.parse(storage.read_bytes(name))
    except ValueError as error:
        raise SideFileError(f"{storage.join(name)}: {error}") from None


def _rows(one: Record, other: Record) -> Iterator[Parting | None]:
    """For each row of metrics.jsonl that both have, in the order of steps: where it parts, or None.

    A train row has means since the train row before it, so that one must be of the same step in both.
    """
    theirs = dict(_keyed(other.rows))
    for key, row in sorted(_keyed(one.rows), key=lambda item: item[0][0]):
        if (match := theirs.get(key)) is None:
            continue
        step, split, before = key
        names = [name for name in row if name in match and not name.startswith(_CLOCK)]
        wrong = [name for name in names if row[name] != match[name]]
        if not wrong:
            yield None
            continue
        shown = [f"{name}: {json.dumps(row[name])} and {json.dumps(match[name])}" for name in wrong[:_SHOWN]]
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        covers = f" (means of steps {before + 1:,} to {step:,})" if split == "train" and before + 1 < step else ""
        yield Parting(step, f"the {split} row of metrics.jsonl{covers}", [*shown, *more])


def _keyed(rows: Sequence[dict[str, Any]]) -> list[tuple[tuple[int, str, int], dict[str, Any]]]:
    """((step, split, step of the train row before it), row); of several with one key the last."""
    before, found = 0, {}
    for row in rows:
        train = row["split"] == "train"
        found[row["step"], row["split"], before if train else 0] = row
        before = row["step"] if train else before
    return list(found.items())


def _manifests(run: Record) -> dict[int, Manifest]:
    found = {}
    for name in run.storage.list("checkpoints"):
        try:
            manifest = Manifest.from_bytes(run.storage.read_bytes(f"checkpoints/{name}/{MANIFEST}"))
        except OSError:
            continue  # not one
        except CheckpointError as error:
            message = f"{run.name}: {error}; verify checks every file of every checkpoint"
            raise ConfigError.single("RUN", mask(message)) from None
        found[manifest.step] = manifest
    return found


def _checkpoints(one: Record, other: Record, steps: Sequence[int]) -> Parting | None:
    """Where the weights in checkpoints of these steps differ first, by the hashes in their manifests."""
    mine, theirs = _manifests(one), _manifests(other)
    for step in steps:
        files = mine[step].files, theirs[step].files
        both = [name for name in ("model.pt", "optimizer.pt", "ema.pt") if all(name in listed for listed in files)]
        if wrong := [name for name in both if files[0][name].sha256 != files[1][name].sha256]:
            return Parting(step, "the checkpoint", [f"{', '.join(wrong)}: another sha256 in its manifest"])
    return None


def _final(one: Record, other: Record) -> Parting | None:
    """Where both are completed at one step: whether their final weights differ."""
    hashes = [run.result.get("weights_sha256") for run in (one, other)]
    if None in hashes or hashes[0] == hashes[1] or one.result.get("step") != other.result.get("step"):
        return None
    return Parting(
        int(one.result.get("step", 0)), "the final weights", [f"weights_sha256: {hashes[0]} and {hashes[1]}"]
    )


def _compared(pair: tuple[Record, Record], steps: list[int], rows: int, saved: list[int]) -> list[str]:
    """What both have recorded, in words."""
    found = []
    if steps:
        ranks = [str(len(run.digests)) for run in pair]
        shared = set(pair[0].digests[0].names) & set(pair[1].digests[0].names)
        on = f"{ranks[0]} rank{'s' * (ranks[0] != '1')}" if ranks[0] == ranks[1] else f"{' and '.join(ranks)} ranks"
        found.append(f"the digests of {len(shared):,} tensors in {_steps(steps)} on {on}")
    if rows:
        found.append(f"{rows:,} row{'s' * (rows > 1)} of metrics.jsonl")
    if saved:
        found.append(f"the checkpoints of {_steps(saved)}")
    if all("weights_sha256" in run.result for run in pair) and pair[0].result.get("step") == pair[1].result.get("step"):
        found.append("the final weights")
    return found


def _steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    return f"{len(steps):,} steps ({steps[0]:,} to {steps[-1]:,})"


def _so_far(pair: tuple[Record, Record], compared: Sequence[str], hint: list[str]) -> Verdict:
    """What both have recorded is equal; the runs are, if they ended alike."""
    one, other = pair
    what = ", ".join(compared)
    finished = [run.status.get("state") not in (None, "running") for run in pair]
    alike = one.reached == other.reached and one.status.get("state") == other.status.get("state")
    if not (all(finished) and alike):
        line = f"equal so far: {what}; but {one.name} is {one.end}, {other.name} {other.end}"
        return Verdict(False, [line, *hint])
    lines = [f"equal: {what}; both {one.end}"]
    if "the final weights" in compared:
        lines.append(f"weights_sha256 {one.result['weights_sha256']}")
    return Verdict(True, lines + hint)


def _causes(one: Record, other: Record) -> list[str]:
    """What differs in configs and numbers of processes, and so may be the cause."""
    found = [str(change) for change in changes.compare(one.config, other.config) if not change.key.startswith(_APART)]
    found = [*found[:_LISTED], *([f"and {len(found) - _LISTED} more keys"] if len(found) > _LISTED else [])]
    sizes = [sorted({line["world_size"] for line in run.starts if "world_size" in line}) for run in (one, other)]
    if sizes[0] != sizes[1] and not (one.bitwise and other.bitwise):
        text = " -> ".join(", ".join(map(str, known)) or "unknown" for known in sizes)
        found.append(f"processes: {text}, on which the bits of a sum depend")
    return (
        [f"what differs in how they were run ({one.name} -> {other.name}):", *(f"  {line}" for line in found)]
        if found
        else []
    )
