"""`train`: the command that everything is for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_train.commands.arguments import Parser, with_config


def main(arguments: Sequence[str]) -> int:
    """Train by a config; the exit code says how it ended (75: stopped and saved, run again to go on; 0 under torchrun)."""
    from dist_train.run.api import train
    from dist_train.runtime.launch import read_placement

    options = with_config(Parser("train", "Train, or go on with the run of that name."), arguments)
    result = train(options.config, *options.overrides)
    return 0 if result["state"] == "completed" or read_placement(os.environ).under_torchrun else 75
