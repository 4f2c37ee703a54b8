"""Digits with noise drawn from the global generators of torch, numpy and random, by loader workers."""

import random

import numpy as np
import torch

from dist_train.data import Digits


class Noisy(Digits):
    read_batch = None

    def __len__(self):
        return 140

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image + 0.1 * torch.randn(image.shape) + float(np.random.rand() + random.random()) / 20, target
