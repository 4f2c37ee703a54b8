"""A small model zoo: the networks of a first PyTorch course, under plain names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}


def _activation(name: str) -> nn.Module:
    if name.lower() not in _ACTIVATIONS:
        raise ValueError(f"MLP: expected activation to be one of {', '.join(_ACTIVATIONS)}, found {name!r}")
    return _ACTIVATIONS[name.lower()]()


class MLP(nn.Module):
    """Fully connected layers with an activation between them. Inputs (N, ...) are flattened to (N, in_features).

    Args:
        in_features: numbers per sample.
        hidden: width of each hidden layer; empty for a linear model.
        out_features: outputs, (N, out_features) without an activation.
        activation: relu, leaky_relu, sigmoid, tanh, gelu, silu or elu.
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
        super().__init__()
        _activation(activation)  # a wrong name is told without hidden layers as well
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for size in hidden:
            layers.append(nn.Linear(width, size, bias=not batchnorm))
            if batchnorm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(_activation(activation))
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = size
        layers.append(nn.Linear(width, out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, ...) -> (N, out_features)."""
        out: Tensor = self.layers(inputs)
        return out


class DigitsCNN(nn.Module):
    """A convolutional network for 8x8 images: two blocks of convolution, BatchNorm and ReLU, then a linear head.

    Args:
        classes: outputs, (N, classes) logits.
        width: channels of the first block; the second has twice as many.
        dropout: probability before the head.
    """

    def __init__(self, classes: int = 10, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 16, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, classes) logits."""
        out: Tensor = self.classifier(self.features(images))
        return out


class LogisticRegression(nn.Module):
    """One linear layer and a sigmoid: probabilities for BCELoss.

    Args:
        in_features: numbers per sample.
        out_features: probabilities per sample.
    """

    def __init__(self, in_features: int = 2, out_features: int = 1) -> None:
        super().__init__()
        self.features = nn.Linear(in_features, out_features)
        self.sigmoid = nn.Sigmoid()

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, in_features) -> (N, out_features) in 0..1."""
        out: Tensor = self.sigmoid(self.features(inputs))
        return out


class MnistCNN(nn.Module):
    """Two 3x3 convolutions and two linear layers for 28x28 grey images; gives log-probabilities, for NLLLoss.

    Args:
        classes: outputs, (N, classes).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, classes) log-probabilities."""
        out = self.pool(torch.relu(self.conv2(torch.relu(self.conv1(images)))))
        out = torch.relu(self.fc1(out.flatten(1)))
        return torch.log_softmax(self.fc2(out), dim=1)


class Cifar10Quick(nn.Module):
    """The CIFAR-10 "quick" network: three 5x5 convolutions, each followed by pooling, and two linear layers.

    Source: A. Krizhevsky, cuda-convnet (2012), without its activations and normalisation, as courses teach it.

    Args:
        classes: outputs, (N, classes) logits.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.model = nn.Sequential(
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

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, classes) logits."""
        out: Tensor = self.model(images)
        return out


def cifar_resnet18(classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 for images of 32x32: a first convolution of 3x3 that keeps their size, and no pooling behind it.

    Source: the CIFAR variant of He et al., arXiv:1512.03385, section 4.2, as commonly used with ResNet-18.

    Args:
        classes: outputs, (N, classes) logits.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
