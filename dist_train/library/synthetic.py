"""Data that is made up: the same on every machine, with nothing to download; and what tasks need around other datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.data.errors import DataError
from dist_train.data.reading import dataset_length
from dist_train.library.arrays import Arrays
from dist_train.library.splits import split_number
from dist_train.runtime.seeding import SPLIT


class MarkovChain(Arrays):
    """Windows of a random language: the probabilities of a token depend on the `order` tokens before it.

    The best that any language model can reach is known: `perplexity`, of the true probabilities on this split.

    Args:
        split: "train", "val" or "test": other windows of the same language.
        samples: windows. length: tokens of each.
        tokens: the size of the vocabulary. order: how far the language looks back.
        seed: of the language.

    Items are (inputs, targets), int64 (length,) each, the targets shifted by one. Raises DataError for another split.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        samples: int = 1024,
        length: int = 64,
        tokens: int = 8,
        order: int = 2,
        seed: int = 0,
    ) -> None:
        if order < 1 or length < order or tokens < 2 or samples < 1:
            raise DataError(
                f"MarkovChain: expected 1 <= order <= length, tokens >= 2, found {order}, {length}, {tokens}"
            )
        language = np.random.RandomState([SPLIT, seed & 0xFFFFFFFF])
        table = language.dirichlet(np.full(tokens, 0.2), tokens**order).cumsum(1)
        table[:, -1] = 1.0  # rounding
        random = np.random.RandomState([SPLIT, seed & 0xFFFFFFFF, 1 + split_number("MarkovChain", split)])
        text = random.randint(0, tokens, (samples, length + 1))
        surprise = np.full((samples, length), np.log(tokens))  # that of the first tokens, which are uniform
        for place in range(order, length + 1):
            context = np.zeros(samples, dtype=np.int64)
            for back in range(order, 0, -1):
                context = context * tokens + text[:, place - back]
            cumulative = table[context]
            text[:, place] = chosen = (random.random_sample((samples, 1)) > cumulative).sum(1)
            below = np.where(chosen > 0, cumulative[np.arange(samples), chosen - 1], 0.0)
            surprise[:, place - 1] = -np.log(cumulative[np.arange(samples), chosen] - below)
        self.perplexity = float(np.exp(surprise.mean()))
        super().__init__(torch.from_numpy(text[:, :-1].copy()), torch.from_numpy(text[:, 1:].copy()))


class Shapes(Dataset[Any]):
    """Images of one to three squares and discs of random colors on noise, for segmentation and detection.

    Args:
        split: "train", "val" or "test": other images.
        samples: images. size: their width and height in pixels.
        target: "masks": the class of each pixel, int64 (size, size); "boxes": {boxes: float32 (n, 4) as x1, y1, x2, y2,
            labels: int64 (n,)}.
        seed: of the images.

    Items are (float32 (3, size, size) in [0, 1], target); the classes are background, square and disc.

    Raises:
        DataError: another split or target, or a size too small for a shape.
    """

    classes = ["background", "square", "disc"]

    def __init__(
        self, split: str = "train", *, samples: int = 512, size: int = 32, target: str = "masks", seed: int = 0
    ) -> None:
        if target not in ("masks", "boxes"):
            raise DataError(f"Shapes: expected target to be masks or boxes, found {target!r}")
        if size < 16 or samples < 1:
            raise DataError(f"Shapes: expected a size of at least 16 and at least 1 sample, found {size} and {samples}")
        self.key = [SPLIT, seed & 0xFFFFFFFF, split_number("Shapes", split)]
        self.samples, self.size, self.target = samples, size, target

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        random, size = np.random.RandomState([*self.key, index]), self.size
        image, mask = 0.3 * random.random_sample((3, size, size)), np.zeros((size, size), dtype=np.int64)
        y, x = np.mgrid[:size, :size] + 0.5
        boxes, labels = [], []
        for quarter in random.permutation(4)[: random.randint(1, 4)]:  # so that no two overlap
            label, side = random.randint(1, 3), random.randint(size // 4, size // 2 + 1)
            corner = random.randint(0, size // 2 - side + 1, 2) + size // 2 * np.array([quarter % 2, quarter // 2])
            left, top = corner.tolist()
            inside = np.maximum(abs(x - left - side / 2), abs(y - top - side / 2)) < side / 2
            if label == 2:
                inside = (x - left - side / 2) ** 2 + (y - top - side / 2) ** 2 < (side / 2) ** 2
            image[:, inside] = random.uniform(0.4, 1.0, (3, 1))
            mask[inside] = label
            boxes.append([left, top, left + side, top + side])
            labels.append(label)
        picture = torch.from_numpy(image).float()
        if self.target == "masks":
            return picture, torch.from_numpy(mask)
        return picture, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


class TwoViews(Dataset[Any]):
    """Two random views of each input, for contrastive learning: ((view, view), target), or (view, view) without targets.

    Args:
        dataset: map-style, with items (input, target) or inputs alone.
        transform: what makes a view of an input. Its random draws (torch, numpy, `random`) are seeded for each sample.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any]) -> None:
        self.dataset, self.transform = dataset, transform
        dataset_length(dataset, "TwoViews")
        self.classes = getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        inputs = item[0] if isinstance(item, tuple | list) else item
        views = self.transform(inputs), self.transform(inputs)
        return (views, item[1]) if isinstance(item, tuple | list) else views


def collate_lists(samples: Sequence[Any]) -> tuple[list[Any], ...]:
    """For `data.collate`: a list of each part of the samples instead of a stacked tensor, for images and boxes of any sizes.

    It is torchvision's `utils.collate_fn`: [(image, target), ...] -> ([image, ...], [target, ...]).
    """
    return tuple(map(list, zip(*samples, strict=True)))
