"""The data: any class with `__len__` and `__getitem__`, which returns (input, target) for the default task."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")


class Moons(Dataset[tuple[Tensor, int]]):
    """Two interleaving half circles of noisy points; each split draws its own points."""

    classes = ["upper", "lower"]  # names for reports and predictions

    def __init__(self, split: str, samples: int = 400, noise: float = 0.15, seed: int = 0) -> None:
        random = np.random.RandomState([seed, SPLITS.index(split)])
        angle = random.uniform(0, math.pi, samples)
        label = random.randint(0, 2, samples)
        x = np.where(label == 0, np.cos(angle), 1 - np.cos(angle))
        y = np.where(label == 0, np.sin(angle), 0.5 - np.sin(angle))
        points = np.stack([x, y], axis=1) + noise * random.standard_normal((samples, 2))
        self.points, self.labels = torch.from_numpy(points).float(), label

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.points[index], int(self.labels[index])
