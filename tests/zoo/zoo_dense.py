"""Segmentation and detection, as torchvision's references and segmentation_models_pytorch have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign


class Boxes(torch.utils.data.Dataset[Any]):
    """(image, {"boxes", "labels"}) with one or two bright squares on noise."""

    def __init__(self, n: int, seed: int = 0, size: int = 32):
        self.n, self.seed, self.size = n, seed, size

    def __len__(self) -> int:
        return self.n

    def drawn(self, index: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        random = np.random.RandomState(self.seed * 10000 + index)
        image, mask, boxes, labels = 0.2 * torch.tensor(random.rand(3, self.size, self.size)).float(), [], [], []
        mask = torch.zeros(self.size, self.size, dtype=torch.int64)
        for _ in range(random.randint(1, 3)):
            kind, side = random.randint(1, 3), random.randint(8, 14)
            x, y = random.randint(0, self.size - side, 2).tolist()
            image[kind - 1, y : y + side, x : x + side] = 1
            mask[y : y + side, x : x + side] = kind
            boxes.append([x, y, x + side, y + side])
            labels.append(kind)
        return image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}, mask

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.drawn(index)[:2]


class Masks(Boxes):
    """(image, class of each pixel); 255 at the border, which doesn't count."""

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, _, mask = self.drawn(index)
        mask[0] = 255
        return image, mask


def small_rcnn() -> nn.Module:
    """torchvision's Faster R-CNN on a body of two layers."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    body.out_channels = 8
    return FasterRCNN(
        body, None, min_size=32, max_size=32, rpn_anchor_generator=AnchorGenerator(((8, 12),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), box_head=nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU()),
        box_predictor=_Heads(), box_detections_per_img=5, rpn_post_nms_top_n_test=20, rpn_post_nms_top_n_train=20,
    )  # fmt: skip


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(16, 3), nn.Linear(16, 12)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.boxes(features)
