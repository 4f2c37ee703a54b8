"""Learning rate schedules beyond torch's own (see `dist_train.step.schedule`)."""

from dist_train.step.schedule import WarmupCosine

__all__ = ["WarmupCosine"]
