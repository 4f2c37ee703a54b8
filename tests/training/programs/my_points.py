"""A user's dataset: points on the left and the right of a line."""

import torch


class Points(torch.utils.data.Dataset):
    classes = ["left", "right"]

    def __init__(self, n=64, seed=0):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])
