"""The augmentations that come with the package: batched, on the device, with random numbers of its own for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that everybody uses)
from torch import Tensor

from dist_train.data.augment import Augment, Domain, Draws, domain_of
from dist_train.data.errors import DataError


def _images(name: str, inputs: Tensor) -> tuple[int, int, int, int]:
    if inputs.dim() != 4:
        raise DataError(f"{name} needs images (N, C, H, W), found a batch of shape {tuple(inputs.shape)}")
    batch, channels, height, width = inputs.shape
    return batch, channels, height, width


def _probability(name: str, p: float) -> float:
    if not 0.0 <= p <= 1.0:
        raise DataError(f"{name}: expected p between 0 and 1, found {p}")
    return p


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, H, W) bool: the pixels of each sample's box; the first rows of `box` are top, bottom, left and right."""
    rows, columns = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    top, bottom, left, right = (edge[:, None] for edge in box[:4])
    tall, wide = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (tall[:, :, None] & wide[:, None, :])[:, None]


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
        batch, _, height, width = _images("RandomShift", inputs)
        offsets = draws.send((draws.host(2) * (2 * self.pixels + 1)).to(torch.int64))
        padded = F.pad(inputs, [self.pixels] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 2p+1, 2p+1, H, W)
        rows = torch.arange(batch, device=inputs.device)
        return windows[rows, :, offsets[:, 0], offsets[:, 1]], targets


class RandomHorizontalFlip(Augment):
    """Mirror each image left to right with probability `p`."""

    domain = "any"

    def __init__(self, p: float = 0.5) -> None:
        self.p = _probability("RandomHorizontalFlip", p)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _images("RandomHorizontalFlip", inputs)
        flipped = draws.send(draws.host(1) < self.p)
        return torch.where(flipped[:, :, None, None], inputs.flip(3), inputs), targets


class RandomErasing(Augment):
    """Overwrite a random box of each image with probability `p` (Zhong et al., arXiv:1708.04896).

    Args:
        p: probability for each image.
        scale: range of the box's area, as a fraction of the image's.
        ratio: range of its height over its width, log-uniform.
        value: what to write.
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float = 0.0,
    ) -> None:
        if not 0 <= scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise DataError(f"RandomErasing: expected increasing ranges, scale within 0..1, found {scale} and {ratio}")
        self.p = _probability("RandomErasing", p)
        self.scale, self.ratio, self.value = tuple(scale), tuple(ratio), float(value)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = _images("RandomErasing", inputs)
        u = draws.host(5).double()
        area = (self.scale[0] + u[:, 1] * (self.scale[1] - self.scale[0])) * height * width
        low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
        ratio = torch.exp(low + u[:, 2] * (high - low))
        box_h = torch.sqrt(area * ratio).round().clamp_(max=height)
        box_w = torch.sqrt(area / ratio).round().clamp_(max=width)
        top = (u[:, 3] * (height - box_h + 1)).floor()
        left = (u[:, 4] * (width - box_w + 1)).floor()
        bottom = torch.where(u[:, 0] < self.p, top + box_h, top)  # an empty box erases nothing
        erased = _inside(draws.send(torch.stack((top, bottom, left, left + box_w))), height, width)
        return inputs.masked_fill(erased, self.value), targets


@lru_cache(maxsize=8)
def _beta_table(alpha: float) -> Tensor:
    """4,096 equally likely values of the Beta(alpha, alpha) distribution: a lookup is bitwise identical on all devices."""
    # With t = x**alpha the density is smooth at 0 also for alpha < 1; the other half follows by symmetry.
    t = np.linspace(0.0, 0.5**alpha, 20001)
    density = (1.0 - t ** (1.0 / alpha)) ** (alpha - 1.0)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    levels = (np.arange(2048) + 0.5) / 2048
    lower = np.interp(levels * mass[-1], mass, t) ** (1.0 / alpha)
    return torch.from_numpy(np.concatenate((lower, 1.0 - lower[::-1]))).to(torch.float32)


def _soft(targets: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as probabilities (B, classes) float32; probabilities stay as they are."""
    return targets if targets.is_floating_point() else F.one_hot(targets.long(), classes).float()


class _Mix(Augment):
    """Common to Mixup and CutMix: each sample is mixed with the next one of the global batch."""

    neighbours = 1

    def __init__(self, classes: int, alpha: float = 1.0, p: float = 1.0) -> None:
        name = type(self).__name__
        if alpha <= 0 or classes < 2:
            raise DataError(f"{name}: expected alpha > 0 and classes >= 2, found {alpha} and {classes}")
        self.classes, self.alpha, self.p = int(classes), float(alpha), _probability(name, p)

    def _kept(self, u: Tensor) -> Tensor:
        """How much of each sample stays: Beta(alpha, alpha), or all of it with probability 1 - p; (B,)."""
        kept = _beta_table(self.alpha)[(u[:, 0] * 4096).long()]
        return torch.where(u[:, 1] < self.p, kept, 1.0)

    def _targets(self, targets: Tensor, kept: Tensor) -> Tensor:
        soft = _soft(targets, self.classes)
        return soft[:-1] * kept[:, None] + soft[1:] * (1.0 - kept)[:, None]


class Mixup(_Mix):
    """Blend each sample and its target with the next sample's (Zhang et al., arXiv:1710.09412).

    Args:
        classes: targets become (B, classes) float32 probabilities.
        alpha: of the Beta distribution that the blending weight of each sample is drawn from.
        p: probability for each sample.
    """

    def __init__(self, classes: int, alpha: float = 0.2, p: float = 1.0) -> None:
        super().__init__(classes, alpha, p)

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        if not inputs.is_floating_point():
            raise DataError(f"Mixup needs floating point inputs, found {inputs.dtype}")
        kept = draws.send(self._kept(draws.host(2)[:-1]))
        weight = kept.view(-1, *[1] * (inputs.dim() - 1)).to(inputs.dtype)
        return inputs[:-1] * weight + inputs[1:] * (1.0 - weight), self._targets(targets, kept)


class CutMix(_Mix):
    """Replace a box of each image by the next image's, and its target by area (Yun et al., arXiv:1905.04899).

    Args:
        classes: targets become (B, classes) float32 probabilities.
        alpha: of the Beta distribution that the kept fraction of each image's area is drawn from.
        p: probability for each image.
    """

    domain = "any"

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        _, _, height, width = _images("CutMix", inputs)
        u = draws.host(4)[:-1]
        half = torch.sqrt(1.0 - self._kept(u).double()) / 2.0
        top, bottom = ((u[:, 2] * height + sign * half * height).round().clamp_(0, height) for sign in (-1, 1))
        left, right = ((u[:, 3] * width + sign * half * width).round().clamp_(0, width) for sign in (-1, 1))
        kept = 1.0 - (bottom - top) * (right - left) / (height * width)
        box = draws.send(torch.stack((top, bottom, left, right, kept)))
        mixed = torch.where(_inside(box, height, width), inputs[1:], inputs[:-1])
        return mixed, self._targets(targets, box[4].float())


class OneOf(Augment):
    """Apply one of several augmentations to each sample, each equally likely.

    Args:
        augments: the choices; targets become probabilities if one of them makes them so.
    """

    def __init__(self, augments: Sequence[Augment]) -> None:
        if not augments:
            raise DataError("OneOf: expected at least one augmentation, found none")
        self.augments = list(augments)
        self.neighbours = max(getattr(augment, "neighbours", 0) for augment in self.augments)
        self.domain = self._common_domain()

    def _common_domain(self) -> Domain:
        domains = {domain_of(augment) for augment in self.augments} - {"any"}
        if len(domains) == 2:
            raise DataError(
                "OneOf: expected augmentations that all work on pixels or all on normalized images (or on any), found "
                + ", ".join(f"{type(augment).__name__} ({domain_of(augment)})" for augment in self.augments)
            )
        return domains.pop() if domains else "any"

    def __call__(self, inputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        rows = len(inputs) - self.neighbours
        chosen = draws.send((draws.host(1)[:rows, 0] * len(self.augments)).to(torch.int64))
        out, soft = inputs[:rows], targets[:rows]
        for k, augment in enumerate(self.augments):
            given = rows + getattr(augment, "neighbours", 0)
            more, labels = augment(inputs[:given], targets[:given], draws.head(given))
            mine = chosen == k
            out = torch.where(mine.view(-1, *[1] * (out.dim() - 1)), more, out)
            if labels.dim() > soft.dim():
                soft = _soft(soft, labels.shape[1])
            elif soft.dim() > labels.dim():
                labels = _soft(labels, soft.shape[1])
            soft = torch.where(mine.view(-1, *[1] * (soft.dim() - 1)), labels, soft)
        return out, soft
