"""`train`: train, or resume the run of that name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_train.commands.arguments import CONFIG, parse


def main(arguments: Sequence[str]) -> int:
    """Train by a config; 75 if it was stopped on request and saved, to be run again (0 under torchrun)."""
    from dist_train.run.api import train
    from dist_train.runtime.launch import read_placement

    options = parse("train", __doc__, arguments, *CONFIG)
    result = train(options.config, *options.overrides)
    return 0 if result["state"] == "completed" or read_placement(os.environ).under_torchrun else 75
