"""Image classification with timm and with transformers: pieces as their users write them, on made-up pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification


class Pictures(Dataset[Any]):
    """PIL images of stripes, lying (0) or standing (1), behind timm's own transform."""

    def __init__(self, n: int, seed: int = 0, size: int = 32, **transform: Any):
        random = np.random.RandomState(seed)
        self.labels = random.randint(0, 2, n)
        waves = np.sin(np.arange(size) * 0.7 + random.uniform(0, 6, (n, 1)))
        pictures = [np.tile(wave, (size, 1)) for wave in waves]
        self.pictures = [127 + 100 * (p.T if y == 0 else p) for p, y in zip(pictures, self.labels, strict=True)]
        self.transform = timm.data.create_transform(size, **transform)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = Image.fromarray(self.pictures[index].astype("uint8")).convert("RGB")
        return self.transform(picture), int(self.labels[index])


def hf_vit(dropout: float = 0.1) -> nn.Module:
    """A ViT of transformers with random weights; its outputs are a `ModelOutput`."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
            num_labels=2, hidden_dropout_prob=dropout,
        )
    )  # fmt: skip
