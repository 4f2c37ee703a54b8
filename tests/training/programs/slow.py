"""Datasets that read slowly or fail to build, and a callback that hangs, for runs that are stopped."""

import os
import pathlib
import time

from dist_train.callbacks import Callback
from dist_train.config.errors import ConfigError
from dist_train.data import Digits


class Slow(Digits):
    read_batch = None

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        if os.environ.get("LACKS") == os.environ.get("RANK", "0"):
            raise ConfigError.single("data.train", "this node lacks the data")
        if "LONG" in os.environ:
            pathlib.Path("building").touch()
            time.sleep(100)

    def __getitem__(self, index):
        time.sleep(0.0005)
        return super().__getitem__(index)


class Watched(Slow):
    def __getitem__(self, index):
        if pathlib.Path("slowly").exists():
            pathlib.Path("evaluating").touch()
            time.sleep(0.05)
        return super().__getitem__(index)


class Stuck(Callback):
    def on_step_end(self, trainer):
        if trainer.step == 5:
            time.sleep(600)
