"""One picture of a file: decoded and cropped in one go, and resized, as torchvision's transforms do it; uint8 to the end."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.data.errors import DataError
from dist_train.vision.turbojpeg import Box, Jpeg

Size = tuple[int, int]
Pixels = Callable[[Box, Size], NDArray[np.uint8]]
"""The pixels of a box of a picture, (height, width, 3) RGB, to be resized to that size."""


class Picture:
    """A file that has been read, and whose pixels are decoded when asked for.

    Args:
        scaled: let JPEG's decoder shrink what will be shrunk by more than half.

    Raises:
        DataError: it is empty, or no picture; names the file. OSError: it can't be read.
    """

    def __init__(self, path: str, scaled: bool = False) -> None:
        with open(path, "rb") as file:
            data = file.read()
        self._path, self._data, self._scaled = path, data, scaled
        self._jpeg = Jpeg(data)
        if self._jpeg.opened:
            self.height, self.width = self._jpeg.height, self._jpeg.width
        else:
            self.width, self.height = self._pil(None).size

    def image(self) -> Any:
        """The whole picture as a PIL image in RGB. Raises DataError: the file is damaged."""
        return self._pil(1)

    def _pil(self, scale: int | None) -> Any:
        """A PIL image in RGB, of a JPEG a half, a quarter or an eighth by `scale`; None: not decoded yet."""
        from PIL import Image

        try:
            opened = Image.open(io.BytesIO(self._data))
            if scale is None:
                return opened
            if scale > 1:
                opened.draft(None, (self.width // scale, self.height // scale))
            return opened.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # of many types, by the format and the damage
            size = len(self._data)
            raise DataError(
                f"{os.path.abspath(self._path)} is no picture that can be decoded: "
                + (f"{type(error).__name__}: {error} ({size} bytes)" if size else "the file is empty (0 bytes)")
            ) from error

    def pixels(self, box: Box, size: Size) -> NDArray[np.uint8]:
        """Those of a box, (height, width, 3) RGB, not smaller than the size that it will be resized to.

        Of a JPEG only these are decoded, if libjpeg-turbo is there. Raises DataError: the file is damaged.
        """
        scales = (8, 4, 2) if self._scaled and self._data[:2] == b"\xff\xd8" else ()
        scale = next((one for one in scales if box.height // one >= size[0] and box.width // one >= size[1]), 1)
        top, left = box.top // scale, box.left // scale
        bottom, right = -(-(box.top + box.height) // scale), -(-(box.left + box.width) // scale)
        found = self._jpeg.decode(Box(top, left, bottom - top, right - left), scale) if self._jpeg.opened else None
        return found if found is not None else np.array(self._pil(scale).crop((left, top, right, bottom)))


def resize(pixels: NDArray[np.uint8], size: Size, out: Tensor) -> None:
    """Antialiased bilinear, as PIL does it, into `out`, (3, height, width) uint8: PIL's pixels but for rounding."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    if pixels.shape[:2] == size:
        out.copy_(planes)
    else:  # torch.nn.functional.interpolate has no `out`; it computes pixel by pixel, and is slow to write planes itself
        by_pixel = out.stride(0) == 1
        made = out[None] if by_pixel else torch.empty((1, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        torch.ops.aten._upsample_bilinear2d_aa.out(planes[None], size, False, out=made)
        if not by_pixel:
            out.copy_(made[0])


def shorter_side(height: int, width: int, side: int) -> Size:
    """The size with the shorter side `side` and the same aspect ratio, as torchvision's Resize has it."""
    short, long = min(height, width), max(height, width)
    other = int(side * long / short)
    return (side, other) if height <= width else (other, side)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop: the same boxes of the same draws from torch's default generator.

    Attributes:
        shape: (height, width) of the result. scale: area of the box, as a part of the picture's. ratio: its width / height.
    """

    shape: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @cached_property
    def _logs(self) -> list[float]:
        return torch.log(torch.tensor(self.ratio)).tolist()

    def box(self, height: int, width: int) -> Box:
        """Of a picture of that size."""
        drawn, (low, high) = torch.empty(1), self._logs
        for _ in range(10):
            area = height * width * drawn.uniform_(*self.scale).item()
            ratio = drawn.uniform_(low, high).exp_().item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,)))
                return Box(top, int(torch.randint(0, width - w + 1, (1,))), h, w)
        least, most = min(self.ratio), max(self.ratio)
        w, h = width, height
        if width / height < least:
            h = round(width / least)
        elif width / height > most:
            w = round(height * most)
        return Box((height - h) // 2, (width - w) // 2, h, w)

    def take(self, height: int, width: int, pixels: Pixels, out: Tensor | None = None) -> Tensor:
        """A crop of a picture of that size, in `out` if given: (3, height, width) uint8."""
        out = torch.empty((3, *self.shape), dtype=torch.uint8) if out is None else out
        resize(pixels(self.box(height, width), self.shape), self.shape, out)
        return out


@dataclass(frozen=True)
class FixedCrop:
    """torchvision's Resize (of the shorter side, or to a size), then CenterCrop; each of them may be None."""

    resize: int | Size | None = None
    center: Size | None = None

    @property
    def shape(self) -> Size | None:
        """(height, width) of the result; None if it depends on the picture."""
        return self.center or (self.resize if isinstance(self.resize, tuple) else None)

    def take(self, height: int, width: int, pixels: Pixels, out: Tensor | None = None) -> Tensor:
        """As `RandomCrop.take`. Raises DataError: the picture is smaller than the crop."""
        if self.resize is None:
            size = height, width
        else:
            size = shorter_side(height, width, self.resize) if isinstance(self.resize, int) else self.resize
        whole = out if out is not None and self.center in (None, size) else torch.empty((3, *size), dtype=torch.uint8)
        resize(pixels(Box(0, 0, height, width), size), size, whole)
        if self.center in (None, size):
            return whole
        h, w = self.center
        if h > size[0] or w > size[1]:
            raise DataError(f"a picture of {size[0]}x{size[1]} is smaller than center_crop {h}x{w}: set `resize`, too")
        top, left = round((size[0] - h) / 2), round((size[1] - w) / 2)
        part = whole[:, top : top + h, left : left + w]
        return part.contiguous() if out is None else out.copy_(part)


def as_size(name: str, value: Any) -> Size:
    """(height, width) of a number or a pair. Raises DataError for anything else."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise DataError(f"ImageFolder: expected {name} to be a number of pixels or [height, width], found {value!r}")
    return pair
