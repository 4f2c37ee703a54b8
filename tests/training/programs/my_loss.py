"""A user's loss, a value per sample."""

import torch


def smooth(outputs, targets, floor=0.0):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none") + floor
