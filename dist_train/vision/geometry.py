"""Augmentations that move pixels: crops, shifts, flips. Each sample draws its own numbers; all work on uint8 and on floats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that everybody uses)
from torch import Tensor

from dist_train.data.augment import Augment, Draws
from dist_train.data.errors import DataError


def image_shape(name: str, inputs: Tensor) -> tuple[int, int, int, int]:
    """(N, C, H, W) of a batch of images. Raises DataError, which begins with `name`, if it is none."""
    if inputs.dim() != 4:
        raise DataError(f"{name} needs images (N, C, H, W), found a batch of shape {tuple(inputs.shape)}")
    batch, channels, height, width = inputs.shape
    return batch, channels, height, width


def probability(name: str, p: float) -> float:
    """`p`, if it is one. Raises DataError."""
    if not 0.0 <= p <= 1.0:
        raise DataError(f"{name}: expected p between 0 and 1, found {p}")
    return p


def _pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from `size`, one number for both or two."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise DataError(f"{name}: expected size to be one or two numbers of pixels (height, width), found {size!r}")
    return int(sides[0]), int(sides[1])


def by_numpy(images: Tensor) -> bool:
    """Whether numpy can work on the images in place: it copies rows and images several times as fast as torch on a CPU."""
    return (
        images.device.type == "cpu"
        and images.dtype != torch.bfloat16
        and images.numel() > 0
        and not images.requires_grad
    )


def _windows(images: Tensor, corners: Tensor, size: tuple[int, int], draws: Draws) -> Tensor:
    """From each image the window with its top left corner at `corners`.

    Args:
        images: (B, C, H, W).
        corners: (B, 2) int64 on the host, top and left.
        size: of the windows, all inside of the images.

    Returns:
        (B, C, *size), channels_last if the images are.
    """
    height, width = size
    if not by_numpy(images):
        at = draws.send(corners)
        views = images.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, offsets, offsets, height, width)
        return views[torch.arange(len(images), device=images.device), :, at[:, 0], at[:, 1]]
    # A row of a window is one item of bytes, which may begin at any byte: 0.3 ms for 512 images of 3 x 32 x 32.
    last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    grid = images.permute(0, 2, 3, 1)[:, None] if last else images[..., None]  # (B, planes, H, W, values of a pixel)
    batch, planes, tall, wide, _ = grid.shape
    data = grid.contiguous().view(torch.uint8).numpy()
    item = data.shape[-1] * width
    rows = np.ndarray(data.size - item + 1, f"V{item}", data, strides=(1,))
    plane = np.arange(batch * planes).reshape(batch, planes, 1) * tall + corners[:, :1, None].numpy()
    first = (plane + np.arange(height)) * wide + corners[:, 1:, None].numpy()
    cut = torch.from_numpy(rows[first * data.shape[-1]].view(np.uint8)).view(images.dtype)
    cut = cut.view(batch, planes, height, width, -1)
    return cut[:, 0].permute(0, 3, 1, 2) if last else cut[..., 0]


def _corners(draws: Draws, rows: int, columns: int) -> Tensor:
    """(B, 2) int64 on the host: a row below `rows` and a column below `columns`, each equally likely."""
    return (draws.host(2) * torch.tensor([rows, columns])).to(torch.int64)


class RandomShift(Augment):
    """Shift each image by up to `pixels` in both directions, filling with zeros (a random crop of the padded image).

    Args:
        pixels: largest shift; every shift in -pixels..pixels is equally likely.
    """

    domain = "any"

    def __init__(self, pixels: int) -> None:
        if pixels < 0:
            raise DataError(f"RandomShift: expected pixels >= 0, found {pixels}")
        self.pixels = int(pixels)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = image_shape("RandomShift", inputs)
        corners = _corners(draws, 2 * self.pixels + 1, 2 * self.pixels + 1)
        return _windows(F.pad(inputs, [self.pixels] * 4), corners, (height, width), draws), targets


class RandomCrop(Augment):
    """Pad each image and cut a window at a random place out of it, every place equally likely (torchvision's RandomCrop).

    Args:
        size: of the window in pixels, one number or (height, width).
        padding: pixels on all sides, or (left and right, top and bottom), or (left, top, right, bottom).
        fill: the value of the padding, in the units of the images: 0..255 for uint8.

    Raises:
        DataError: at the call, if padded images are smaller than `size`, or uint8 can't hold `fill`.
    """

    domain = "any"

    def __init__(self, size: int | Sequence[int], padding: int | Sequence[int] = 0, fill: float = 0) -> None:
        self.size, self.fill = _pair("RandomCrop", size), fill
        sides = [padding] * 4 if isinstance(padding, int) else [*padding] * (2 if len(padding) == 2 else 1)
        if len(sides) != 4 or min(sides) < 0:
            raise DataError(
                f"RandomCrop: expected padding to be one, two or four numbers of pixels >= 0, found {padding!r}"
            )
        self.padding = [int(sides[i]) for i in (0, 2, 1, 3)]  # left, right, top, bottom, as torch's pad wants them

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = image_shape("RandomCrop", inputs)
        if inputs.dtype == torch.uint8 and self.fill not in range(256):
            raise DataError(
                f"RandomCrop: expected fill to be a whole number in 0..255 for uint8 images, found {self.fill}"
            )
        tall, wide = height + sum(self.padding[2:]) - self.size[0], width + sum(self.padding[:2]) - self.size[1]
        if tall < 0 or wide < 0:
            raise DataError(
                f"RandomCrop: expected images of at least {self.size[0]} x {self.size[1]} after padding, found "
                f"{height} x {width} with padding (left, right, top, bottom) {self.padding}; use a smaller size or more padding"
            )
        padded = F.pad(inputs, self.padding, value=self.fill) if any(self.padding) else inputs
        return _windows(padded, _corners(draws, tall + 1, wide + 1), self.size, draws), targets


class _RandomFlip(Augment):
    domain = "any"
    dim: int

    def __init__(self, p: float = 0.5) -> None:
        self.p = probability(type(self).__name__, p)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        image_shape(type(self).__name__, inputs)
        flipped = draws.host(1) < self.p
        if not by_numpy(inputs):
            return torch.where(draws.send(flipped)[:, :, None, None], inputs.flip(self.dim), inputs), targets
        images, chosen = inputs.numpy(), flipped[:, 0].numpy()
        out = images.copy(order="K")
        out[chosen] = torch.from_numpy(images[chosen]).flip(self.dim).numpy()  # numpy's own flip takes thrice the time
        return torch.from_numpy(out), targets


class RandomHorizontalFlip(_RandomFlip):
    """Mirror each image left to right with probability `p`."""

    dim = 3


class RandomVerticalFlip(_RandomFlip):
    """Mirror each image top to bottom with probability `p`."""

    dim = 2


class RandomResizedCrop(Augment):
    """Cut a box of random area and aspect ratio out of each image and resize it (torchvision's RandomResizedCrop).

    Bilinear with antialiasing, as torchvision's for tensors: equal to it on a CPU, and within rounding on a GPU, where the
    boxes of a batch are resized at once.

    Args:
        size: of the result in pixels, one number or (height, width).
        scale: range of the box's area, as a fraction of the image's.
        ratio: range of its width over its height, log-uniform.
    """

    domain = "any"
    _attempts = 10

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise DataError(
                f"RandomResizedCrop: expected increasing ranges, scale within 0..1, ratio above 0, found {scale} and {ratio}"
            )
        self.size, self.scale, self.ratio = _pair("RandomResizedCrop", size), tuple(scale), tuple(ratio)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = image_shape("RandomResizedCrop", inputs)
        if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
            raise DataError(f"RandomResizedCrop: expected uint8 or floating point images, found {inputs.dtype}")
        boxes = self.boxes(draws, height, width)
        if inputs.device.type != "cpu":
            return resize_boxes(inputs, draws.send(boxes), self.size), targets
        parts = [
            F.interpolate(
                image[None, :, top : top + tall, left : left + wide], self.size, mode="bilinear", antialias=True
            )
            for image, (top, left, tall, wide) in zip(inputs, boxes.tolist(), strict=True)
        ]
        return torch.cat(parts), targets

    def boxes(self, draws: Draws, height: int, width: int) -> Tensor:
        """(B, 4) int64 on the host: top, left, height and width of each sample's box in images of `height` x `width`."""
        n = self._attempts
        u = draws.host(2 * n + 2).double()
        area = (self.scale[0] + u[:, :n] * (self.scale[1] - self.scale[0])) * (height * width)
        low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
        ratio = torch.exp(low + u[:, n : 2 * n] * (high - low))
        wide, tall = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)  # the first attempt that fits
        found = fits.any(dim=1)
        tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
        top = (u[:, -2] * (height - tall + 1)).floor()
        left = (u[:, -1] * (width - wide + 1)).floor()
        # none does: the largest box in the center whose ratio is allowed
        most_wide = min(width, round(height * max(self.ratio)))
        most_tall = min(height, round(width / min(self.ratio)))
        center = torch.tensor([(height - most_tall) // 2, (width - most_wide) // 2, most_tall, most_wide])
        return torch.where(found[:, None], torch.stack((top, left, tall, wide), dim=1).long(), center)


def resize_boxes(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a box of each image to `size`, bilinear and antialiased, by two products with matrices of weights.

    Args:
        images: (B, C, H, W), uint8 or floats.
        boxes: (B, 4) int64 on the same device: top, left, height, width.
        size: (height, width).

    Returns:
        (B, C, *size) of the images' dtype; uint8 is rounded once, so that it may differ by 1 from torch's, which is rounded
        after each direction.
    """
    pixels = images if images.is_floating_point() else images.float()
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size[0]).to(pixels.dtype)
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size[1]).to(pixels.dtype)
    narrow = torch.bmm(pixels.flatten(1, 2), columns.transpose(1, 2)).unflatten(1, pixels.shape[1:3])
    out = torch.matmul(rows[:, None], narrow)
    return out if images.is_floating_point() else out.round_().clamp_(0, 255).to(images.dtype)


def _resize_weights(start: Tensor, length: Tensor, given: int, wanted: int) -> Tensor:
    """(B, wanted, given) float32: how much each of `given` pixels counts in each of `wanted`, of a box start..start+length."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length.float() / wanted
    center = scale * (torch.arange(wanted, device=start.device)[:, None] + 0.5)
    place = torch.arange(given, device=start.device) - start
    weights = (1.0 - (place + 0.5 - center).abs() / scale.clamp(min=1.0)).clamp_(min=0.0)
    weights = weights * ((place >= 0) & (place < length))
    return weights / weights.sum(dim=2, keepdim=True)
