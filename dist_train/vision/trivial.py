"""TrivialAugment, batched: the images of a batch are grouped by the operation that they drew."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.data.augment import Draws
from dist_train.data.errors import DataError
from dist_train.vision.color import (
    PixelAugment,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    apply_grouped,
    as_pixels,
)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Move pixels by the nearest neighbor; what comes from outside is 0.

    Args:
        images: (k, C, H, W).
        matrices: (k, 2, 3), from places of the result to places of the image, in pixels from the center, x before y.
    """
    k, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    m = matrices.float()[..., None, None]
    column = (m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2] + (width - 1) / 2).round_()
    row = (m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2] + (height - 1) / 2).round_()
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    place = (row * width + column).masked_fill_(outside, 0).long().view(k, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, place).view(images.shape).masked_fill_(outside[:, None], 0)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` (k,) of each pixel."""
    if images.is_floating_point():
        levels = (1 << bits.long())[:, None, None, None]
        return torch.minimum((images * levels).floor_(), levels - 1).div_(levels)
    return images & (256 - (1 << (8 - bits.long()))).to(images.dtype)[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the pixels from `threshold` (k,) on, which is in 0..255."""
    edge = threshold[:, None, None, None]
    if images.is_floating_point():
        return torch.where(images >= (edge / 255.0).float(), 1.0 - images, images)
    return images ^ (
        (images >= edge.ceil().to(torch.uint8)).to(torch.uint8) * 255
    )  # 255 - x is x with all its bits inverted


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to the full range."""
    full = 1.0 if images.is_floating_point() else 255.0
    pixels = images if images.is_floating_point() else images.float()
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, full / (high - low))
    return as_pixels(((pixels - torch.where(flat, 0.0, low)) * scale).clamp_(0, full), images.dtype)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Spread the histogram of each channel evenly; floats by way of 256 levels."""
    if images.is_floating_point():
        return equalize(as_pixels(images * 255.999, torch.uint8), _).to(images.dtype) / 255.0
    levels = images.flatten(2).long()
    histogram = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels))
    below_last = levels.shape[2] - histogram.gather(
        2, levels.amax(dim=2, keepdim=True)
    )  # pixels under the highest level
    step = below_last // 255
    before = histogram.cumsum(dim=2) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table[..., 0] = 0
    equal = table.gather(2, levels).to(images.dtype).view(images.shape)
    return torch.where((step == 0)[..., None], images, equal)


_AFFINE = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_COLOR = {
    "Brightness": adjust_brightness, "Color": adjust_saturation, "Contrast": adjust_contrast, "Sharpness": adjust_sharpness,
    "Posterize": posterize, "Solarize": solarize, "AutoContrast": autocontrast, "Equalize": equalize,
}  # fmt: skip


_NAMES = ("Identity", *_AFFINE, *_COLOR)


def _magnitudes(bins: int) -> Tensor:
    """(14, bins) float64: the magnitudes of each operation, of both signs where it has one."""
    wide = torch.linspace(0.0, 0.99, bins)
    spaces = dict.fromkeys(("ShearX", "ShearY", "Brightness", "Color", "Contrast", "Sharpness"), wide)
    spaces |= {name: torch.linspace(0.0, 32.0, bins).floor() for name in ("TranslateX", "TranslateY")}
    spaces["Rotate"] = torch.linspace(0.0, 135.0, bins)
    spaces["Posterize"] = 8 - (torch.arange(bins) / ((bins - 1) / 6)).round()
    spaces["Solarize"] = torch.linspace(255.0, 0.0, bins)
    return torch.stack([spaces.get(name, torch.zeros(bins)).double() for name in _NAMES])


def matrices(kinds: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, 3) for `affine`: shears about the top left corner, rotations in degrees about the center."""

    def of(name: str) -> Tensor:
        return torch.where(kinds == _NAMES.index(name), magnitude, 0.0)

    angle, shear_x, shear_y = torch.deg2rad(of("Rotate")), of("ShearX"), of("ShearY")
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = (cos, shear_x - sin, shear_x * height / 2 - of("TranslateX"))
    y = (shear_y + sin, cos, shear_y * width / 2 - of("TranslateY"))
    return torch.stack((torch.stack(x, 1), torch.stack(y, 1)), dim=1)


class TrivialAugmentWide(PixelAugment):
    """Apply one of 14 operations to each image, with one of `num_magnitude_bins` magnitudes (torchvision's TrivialAugmentWide).

    Mueller and Hutter, arXiv:2103.10158, with the wide space of magnitudes; nearest neighbor, black outside.

    Args:
        num_magnitude_bins: from the weakest to the strongest of each operation, all equally likely.
    """

    names = _NAMES

    def __init__(self, num_magnitude_bins: int = 31) -> None:
        if num_magnitude_bins < 2:
            raise DataError(f"TrivialAugmentWide: expected num_magnitude_bins >= 2, found {num_magnitude_bins}")
        self.num_magnitude_bins = int(num_magnitude_bins)
        self.magnitudes = _magnitudes(self.num_magnitude_bins)
        self._blended = torch.tensor([name in ("Brightness", "Color", "Contrast", "Sharpness") for name in self.names])
        self._signed = self._blended | torch.tensor([name in _AFFINE for name in self.names])

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = self.check(inputs)
        kinds, magnitude = self.draw(draws)
        values = torch.where(self._blended[kinds], 1.0 + magnitude, magnitude)
        first = 1 + len(_AFFINE)
        out = apply_grouped(inputs.clone(), kinds, (*[None] * first, *_COLOR.values()), values, draws)
        moved = ((kinds > 0) & (kinds < first)).long()
        return apply_grouped(out, moved, (None, affine), matrices(kinds, magnitude, height, width), draws), targets

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The operation of each sample, an index into `names`, (B,) int64, and its magnitude, with its sign, (B,) float64."""
        u = draws.host(3)
        kinds = (u[:, 0] * len(self.names)).long()
        magnitude = self.magnitudes[kinds, (u[:, 1] * self.num_magnitude_bins).long()]
        return kinds, torch.where(self._signed[kinds] & (u[:, 2] >= 0.5), -magnitude, magnitude)
