"""A dataset that is slow to build, and callbacks that slow a run down or crash it."""

import pathlib
import time

from dist_train.callbacks import Callback
from dist_train.data import Digits


class LongToBuild(Digits):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        if not pathlib.Path("building").exists():
            pathlib.Path("building").touch()
            time.sleep(300)


class Slow(Callback):
    def on_step_end(self, trainer):
        time.sleep(0.02)


class Crash(Callback):
    def on_step_end(self, trainer):
        if trainer.step == 30 and trainer.world.rank == trainer.world.size - 1:
            raise ValueError("planted crash")
