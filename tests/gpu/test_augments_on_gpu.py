"""Augmentations on a GPU: the draws have the CPU's bits, what only moves pixels too, the rest is equal within rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train.data import (
    ColorJitter,
    CutMix,
    Cutout,
    Draws,
    Mixup,
    OneOf,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
    TrivialAugmentWide,
)
from dist_train.data.augment import Augment, Augmentation, sample_keys

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PIXELS = torch.randint(0, 256, (400, 3, 21, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MOVED: list[Augment] = [
    RandomCrop((18, 16), padding=(1, 3), fill=1), RandomHorizontalFlip(), RandomVerticalFlip(0.3), RandomShift(2), CutMix(10),
    RandomErasing(p=0.7), Cutout(6),
]  # fmt: skip
MIXED: list[Augment] = [Mixup(10, alpha=0.4), OneOf([CutMix(10), RandomHorizontalFlip(1.0)])]


def on(device: torch.device, augments: list[Augment], images: Tensor) -> Tensor:
    batch, rows = (images.to(device), torch.arange(len(images), device=device) % 10), np.arange(len(images))
    out, _ = Augmentation(augments)(batch, seed=1, epoch=3, indices=rows)
    return out.cpu()


def test_numbers_drawn_on_the_device_have_the_bits_of_the_host() -> None:
    keys = sample_keys(3, 9, np.arange(1000))
    assert Draws(keys, 2, CUDA).uniform(50).cpu().equal(Draws(keys, 2, CPU).host(50))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_moves_or_mixes_pixels_has_the_bits_of_the_cpu(layout: torch.memory_format) -> None:
    images = PIXELS.contiguous(memory_format=layout)
    assert on(CUDA, MOVED, images).equal(on(CPU, MOVED, images))
    floats = images.float() / 255
    assert on(CUDA, MOVED + MIXED, floats).equal(on(CPU, MOVED + MIXED, floats))


@pytest.mark.parametrize("augment", [ColorJitter(0.4, 0.4, 0.4, 0.1), TrivialAugmentWide(), RandomResizedCrop(19)])
def test_what_computes_with_pixels_equals_the_cpu_within_rounding(augment: Augment) -> None:
    found, expected = on(CUDA, [augment], PIXELS).int(), on(CPU, [augment], PIXELS).int()
    assert ((found - expected).abs() > 1).float().mean() < 1e-3  # a hue or a nearest neighbor may tip over
    floats = PIXELS.float() / 255
    near = (on(CUDA, [augment], floats) - on(CPU, [augment], floats)).abs() < 1e-3
    assert near.float().mean() > 0.995
