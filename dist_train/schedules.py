"""Learning rate schedules beyond torch's own (see `dist_train.engine.optim`)."""

from dist_train.engine.optim import WarmupCosine

__all__ = ["WarmupCosine"]
