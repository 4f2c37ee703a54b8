"""Models whose bits are compared over numbers of processes."""

import torch
from torch import nn

from dist_train.callbacks import Callback


class Sparing(nn.Module):
    """A part of it, with a counter, is used only for some batches: by a batch's first number."""

    def __init__(self):
        super().__init__()
        self.first, self.sometimes, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        if inputs.flatten()[0] > 0.5:
            self.used += 1
            hidden = hidden + self.sometimes(hidden)
        return self.last(hidden)


class Transformer(nn.Module):
    """Two encoder layers with dropout over 6 tokens of 8 numbers."""

    def __init__(self, width=16, dropout=0.2):
        super().__init__()
        self.embed = nn.Linear(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, 32, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, inputs):
        return self.head(self.encoder(self.embed(inputs)).mean(1))


class Counting(nn.Module):
    """Its outputs depend on how many steps it has trained, which an attribute and a buffer count that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)), 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, inputs):
        if self.training:
            self.calls += 1
            self.seen += 1
        return self.net(inputs * (1 + self.calls / 8)) * (1 + self.seen / 4)


class Recurrent(nn.Module):
    """An LSTM with dropout between its layers, after a normalization that averages all that it has seen."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6, momentum=None)
        self.lstm, self.head = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.lstm(self.norm(inputs))[0][:, -1])


class Mixed(nn.Module):
    """Parameters of three dtypes, one of them without dimensions."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(5, 8, dtype=torch.bfloat16)
        self.middle, self.high = nn.Linear(8, 8), nn.Linear(8, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs):
        hidden = self.low(inputs.bfloat16()).tanh().float()
        return self.high((self.middle(hidden) * self.scale).tanh().double()).float()


class Thaw(Callback):
    """The first layer begins to train after three steps."""

    def on_start(self, trainer):
        self.layer = trainer.model[0]
        self.layer.requires_grad_(trainer.step >= 3)

    def on_step_end(self, trainer):
        if trainer.step == 3:
            self.layer.requires_grad_(True)
