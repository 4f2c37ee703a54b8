"""An MLP for the digits that computes in float64."""

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).double()

    def forward(self, x):
        return self.net(x.double())
