"""The model: any nn.Module. Its constructor's arguments are the keys beside `_target_: model.Net` in config.yaml."""

from torch import Tensor, nn


class Net(nn.Module):
    """An MLP with two hidden layers for 2-D points."""

    def __init__(self, hidden: int = 32, classes: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 2) -> (N, classes)."""
        return self.layers(inputs)
