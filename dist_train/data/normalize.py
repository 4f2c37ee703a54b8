"""Normalization of pictures on the device (`data.normalize`): bitwise the numbers of torchvision's ToTensor and Normalize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.data.errors import DataError
from dist_train.task.batch import is_pair, map_parts, map_tensors, shapes_of

_ELSEWHERE = "leave data.normalize out, and normalize in the dataset's transform or in the model"


class Normalize:
    """(pixels - mean) / std of each channel; uint8 pixels, 0..255, become float32 in [0, 1] first, floats stay as they are.

    Args:
        mean, std: a number for each channel, or one for all, in units of pixels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.channels = max(len(self.mean), len(self.std))
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

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
            if any(not 0 <= mean <= 1 for mean in self.mean):
                raise DataError(
                    f"data.normalize.mean: expected numbers for pixels in [0, 1], as torchvision's, found {list(self.mean)}; the "
                    f"pictures are uint8, so divide mean and std by 255"
                )
            mean, std, full = self._on(pictures.device, torch.float32)
            # a tensor of 255: CUDA multiplies by the reciprocal of a number, which has other bits
            pixels = pictures.to(torch.float32).div_(full)
            return pixels if self._is_identity else pixels.sub_(mean).div_(std)
        if not pictures.is_floating_point():
            raise DataError(f"data.normalize: expected pictures of uint8 or floats, found {shapes_of(pictures)}")
        mean, std, _ = self._on(pictures.device, pictures.dtype)
        return pictures.sub(mean).div_(std)

    @property
    def _is_identity(self) -> bool:
        return not any(self.mean) and all(std == 1 for std in self.std)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """mean and std (C, 1, 1), and 255: made once, since a copy to the device waits for it."""
        if (device, dtype) not in self._constants:
            shaped = [
                torch.tensor(values, dtype=dtype, device=device)[:, None, None] for values in (self.mean, self.std)
            ]
            self._constants[device, dtype] = shaped[0], shaped[1], torch.tensor(255, dtype=dtype, device=device)
        return self._constants[device, dtype]


def _alike(inputs: Any, target: Tensor) -> bool:
    return isinstance(inputs, Tensor) and (inputs.shape, inputs.dtype) == (target.shape, target.dtype)
