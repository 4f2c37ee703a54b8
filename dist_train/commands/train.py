"""`train`: train, or resume the run of that name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_train.commands.arguments import parse
from dist_train.commands.usage import Usage

USAGE = Usage(
    "train",
    "Train a config, or resume its run: the same command resumes one that was stopped, killed or preempted, from its last "
    "checkpoint. Without a config the built-in example is trained.",
    """\
dist-train config.yaml optimizer.lr=0.05 trainer.duration=3ep
dist-train config.yaml --nproc 4            # four processes of this machine
torchrun --nproc_per_node=4 -m dist_train.main --config config.yaml""",
    takes="config",
)


def main(arguments: Sequence[str], usage: Usage = USAGE) -> int:
    """Train; 0 when the run is complete, 75 if it was stopped on request and saved, to be run again (0 under torchrun)."""
    from dist_train.run.api import train
    from dist_train.runtime.launch import read_placement
    from dist_train.watch.failure import leave_code

    options = parse(usage, arguments)
    result = train(options.config, *options.overrides)
    placement, code = read_placement(os.environ), 0 if result["state"] == "completed" else 75
    if placement.rank == 0:
        leave_code(code)
    return 0 if placement.under_torchrun else code


def is_answered(arguments: Sequence[str], usage: Usage = USAGE) -> bool:
    """Before several processes are started for this: whether the run is completed, and its result has been shown."""
    from dist_train.config.load import load_config
    from dist_train.run.completed import answer, seems_completed

    options = parse(usage, arguments)
    config = load_config(options.config, options.overrides)
    decision = seems_completed(config)
    return decision is not None and answer(config, decision) is not None
