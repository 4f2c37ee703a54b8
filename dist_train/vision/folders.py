"""Pictures in a folder per class, read as uint8."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.errors import DataError
from dist_train.vision.cache import PictureCache
from dist_train.vision.crops import FixedCrop, Picture, RandomCrop, as_size
from dist_train.vision.file_list import Samples, open_files
from dist_train.vision.turbojpeg import is_available

Transform = Callable[[Any], Any]


class ImageFolder(Dataset[Any]):
    """Pictures in `root/<class>/**`: torchvision's ImageFolder, with crops that are decoded and resized in one go.

    Args:
        root: the directory. Its files are listed once, and then kept in an index (see `open_files`).
        transform: gets each picture as a PIL image in RGB; none of the crops below then.
        target_transform: gets each class number.
        random_resized_crop: torchvision's RandomResizedCrop to this size: pixels, or [height, width].
        scale, ratio: of it.
        resize: torchvision's Resize: pixels of the shorter side, or [height, width].
        center_crop: torchvision's CenterCrop behind it.
        cache: a directory in which all pictures are kept decoded, with a shorter side of `cache_size` (a smaller picture as
            it is), for crops that take a fraction of the time; made by all ranks of the node together at the first start.
            3 * 256 * 340 bytes a picture, of 1.28 million 330 GB. A crop of it isn't that of the full picture.
        scaled_decoding: what will be shrunk to less than a half, a quarter or an eighth is decoded that much smaller: faster for
            large photographs, with pixels that are a little others. Of JPEGs only.
        index: false: list the files at each start.

    Items are (uint8 (3, height, width), class): `data.normalize` makes floats of them on the device, and flips belong into
    `data.augment`. Without any crop they are as large as the picture. The pixels are torchvision's but for
    rounding (a few differ by 1, rarely by 2). With the PyPI package `turbojpeg`, or libjpeg-turbo 3 on the system, only the
    crop's part of a JPEG is decoded; else, with the same pixels, PIL decodes all of it.

    Attributes: classes, class_to_idx, samples, targets as in torchvision.

    Raises:
        DataError: arguments that exclude each other; there is no picture; reading one: it is broken, with the file's name.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        *,
        random_resized_crop: int | Sequence[int] | None = None,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        resize: int | Sequence[int] | None = None,
        center_crop: int | Sequence[int] | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_size: int = 256,
        scaled_decoding: bool = False,
        index: bool = True,
    ) -> None:
        fixed = resize is not None or center_crop is not None
        crops = random_resized_crop is not None or fixed
        if (transform is not None and (crops or cache is not None)) or (random_resized_crop is not None and fixed):
            raise DataError(
                "ImageFolder: expected either transform (which gets the whole picture), or random_resized_crop, or resize and "
                "center_crop; cache only without transform"
            )
        if cache is not None and isinstance(resize, int) and resize > cache_size:
            raise DataError(
                f"ImageFolder: resize={resize} would enlarge the pictures of the cache, whose shorter side is {cache_size}: give "
                f"cache_size={resize} or more (another directory, as one holds one size)"
            )
        self.root, self._scaled = os.fspath(root), scaled_decoding
        self.transform, self.target_transform = transform, target_transform
        if random_resized_crop is not None:
            size = as_size("random_resized_crop", random_resized_crop)
            self._crop: RandomCrop | FixedCrop = RandomCrop(size, _range("scale", scale, 1.0), _range("ratio", ratio))
        else:
            self._crop = FixedCrop(
                resize if resize is None or isinstance(resize, int) else as_size("resize", resize),
                None if center_crop is None else as_size("center_crop", center_crop),
            )
        self._files = open_files(root, cached=index)
        self.classes = self._files.classes
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}
        self.samples = Samples(self._files)
        self._cache = None if cache is None else PictureCache(cache, self._files, cache_size, scaled_decoding)

    @property
    def targets(self) -> NDArray[np.int64]:
        """The class of every sample, (n,) int64."""
        return self._files.targets()

    @property
    def input_advice(self) -> list[str]:
        """What would make reading faster."""
        tips = []
        if self.transform is not None:
            tips.append("crops of ImageFolder's own (random_resized_crop, resize, center_crop) in place of transform")
        elif self._cache is None:
            if not is_available():
                tips.append("pip install 'dist_train[vision]', to decode the crop's part of a JPEG only")
            tips.append(
                "ImageFolder's scaled_decoding (for large photographs), or its cache of decoded pictures (needs the disk)"
            )
        return tips

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = range(len(self))[index]
        if self.transform is not None:
            return self.transform(Picture(self._files.path(index)).image()), self._target(index)
        return self._taken(index, None), self._target(index)

    @property
    def item_shape(self) -> tuple[int, ...] | None:
        """Of the uint8 tensors that `read_into` fills in; None where pictures differ, or a transform makes the items."""
        return None if self.transform is not None or self._crop.shape is None else (3, *self._crop.shape)

    def read_into(self, index: int, out: Tensor) -> Any:
        """The picture into `out`, uint8 (3, height, width); returns its class. The same as `__getitem__`."""
        self._taken(index, out)
        return self._target(index)

    def _taken(self, index: int, out: Tensor | None) -> Tensor:
        kept = self._cache
        if kept is not None:
            height, width = kept.size(index)
            return self._crop.take(height, width, lambda box, _: kept.pixels(index, box), out)
        picture = Picture(self._files.path(index), self._scaled)
        return self._crop.take(picture.height, picture.width, picture.pixels, out)

    def _target(self, index: int) -> Any:
        target = self._files.target(index)
        return target if self.target_transform is None else self.target_transform(target)


def _range(name: str, value: Sequence[float], most: float = float("inf")) -> tuple[float, float]:
    low, high = value if len(value) == 2 else (0.0, 0.0)
    if not 0 < low <= high <= most:
        raise DataError(f"ImageFolder: expected {name} to be [smallest, largest], both above 0, found {value!r}")
    return float(low), float(high)
