"""Learning rate schedules beyond torch's own (see `dist_train.library.schedules`)."""

from dist_train.library.schedules import WarmupCosine

__all__ = ["WarmupCosine"]
