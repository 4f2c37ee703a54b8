"""`verify`: check every file of every checkpoint of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_train.commands.arguments import parse_run
from dist_train.commands.usage import Usage
from dist_train.config.errors import ConfigError

USAGE = Usage(
    "verify",
    "Check every file of every checkpoint of a run, and the records beside them; the exit code is 1 if any is corrupted.",
    "dist-train verify runs/digits",
    takes="run",
)


def main(arguments: Sequence[str]) -> int:
    """Print a line for each checkpoint, and for each file beside them that can't be read; 1 if any is corrupted."""
    options = parse_run(USAGE, arguments)
    from dist_train.checkpoint.store import CheckpointStore
    from dist_train.runtime.sidefiles import problems
    from dist_train.runtime.storage import open_storage

    storage = open_storage(options.run)
    if not storage.exists("checkpoints") or (storage.is_local and not os.path.isdir(storage.join("checkpoints"))):
        found = f"{storage.location} has no checkpoints directory; expected a run's directory"
        raise ConfigError.single("--run", found)
    rows = CheckpointStore(storage.sub("checkpoints")).verify_all()
    for row in rows:
        print(f"{row.name:<24} {row.state:<11} {row.reason}".rstrip())
    beside = problems(storage)
    for name, fault in beside:
        print(f"{name:<24} {'corrupted':<11} {fault}")
    bad = [row for row in rows if row.state != "good"]
    print(f"{len(rows) - len(bad)} of {len(rows)} checkpoints are intact")
    return 1 if bad or beside else 0
