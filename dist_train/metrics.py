"""Metrics that a config can name, and the base class for one's own (see `dist_train.task.metrics`)."""

from dist_train.task.classes import F1, MeanIoU, Perplexity
from dist_train.task.metrics import R2, Accuracy, BinaryAccuracy, MeanError, Metric
from dist_train.task.whole import AUROC, MAP

__all__ = ["AUROC", "F1", "MAP", "R2", "Accuracy", "BinaryAccuracy", "MeanError", "MeanIoU", "Metric", "Perplexity"]
