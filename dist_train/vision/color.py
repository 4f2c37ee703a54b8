"""Augmentations of color, in torchvision's arithmetic for tensors, with a factor of its own for each sample.

They work on pixels before normalization: uint8, or floats in [0, 1]. Sums over an image are taken in integers, so that they
don't depend on the batch that it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor

from dist_train.data.augment import Augment, Draws
from dist_train.data.errors import DataError
from dist_train.vision.geometry import image_shape


class PixelAugment(Augment):
    """An augmentation of gray or RGB pixels, before normalization."""

    domain = "pixels"
    _checked = False

    def check(self, inputs: Tensor) -> tuple[int, int, int, int]:
        """(N, C, H, W) of images that it can take.

        Raises:
            DataError: other channels than 1 or 3, another dtype, or floats outside [0, 1]; these are looked at in the
                first batch only, since a device would be waited for.
        """
        name = type(self).__name__
        shape = image_shape(name, inputs)
        if shape[1] not in (1, 3):
            raise DataError(
                f"{name} needs images of 1 or 3 channels (N, C, H, W), found a batch of shape {tuple(inputs.shape)}"
            )
        if inputs.dtype == torch.uint8:
            return shape
        if not inputs.is_floating_point():
            raise DataError(f"{name}: expected uint8 or floating point images, found {inputs.dtype}")
        if not self._checked:
            low, high = (float(edge) for edge in inputs.aminmax())
            if not 0 <= low <= high <= 1:
                raise DataError(
                    f"{name} works on pixels, uint8 or floats in [0, 1], found floats in [{low:.3g}, {high:.3g}]: normalize by "
                    f"data.normalize, which comes after it, instead of in the dataset"
                )
            self._checked = True
        return shape


def apply_grouped(
    images: Tensor,
    kinds: Tensor,
    operations: Sequence[Callable[[Tensor, Tensor], Tensor] | None],
    values: Tensor,
    draws: Draws,
) -> Tensor:
    """Apply to each image the operation that `kinds` names, one call of an operation for all of its images.

    Args:
        images: (B, C, H, W).
        kinds: (B,) int64 on the host: an index into `operations`.
        operations: functions of (images (k, C, H, W), values (k, ...)); None leaves images as they are.
        values: (B, ...) on the host.

    Returns:
        images, changed where they stand.
    """
    order = kinds.argsort(stable=True)
    ends = torch.bincount(kinds, minlength=len(operations)).cumsum(0).tolist()
    order, values = draws.send(order), draws.send(values[order])
    for operation, start, end in zip(operations, [0, *ends], ends, strict=False):
        # on a CPU, of a few images at a time: large tensors are new pages of memory each time, which takes most of the time
        step = max(1, 2**18 // images[0].numel()) if images.device.type == "cpu" else len(images)
        for begin in range(start, end, step) if operation is not None else ():
            part = slice(begin, min(begin + step, end))
            images[order[part]] = operation(images[order[part]], values[part])  # type: ignore[misc]
    return images


def _bound(images: Tensor) -> float:
    return 1.0 if images.is_floating_point() else 255.0


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _blend(images: Tensor, other: Tensor | float, ratio: Tensor) -> Tensor:
    """`ratio` (k,) float64 of each image and the rest of `other`; uint8 is truncated, as in torchvision."""
    mixed = (images * _column(ratio).float()).add_(other * _column(1.0 - ratio).float())
    return as_pixels(mixed.clamp_(0, _bound(images)), images.dtype)


def as_pixels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats as `dtype`, truncated; by way of int32, a CPU converts to uint8 seven times as fast."""
    return values.to(torch.int32).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def _gray(images: Tensor) -> Tensor:
    """(k, 1, H, W) of the images' dtype."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return as_pixels(0.2989 * red + 0.587 * green + 0.114 * blue, images.dtype)[:, None]


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images (k, C, H, W) times factor (k,)."""
    return _blend(images, 0.0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the gray image."""
    gray, units = _gray(images), 1.0
    if images.is_floating_point():
        units = 2.0**24
        gray = (gray * units).round().long()
    mean = (gray.sum(dim=(1, 2, 3)).double() / (units * gray[0].numel())).float()
    return _blend(images, _column(mean), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image; gray images stay as they are."""
    return images if images.shape[1] == 1 else _blend(images, _gray(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift (k,), in whole turns; gray images stay as they are."""
    if images.shape[1] == 1:
        return images
    exact = images.is_floating_point()
    pixels = images.float() if exact else images.float() / 255.0
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(dim=1)
    chroma = value - pixels.amin(dim=1)
    unit = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == green, (blue - red) / unit + 2.0, (red - green) / unit + 4.0)
    hue = torch.where(value == red, (green - blue) / unit, hue) + 6.0 * shift.float()[:, None, None]
    parts = []
    for n in (5.0, 3.0, 1.0):
        sector = (hue + n).remainder(6.0)
        parts.append(value - chroma * torch.minimum(sector, 4.0 - sector).clamp_(0.0, 1.0))
    turned = torch.stack(parts, dim=1)
    return as_pixels(turned.clamp_(0, 1) if exact else turned.mul_(255.999), images.dtype)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image smoothed by 3 x 3 (center 5, others 1, over 13), whose border is the image's."""
    if min(images.shape[2:]) <= 2:
        return images
    pixels = images if images.is_floating_point() else images.float()
    tall = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    smooth = tall[..., :-2] + tall[..., 1:-1] + tall[..., 2:] + 4.0 * pixels[:, :, 1:-1, 1:-1]
    smooth /= 13.0
    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = smooth if images.is_floating_point() else smooth.round_()
    return _blend(images, blurred, factor)


class ColorJitter(PixelAugment):
    """Change brightness, contrast, saturation and hue of each image, in an order of its own (torchvision's ColorJitter).

    Args:
        brightness, contrast, saturation: the factor is uniform in [max(0, 1 - x), 1 + x], or in (low, high).
        hue: the turn is uniform in [-x, x], or in (low, high), within -0.5..0.5 of the circle.
    """

    _operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)

    def __init__(
        self,
        brightness: float | tuple[float, float] = 0.0,
        contrast: float | tuple[float, float] = 0.0,
        saturation: float | tuple[float, float] = 0.0,
        hue: float | tuple[float, float] = 0.0,
    ) -> None:
        given = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        ranges = [_jitter_range(name, value) for name, value in given.items()]
        neutral = [(1.0, 1.0)] * 3 + [(0.0, 0.0)]
        self.active = [i for i in range(4) if ranges[i] != neutral[i]]
        self.ranges = torch.tensor(ranges, dtype=torch.float64)
        self.orders = torch.tensor(list(permutations(self.active)), dtype=torch.int64)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        self.check(inputs)
        factors, order = self.draw(draws)
        out = inputs.clone()
        for kinds in order.unbind(1):
            out = apply_grouped(out, kinds, self._operations, factors.gather(1, kinds[:, None])[:, 0], draws)
        return out, targets

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Factors (B, 4) float64 of brightness, contrast, saturation and hue, and the order (B, n) of those that are used."""
        u = draws.host(5).double()
        low, high = self.ranges.unbind(1)
        return low + u[:, :4] * (high - low), self.orders[(u[:, 4] * len(self.orders)).long()]


def _jitter_range(name: str, value: float | tuple[float, float]) -> tuple[float, float]:
    middle, lowest, highest = (0.0, -0.5, 0.5) if name == "hue" else (1.0, 0.0, float("inf"))
    if isinstance(value, int | float):
        low, high = middle - value, middle + value
        low = low if name == "hue" else max(low, 0.0)
    else:
        low, high = (float(edge) for edge in value)
    if not lowest <= low <= high <= highest:
        raise DataError(
            f"ColorJitter: expected {name} to be one number >= 0 or (low, high), within {lowest}..{highest}, found {value}"
        )
    return low, high
