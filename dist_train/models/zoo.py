"""A small model zoo: the networks of a first PyTorch course, under plain names."""

from __future__ import annotations

from collections.abc import Sequence

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
