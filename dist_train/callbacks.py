"""The base class of callbacks (see `dist_train.engine.callbacks`)."""

from dist_train.engine.callbacks import Callback

__all__ = ["Callback"]
