"""A small model zoo: the networks of a first PyTorch course, under plain names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

_KINDS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU)
_ACTIVATIONS = {kind.__name__.lower(): kind for kind in _KINDS}


class _Named(nn.Sequential):
    """Modules that run one after another, each under a name: what a forward of one's own would only repeat."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(OrderedDict(modules))


class MLP(_Named):
    """Fully connected layers with an activation between them: (N, ...), flattened, -> (N, out_features).

    Args:
        in_features: numbers per sample.
        hidden: width of each hidden layer; empty for a linear model.
        out_features: outputs, without an activation.
        activation: relu, leaky_relu, sigmoid, tanh, gelu, silu or elu (with or without capitals and underscore).
        dropout: probability after each hidden layer.
        batchnorm: BatchNorm before each activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: str = "relu",
        dropout: float = 0.0,
        batchnorm: bool = False,
    ) -> None:
        kind = _ACTIVATIONS.get(activation.lower().replace("_", ""))
        if kind is None:
            raise ValueError(f"MLP: expected activation to be one of {', '.join(_ACTIVATIONS)}, found {activation!r}")
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for size in hidden:
            layers.append(nn.Linear(width, size, bias=not batchnorm))
            if batchnorm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(kind())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = size
        super().__init__(layers=nn.Sequential(*layers, nn.Linear(width, out_features)))


class DigitsCNN(_Named):
    """Two blocks of convolution, BatchNorm and ReLU, then a linear head: (N, 1, 8, 8) -> (N, classes) logits.

    Args:
        classes: outputs.
        width: channels of the first block; the second has twice that number.
        dropout: probability before the head.
    """

    def __init__(self, classes: int = 10, width: int = 32, dropout: float = 0.2) -> None:
        features = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 16, classes))
        super().__init__(features=features, classifier=classifier)


class LogisticRegression(_Named):
    """One linear layer and a sigmoid: (N, in_features) -> (N, out_features) probabilities, for BCELoss."""

    def __init__(self, in_features: int = 2, out_features: int = 1) -> None:
        super().__init__(features=nn.Linear(in_features, out_features), sigmoid=nn.Sigmoid())


class MnistCNN(_Named):
    """Two 3x3 convolutions and two linear layers: (N, 1, 28, 28) -> (N, classes) log-probabilities, for NLLLoss."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            conv1=nn.Conv2d(1, 32, kernel_size=3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, kernel_size=3),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * 12 * 12, 128),
            relu3=nn.ReLU(),
            fc2=nn.Linear(128, classes),
            log_softmax=nn.LogSoftmax(dim=1),
        )


class Cifar10Quick(_Named):
    """The CIFAR-10 "quick" network, three 5x5 convolutions with pooling: (N, 3, 32, 32) -> (N, classes) logits.

    Source: A. Krizhevsky, cuda-convnet (2012), without its activations and normalisation, as courses teach it.
    """

    def __init__(self, classes: int = 10) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.Linear(64, classes),
        )
        super().__init__(model=model)


def cifar_resnet18(classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 for images of 32x32: a first convolution of 3x3 that keeps their size, and no pooling behind it.

    Source: the CIFAR variant of He et al., arXiv:1512.03385, section 4.2, as commonly used with ResNet-18.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
