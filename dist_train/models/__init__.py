"""Models that come with the package; any other `nn.Module` is named by its import path."""

from dist_train.models.zoo import MLP, DigitsCNN

__all__ = ["MLP", "DigitsCNN"]
