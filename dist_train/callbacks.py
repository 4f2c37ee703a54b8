"""The base class of callbacks (see `dist_train.training.callbacks`), and those that a config can name."""

from dist_train.training.callbacks import Callback
from dist_train.training.unfreezing import Unfreeze

__all__ = ["Callback", "Unfreeze"]
