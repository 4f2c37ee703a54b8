"""Decoding a part of a JPEG with libjpeg-turbo 3, through its C API TurboJPEG; the pixels are those of a full decode."""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import importlib.util
import os
import threading
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# From turbojpeg.h of version 3.
_DECOMPRESS, _RGB = 1, 0
_SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE = 4, 5, 6, 7, 8
_BLOCK_WIDTHS = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # of an iMCU, by chroma subsampling
_COLORS = (0, 1, 2)  # RGB, YCbCr, gray; CMYK needs a conversion that it doesn't have


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num", "denom")]


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


@cache
def _library() -> Any:
    """The shared library, of the PyPI package `turbojpeg` or the system's; None if there is none with version 3's API."""
    spec = importlib.util.find_spec("turbojpeg")
    beside = os.path.join(os.path.dirname(spec.origin), "turbojpeg.libs") if spec and spec.origin else ""
    for path in (*glob.glob(os.path.join(beside, "libturbojpeg*")), ctypes.util.find_library("turbojpeg")):
        try:
            library: Any = ctypes.CDLL(path) if path else None
            library.tj3SetCroppingRegion.argtypes = [ctypes.c_void_p, _Region]
        except (OSError, AttributeError):
            continue
        library.tj3SetScalingFactor.argtypes = [ctypes.c_void_p, _Factor]
        library.tj3Init.restype = ctypes.c_void_p
        library.tj3DecompressHeader.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        library.tj3Get.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.tj3Decompress8.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        return library
    return None


class _Handles(threading.local):
    """A decoder for each thread; it lives as long as the process, and a fork's child may use its copy."""

    def __init__(self) -> None:
        library = _library()
        self.decoder = library.tj3Init(_DECOMPRESS) if library is not None else None


_handles = _Handles()


class Jpeg:
    """A JPEG's header. `opened` is False where this library isn't there, or can't give what PIL would: ask PIL then.

    Args:
        data: the whole file.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._decoder = data, _handles.decoder
        self.opened = False
        # A file that was cut off may have all that a crop needs; whether it is read must not depend on the crop.
        if self._decoder is None or not (data[:2] == b"\xff\xd8" and data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")):
            return
        self._library = _library()
        if self._library.tj3DecompressHeader(self._decoder, data, len(data)):
            return
        names = (_WIDTH, _HEIGHT, _SUBSAMPLING, _PRECISION, _COLORSPACE)
        self.width, self.height, self._subsampling, precision, colors = (self._get(name) for name in names)
        self.opened = self._subsampling in _BLOCK_WIDTHS and precision == 8 and colors in _COLORS

    def _get(self, parameter: int) -> int:
        return int(self._library.tj3Get(self._decoder, parameter))

    def decode(self, box: Box, scale: int = 1) -> NDArray[np.uint8] | None:
        """The pixels of a box, (height, width, 3) uint8 RGB, bitwise identical to those of a full decode.

        None if the data are damaged, or the library warns of them. To be called before another header is read.

        Args:
            scale: 2, 4 or 8: decode a picture of a half, a quarter, an eighth; the box is one of that.
        """
        # The region begins where a block does. Chroma is interpolated from its neighbours: one more pixel on each side.
        blocks = _BLOCK_WIDTHS[self._subsampling] // scale
        left = max(0, box.left - 1) // blocks * blocks
        right = min(-(-self.width // scale), box.left + box.width + 1)
        pixels = np.empty((box.height, right - left, 3), dtype=np.uint8)
        region = _Region(left, box.top, right - left, box.height)
        data, decoder = self._data, self._decoder
        if self._library.tj3SetScalingFactor(decoder, _Factor(1, scale)):
            return None
        if self._library.tj3SetCroppingRegion(decoder, region):
            return None
        if self._library.tj3Decompress8(decoder, data, len(data), pixels.ctypes.data, 0, _RGB):
            return None
        return pixels[:, box.left - left : box.left - left + box.width]


def is_available() -> bool:
    """Whether JPEGs are decoded by it."""
    return _library() is not None
