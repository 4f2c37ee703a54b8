"""A small CNN with BatchNorm, dropout and an unused layer, and a callback that changes it."""

import torch
from torch import nn

from dist_train.callbacks import Callback


class Careless(Callback):  # looks at the model as one would without a thought: BatchNorm's statistics move
    def on_epoch_end(self, trainer):
        model = trainer.model
        model.norm(model.conv1(torch.rand(2, model.conv1.in_channels, 8, 8)))


class Net(nn.Module):
    def __init__(self, channels, side):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(6, 10, 3)
        self.head = nn.Linear(10 * (side // 2 - 2) ** 2, 4)
        self.spare = nn.Identity()

    def forward(self, x):
        x = self.conv2(self.drop(self.pool(self.act(self.norm(self.conv1(x))))))
        return self.head(x.flatten(1) + 0.01 * torch.randn(1))  # draws in eval mode too
