"""Augmentations that overwrite a box of each image. Each sample draws its own numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_train.data.augment import Augment, Draws
from dist_train.data.errors import DataError
from dist_train.vision.geometry import by_numpy, image_shape, probability


def paste(images: Tensor, boxes: Tensor, source: Tensor, draws: Draws) -> Tensor:
    """Images with a box of each replaced by the same box of `source`.

    Args:
        images: (B, C, H, W).
        boxes: (4, B) on the host: top, bottom, left, right; they may reach outside, and be empty.
        source: of the same shape, or one that broadcasts to it.
    """
    height, width = images.shape[2:]
    if not by_numpy(images):
        return torch.where(_inside(draws.send(boxes), height, width), source, images)
    out = images.clone()
    edges = boxes.clamp(min=0).long()
    chosen = ((edges[0] < edges[1]) & (edges[2] < edges[3])).nonzero()[:, 0]
    array, other = out.numpy(), source.expand_as(images).numpy()
    # a few hundred small copies take a quarter of the time of a mask of all pixels
    for i, top, bottom, left, right in torch.cat((chosen[None], edges[:, chosen])).T.tolist():
        array[i, :, top:bottom, left:right] = other[i, :, top:bottom, left:right]
    return out


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, H, W) bool: the pixels of each box."""
    rows, columns = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    top, bottom, left, right = (edge[:, None] for edge in boxes)
    tall, wide = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def _constant(images: Tensor, value: float) -> Tensor:
    """`value` as an image that broadcasts. Raises RuntimeError if the dtype can't hold it."""
    return images.new_zeros((1, 1, 1, 1)).fill_(value)


class RandomErasing(Augment):
    """Overwrite a random box of each image with probability `p` (Zhong et al., arXiv:1708.04896).

    Args:
        p: probability for each image.
        scale: range of the box's area, as a fraction of the image's.
        ratio: range of its height over its width, log-uniform.
        value: what to write.
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float = 0.0,
    ) -> None:
        if not 0 <= scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise DataError(f"RandomErasing: expected increasing ranges, scale within 0..1, found {scale} and {ratio}")
        self.p = probability("RandomErasing", p)
        self.scale, self.ratio, self.value = tuple(scale), tuple(ratio), float(value)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = image_shape("RandomErasing", inputs)
        u = draws.host(5).double()
        area = (self.scale[0] + u[:, 1] * (self.scale[1] - self.scale[0])) * height * width
        low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
        ratio = torch.exp(low + u[:, 2] * (high - low))
        box_h = torch.sqrt(area * ratio).round().clamp_(max=height)
        box_w = torch.sqrt(area / ratio).round().clamp_(max=width)
        top = (u[:, 3] * (height - box_h + 1)).floor()
        left = (u[:, 4] * (width - box_w + 1)).floor()
        bottom = torch.where(u[:, 0] < self.p, top + box_h, top)  # an empty box erases nothing
        boxes = torch.stack((top, bottom, left, left + box_w))
        return paste(inputs, boxes, _constant(inputs, self.value), draws), targets


class Cutout(Augment):
    """Overwrite a square around a random pixel of each image (DeVries and Taylor, arXiv:1708.04552).

    Args:
        size: side of the square in pixels; at the edges of the image a part of it lies outside.
        p: probability for each image.
        value: what to write: 0 is the mean of normalized images.
    """

    def __init__(self, size: int, p: float = 1.0, value: float = 0.0) -> None:
        if size < 1:
            raise DataError(f"Cutout: expected size >= 1 pixel, found {size}")
        self.size, self.p, self.value = int(size), probability("Cutout", p), float(value)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = image_shape("Cutout", inputs)
        u = draws.host(3)
        top, left = (u[:, 1:] * torch.tensor([height, width])).long().sub_(self.size // 2).unbind(1)
        bottom = torch.where(u[:, 0] < self.p, top + self.size, top)  # an empty box overwrites nothing
        boxes = torch.stack((top, bottom, left, left + self.size))
        return paste(inputs, boxes, _constant(inputs, self.value), draws), targets
