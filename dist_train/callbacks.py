"""The base class of callbacks (see `dist_train.engine.callbacks`), and those that a config can name."""

from dist_train.engine.callbacks import Callback
from dist_train.engine.unfreezing import Unfreeze

__all__ = ["Callback", "Unfreeze"]
