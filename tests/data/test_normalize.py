"""`data.normalize` beside torchvision's own transforms, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, ToTensor
from torchvision.transforms import Normalize as TorchvisionNormalize

from dist_train.data import DataError
from dist_train.data.normalize import Normalize

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PIXELS = torch.randint(0, 256, (7, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PIXELS[0, :, 0, 0], PIXELS[1, :, 0, 0] = 0, 255


def by_torchvision(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    transform = Compose([ToTensor(), TorchvisionNormalize(mean, std)])
    images = [np.asarray(image.permute(1, 2, 0)).squeeze() for image in pixels]
    return torch.stack([transform(Image.fromarray(image)) for image in images])


@pytest.mark.parametrize(
    ("channels", "mean", "std"), [(3, MEAN, STD), (3, [0.5], [0.25]), (1, [0.1307], [0.3081]), (3, [0], [1])]
)
def test_uint8_becomes_what_torchvisions_transforms_give(channels: int, mean: Any, std: Any) -> None:
    pixels = PIXELS[:, :channels]
    for given in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        before = given.clone()
        found = Normalize(mean, std)(given)
        assert torch.equal(found, by_torchvision(pixels, mean, std))
        assert found.stride() == given.clone().stride(), "the memory format is kept"
        assert torch.equal(given, before), "the dataset's own memory isn't written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_floats_are_normalized_as_they_are(dtype: torch.dtype) -> None:
    pixels = (PIXELS / 255).to(dtype)
    assert torch.equal(Normalize(MEAN, STD)(pixels), TorchvisionNormalize(MEAN, STD)(pixels))


def test_pictures_among_other_inputs_are_normalized_and_targets_are_not() -> None:
    normalize, ages, masks = Normalize(MEAN, STD), torch.arange(7.0), PIXELS[:, 0]
    expected = by_torchvision(PIXELS, MEAN, STD)
    batches = [
        ([PIXELS, masks], [expected, masks]),
        (((PIXELS, ages), masks), ((expected, ages), masks)),
        (((PIXELS, PIXELS), masks), ((expected, expected), masks)),
        (({"image": PIXELS, "age": ages}, masks), ({"image": expected, "age": ages}, masks)),
        (PIXELS, expected),
        ([PIXELS], [expected]),
    ]
    for batch, wanted in batches:
        torch.testing.assert_close(normalize.batch(batch), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mean", "batch", "message"),
    [
        (MEAN, (PIXELS[:, :1], 0), r"for 3 channels, but the pictures .* are uint8 \(7, 1, 6, 5\)$"),
        (MEAN, (PIXELS.permute(0, 2, 3, 1), 0), r"uint8 \(7, 6, 5, 3\); channels come first: permute"),
        (MEAN, (PIXELS.flatten(1), 0), r"expected pictures .*, found uint8 \(7, 90\); leave data.normalize out"),
        (MEAN, ([*PIXELS], [{}] * 7), r"expected pictures .*, found list\[uint8 \(3, 6, 5\)"),
        (MEAN, (PIXELS.int(), 0), r"expected pictures of uint8 or floats, found int32"),
        ((123.7, 116.3, 103.5), (PIXELS, 0), r"data.normalize.mean: .* in \[0, 1\], .* divide mean and std by 255"),
        (MEAN, {"image": PIXELS, "mask": PIXELS}, r"found \{image: uint8 .* say which parts are inputs by data.inputs"),
        (MEAN, (PIXELS, PIXELS, PIXELS), r"expected batches of \(inputs, target\)"),
        (MEAN, (PIXELS, PIXELS), r"two pictures alike"),
    ],
)
def test_what_cannot_be_normalized_is_refused(mean: Any, batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Normalize(mean, STD).batch(batch)


def test_a_std_in_units_of_uint8_is_refused() -> None:
    """Pixels would be divided by 255 twice, and hardly differ."""
    with pytest.raises(
        DataError, match=r"data.normalize.std: .* in \[0, 1\], .*\[255.0\].* divide mean and std by 255"
    ):
        Normalize([0.0], [255.0])(PIXELS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_gpu_gives_the_bits_of_the_cpu(memory_format: torch.memory_format) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16).contiguous(memory_format=memory_format)
    for given in (pixels, pixels / 255):
        assert torch.equal(Normalize(MEAN, STD)(given.cuda()).cpu(), Normalize(MEAN, STD)(given))
