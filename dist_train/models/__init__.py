"""Models that come with the package; any other `nn.Module` is named by its import path."""

from dist_train.library.zoo import MLP, Cifar10Quick, DigitsCNN, LogisticRegression, MnistCNN, cifar_resnet18

__all__ = ["MLP", "Cifar10Quick", "DigitsCNN", "LogisticRegression", "MnistCNN", "cifar_resnet18"]
