"""Learning rate schedules beyond torch's own (see `dist_train.engine.schedule`)."""

from dist_train.engine.schedule import WarmupCosine

__all__ = ["WarmupCosine"]
