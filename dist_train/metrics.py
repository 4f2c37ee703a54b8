"""Metrics that a config can name, and the base class for one's own (see `dist_train.task.metrics`)."""

from dist_train.task.metrics import R2, Accuracy, BinaryAccuracy, MeanError, Metric

__all__ = ["R2", "Accuracy", "BinaryAccuracy", "MeanError", "Metric"]
