"""Print which heavy modules are imported once a logger is open, without and with TensorBoard."""

import pathlib
import sys
import types

from dist_train.tracking.console import Console
from dist_train.views.sinks import open_logger


def heavy():
    return sorted({"torch", "tensorboard", "rich", "matplotlib", "wandb"} & set(sys.modules))


for on in (False, True):
    config = types.SimpleNamespace(tracking=types.SimpleNamespace(tensorboard=on, wandb=None))
    log = open_logger(pathlib.Path(sys.argv[1]), config, Console(True))
    if not on:
        log.row("train", 1, 1, 1, {"loss": 1.0})
    print(heavy())
