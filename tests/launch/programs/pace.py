"""A callback that slows the steps down until `hurry` exists, and crashes once `crash` does."""

import time
from pathlib import Path

from dist_train.callbacks import Callback


class Pace(Callback):
    def on_step_end(self, trainer):
        if not Path("hurry").exists():
            time.sleep(0.2)
        if Path("crash").exists():
            raise ValueError("planted crash")
