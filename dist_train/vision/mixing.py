"""Augmentations that mix samples, and the choice between augmentations. Each sample draws its own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that everybody uses)
from torch import Tensor

from dist_train.data.augment import Augment, Domain, Draws, domain_of
from dist_train.data.errors import DataError
from dist_train.vision.erasing import paste
from dist_train.vision.geometry import image_shape, probability


@lru_cache(maxsize=8)
def _beta_table(alpha: float) -> np.ndarray:
    """4,096 equally likely values of the Beta(alpha, alpha) distribution: a lookup is bitwise identical on all devices.

    An array: a tensor made under a mode of torch (fake tensors) would be one of that mode for as long as it is kept.
    """
    # With t = x**alpha the density is smooth at 0 also for alpha < 1; the other half follows by symmetry.
    t = np.linspace(0.0, 0.5**alpha, 20001)
    density = (1.0 - t ** (1.0 / alpha)) ** (alpha - 1.0)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    levels = (np.arange(2048) + 0.5) / 2048
    lower = np.interp(levels * mass[-1], mass, t) ** (1.0 / alpha)
    return np.concatenate((lower, 1.0 - lower[::-1])).astype(np.float32)


def _soft(targets: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as probabilities (B, classes) float32; probabilities stay as they are."""
    if targets.is_floating_point():
        return targets
    try:
        return F.one_hot(targets.long(), classes).float()
    except RuntimeError as error:  # on the CPU; a CUDA kernel's assertion shows later
        found = sorted({label for label in targets.tolist() if not 0 <= label < classes}) if targets.dim() == 1 else []
        raise DataError(
            f"mixing needs labels from 0 to {classes - 1} (classes={classes}), found {found[:5] or error}: an ignored sample, or "
            f"one of another class, has no probabilities to mix; leave it out of the dataset (data.weights, Subset)"
        ) from error


class _Mix(Augment):
    """Common to Mixup and CutMix: each sample is mixed with the next one of the global batch."""

    neighbours = 1

    def __init__(self, classes: int, alpha: float = 1.0, p: float = 1.0) -> None:
        name = type(self).__name__
        if alpha <= 0 or classes < 2:
            raise DataError(f"{name}: expected alpha > 0 and classes >= 2, found {alpha} and {classes}")
        self.classes, self.alpha, self.p = int(classes), float(alpha), probability(name, p)

    def _kept(self, u: Tensor) -> Tensor:
        """How much of each sample stays: Beta(alpha, alpha), or all of it with probability 1 - p; (B,)."""
        kept = torch.from_numpy(_beta_table(self.alpha))[(u[:, 0] * 4096).long()]
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
            raise DataError(
                f"Mixup needs floating point inputs, found {inputs.dtype}: data.normalize makes them of uint8"
            )
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
        _, _, height, width = image_shape("CutMix", inputs)
        u = draws.host(4)[:-1]
        half = torch.sqrt(1.0 - self._kept(u).double()) / 2.0
        top, bottom = ((u[:, 2] * height + sign * half * height).round().clamp_(0, height) for sign in (-1, 1))
        left, right = ((u[:, 3] * width + sign * half * width).round().clamp_(0, width) for sign in (-1, 1))
        kept = 1.0 - (bottom - top) * (right - left) / (height * width)
        mixed = paste(inputs[:-1], torch.stack((top, bottom, left, right)), inputs[1:], draws)
        return mixed, self._targets(targets, draws.send(kept.float()))


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
            if more.shape != out.shape:  # which torch.where may broadcast
                raise DataError(
                    f"OneOf: expected augmentations that keep the images' size, but {type(augment).__name__} made "
                    f"{tuple(more.shape)} of {tuple(out.shape)}: put it before OneOf or behind it"
                )
            mine = chosen == k
            out = torch.where(mine.view(-1, *[1] * (out.dim() - 1)), more, out)
            if labels.dim() > soft.dim():
                soft = _soft(soft, labels.shape[1])
            elif soft.dim() > labels.dim():
                labels = _soft(labels, soft.shape[1])
            soft = torch.where(mine.view(-1, *[1] * (soft.dim() - 1)), labels, soft)
        return out, soft
