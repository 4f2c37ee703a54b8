"""Normalization of pictures on the device (`data.normalize`): bitwise the numbers of torchvision's ToTensor and Normalize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.data.errors import DataError
from dist_train.task.batch import is_pair, map_parts, map_tensors, shapes_of

_BLOCK = 1 << 16  # numbers that are normalized at once on the CPU: they stay in its cache between the operations
_ELSEWHERE = "leave data.normalize out, and normalize in the dataset's transform or in the model"


class Normalize:
    """(pixels - mean) / std of each channel; uint8 pixels, 0..255, become float32 in [0, 1] first, floats stay as they are.

    Args:
        mean, std: a number for each channel, or one for all, in units of pixels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.channels = max(len(self.mean), len(self.std))
        self._constants: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, inputs: Any) -> Any:
        """The inputs of a batch with every picture in them normalized, in new memory of the same memory format.

        Args:
            inputs: pictures (N, C, H, W), or a container of tensors; those in it that aren't 4-dim stay as they are.

        Raises:
            DataError: there is no picture, or one of another dtype or number of channels.
        """
        if isinstance(inputs, Tensor) and inputs.dim() == 4:
            return self._normalized(inputs)
        found = list[Tensor]()

        def change(tensor: Tensor) -> Tensor:
            found.extend([tensor] * (tensor.dim() == 4))
            return self._normalized(tensor) if tensor.dim() == 4 else tensor

        changed = map_tensors(change, inputs)
        if not found:
            raise DataError(
                f"data.normalize: expected pictures (N, channels, height, width), found {shapes_of(inputs)}; {_ELSEWHERE}"
            )
        return changed

    def batch(self, batch: Any) -> Any:
        """A batch of (inputs, target), or of inputs alone, with its inputs normalized.

        Raises:
            DataError: as for inputs; or which parts of the batch are inputs isn't known.
        """
        if isinstance(batch, Tensor):
            return self(batch)
        if is_pair(batch):
            inputs, target = batch
            if isinstance(target, Tensor) and target.dim() == 4 and _alike(inputs, target):
                raise DataError(
                    f"data.normalize: the batch is two pictures alike, {shapes_of(batch)}: whether the second one is an input "
                    f"too (another view) or a target isn't known. For views return ((view, view), label), for masks (N, H, W) "
                    f"int64; else {_ELSEWHERE}"
                )
            return getattr(batch, "_make", type(batch))((self(inputs), target))
        if isinstance(batch, list | tuple) and len(batch) == 1:
            return map_parts(self, batch)
        raise DataError(
            f"data.normalize: expected batches of (inputs, target), found {shapes_of(batch)}: say which parts are inputs by "
            f"data.inputs and data.target; or {_ELSEWHERE}"
        )

    def _normalized(self, pictures: Tensor) -> Tensor:
        """One tensor (N, C, H, W)."""
        if self.channels > 1 and pictures.shape[1] != self.channels:
            last = "; channels come first: permute(2, 0, 1) each sample" if pictures.shape[3] == self.channels else ""
            raise DataError(
                f"data.normalize: mean and std are for {self.channels} channels, but the pictures (N, channels, height, width) "
                f"are {shapes_of(pictures)}{last}"
            )
        if pictures.dtype == torch.uint8:
            for name, values in (("mean", self.mean), ("std", self.std)):
                if any(not 0 <= value <= 1 for value in values):
                    raise DataError(
                        f"data.normalize.{name}: expected numbers for pixels in [0, 1], as torchvision's, found {list(values)}; "
                        f"the pictures are uint8, so divide mean and std by 255"
                    )
        elif not pictures.is_floating_point():
            raise DataError(f"data.normalize: expected pictures of uint8 or floats, found {shapes_of(pictures)}")
        return self._computed(pictures)

    def _computed(self, pictures: Tensor) -> Tensor:
        """As torchvision computes it: a division by 255, a subtraction, a division, each rounded."""
        scales = pictures.dtype == torch.uint8
        result = torch.empty_like(pictures, dtype=torch.float32 if scales else None)
        given, filled, tiles = pictures, result, 0
        if result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous():
            # rows of pixels (N * H, W * C): broadcasting over the channels is four times as slow there
            given, filled = (x.permute(0, 2, 3, 1).flatten(2).flatten(0, 1) for x in (pictures, result))
            tiles = pictures.shape[3]
        mean, std, full = self._on(result.device, result.dtype, tiles)
        moves = any(self.mean) or any(std != 1 for std in self.std)
        rows = max(1, _BLOCK // filled[0].numel()) if result.device.type == "cpu" and filled.numel() else len(filled)
        for part, source in zip(filled.split(rows or 1), given.split(rows or 1)):
            part.copy_(source)
            if scales:
                part.div_(full)
            if moves:
                part.sub_(mean).div_(std)
        return result

    def _on(self, device: torch.device, dtype: torch.dtype, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
        """mean and std, (C, 1, 1) or for rows of pixels (tiles * C,), and 255: made once, since a copy to the device waits.

        255 is a tensor because CUDA multiplies by the reciprocal of a number, which has other bits.
        """
        key = device, dtype, tiles
        if key not in self._constants:
            with torch.inference_mode(mode=False):  # an evaluation may be first, and training uses them too
                both = [torch.tensor(values, dtype=dtype).expand(self.channels) for values in (self.mean, self.std)]
                mean, std = (x.repeat(tiles if len(x) > 1 else 1) if tiles else x[:, None, None] for x in both)
                self._constants[key] = mean.to(device), std.to(device), torch.tensor(255, dtype=dtype, device=device)
        return self._constants[key]


def _alike(inputs: Any, target: Tensor) -> bool:
    return isinstance(inputs, Tensor) and (inputs.shape, inputs.dtype) == (target.shape, target.dtype)
