"""The base class of callbacks (see `dist_train.training.callbacks`), and those that a config can name."""

from dist_train.training.callbacks import Callback, Training, Unfreeze

__all__ = ["Callback", "Training", "Unfreeze"]
