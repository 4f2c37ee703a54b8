"""What a report's pictures of masks, boxes, tokens and images need of an evaluation, collected on each rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_train.config.errors import visible
from dist_train.data.reading import attribute_of
from dist_train.data.stream import is_stream
from dist_train.evaluation.meaning import declared, read_meaning
from dist_train.runtime.seeding import seed_sample
from dist_train.task.losses import Loss
from dist_train.views.dense import Boxes, BoxSample, Grids, Masks, MaskSample, Tokens, TokenSample
from dist_train.views.network import pictures

if TYPE_CHECKING:
    from dist_train.evaluation.evaluate import Evaluator
    from dist_train.pages.figures import Picture

    Array = np.ndarray[Any, Any]

MASKS, BOXES, SEQUENCES, IMAGES = 6, 8, 8, 16  # samples shown at most
THRESHOLD, DRAWN = 0.5, 20  # boxes of a lower score aren't drawn, nor more of one image


@dataclass
class Shown:
    """What pictures are drawn of.

    Attributes:
        where: the index in the dataset of each sample that was evaluated.
        seed: of the run.
        frames: images that were recorded during training, see `Grids`.
    """

    dataset: Any
    where: Sequence[int]
    seed: int
    frames: Sequence[tuple[int, Array]] = ()

    def picture(self, k: int) -> Array | None:
        """The input of an evaluated sample as an image, see `sample_picture`."""
        return sample_picture(self.seed, self.dataset, self.index(k))

    def index(self, k: int) -> int:
        """Its index in the dataset."""
        return int(self.where[k])

    def names(self, count: int) -> list[str]:
        """The names of at least `count` classes: the dataset's, else their numbers."""
        names = [visible(str(name), keep="") for name in attribute_of(self.dataset, "classes") or []]
        return [*names, *(str(k) for k in range(len(names), count))]


class Collector(Protocol):
    """Sees the eval batches of one rank."""

    def add(self, samples: range, outputs: Any, targets: Any) -> None:
        """An eval batch, on the CPU."""

    def merge(self, other: Any) -> None:
        """What another rank has collected."""

    def pictures(self, shown: Shown) -> list[Picture]:
        """Of all that was collected."""


def collector_for(evaluator: Evaluator, outputs: Any, targets: Any, length: int) -> Collector | None:
    """What collects outputs and targets such as these of an evaluation of `length` samples; None where nothing does."""
    if _are_boxes(outputs) and _are_boxes(targets):
        return BoxCollector(_spread(length, BOXES))
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if not targets.is_floating_point() and outputs.dim() == 3 and outputs.shape[:2] == targets.shape:
        return TokenCollector(_spread(length, SEQUENCES), ignored(evaluator))
    if targets.dim() == 3 and outputs.shape[-2:] == targets.shape[-2:]:
        of_classes = (outputs.dim() == 4 and outputs.shape[1] > 1) or not outputs.is_floating_point()
        meaning = read_meaning(evaluator, outputs)
        if not targets.is_floating_point() and of_classes:
            return MaskCollector(_spread(length, MASKS), ignored(evaluator))
        if meaning.scale == "sigmoid" and outputs.numel() == targets.numel():
            return MaskCollector(_spread(length, MASKS), ignored(evaluator), binary=True)
    if outputs.is_floating_point() and outputs.shape == targets.shape and _are_images(outputs):
        return GridCollector()
    return None


def ignored(evaluator: Evaluator) -> list[int]:
    """Targets that don't count: `ignore_index` of the task and of its losses."""
    held = [part.function for part in vars(evaluator.task).values() if isinstance(part, Loss)]
    found = [getattr(function, "ignore_index", None) for function in held]
    return [index for index in (declared(evaluator.task, "ignore_index"), *found) if isinstance(index, int)]


def _spread(length: int, most: int) -> list[int]:
    return np.linspace(0, length - 1, min(most, length)).round().astype(int).tolist()  # type: ignore[no-any-return]


def _are_boxes(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(item, Mapping) and {"boxes", "labels"} <= item.keys() for item in value)
    )


def _are_images(values: Tensor) -> bool:
    return values.dim() == 4 and values.shape[1] in (1, 3) and min(values.shape[-2:]) > 1


@dataclass
class MaskCollector:
    """Counts of (true, predicted) classes over all pixels, and the masks of `kept` samples."""

    kept: list[int]
    ignored: list[int]
    binary: bool = False
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, samples: range, outputs: Tensor, targets: Tensor) -> None:
        """Logits (n, C, H, W), of one probability (n, [1,] H, W), or class numbers (n, H, W); targets (n, H, W)."""
        columns = 2
        if self.binary:
            predicted, targets = (outputs.reshape(targets.shape) > 0).long(), targets.round().long()
        elif outputs.dim() == 4:
            columns, predicted = outputs.shape[1], outputs.argmax(1)
        else:
            predicted = outputs.long()
        counts = (targets >= 0) & ~torch.isin(targets, torch.tensor(self.ignored, dtype=targets.dtype))
        truth = torch.where(counts, targets, -1)
        size = max(columns, int(predicted.max()) + 1, int(truth.max()) + 1)
        pairs = (truth * size + predicted)[counts]
        self._count(torch.bincount(pairs, minlength=size * size).view(size, size))
        for k in sorted(set(self.kept) & set(samples)):
            self.masks[k] = truth[k - samples.start].clone(), predicted[k - samples.start].clone()

    def merge(self, other: MaskCollector) -> None:
        """Add its counts and masks."""
        self._count(other.counts)
        self.masks |= other.masks

    def _count(self, counts: Tensor) -> None:
        size = max(len(counts), len(self.counts))
        both = [functional.pad(part, (0, size - len(part)) * 2) for part in (counts, self.counts)]
        self.counts = both[0] + both[1]

    def pictures(self, shown: Shown) -> list[Picture]:
        """IoU and masks."""
        names = shown.names(len(self.counts))
        counts = functional.pad(self.counts, (0, len(names) - len(self.counts)) * 2).numpy()
        samples = [
            MaskSample(shown.index(k), truth.numpy(), predicted.numpy(), shown.picture(k))
            for k, (truth, predicted) in sorted(self.masks.items())
        ]
        return [Masks(counts, names, samples)]


@dataclass
class BoxCollector:
    """True and predicted boxes of `kept` samples."""

    kept: list[int]
    boxes: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)

    def add(self, samples: range, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        """A dict of boxes, labels and scores for each image, and one of boxes and labels."""
        for k in sorted(set(self.kept) & set(samples)):
            found, truth = outputs[k - samples.start], targets[k - samples.start]
            scores = found["scores"] if "scores" in found else torch.ones(len(found["labels"]))
            best = scores.argsort(descending=True, stable=True)[:DRAWN]
            best = best[scores[best] >= THRESHOLD]
            kept = {"boxes": found["boxes"][best], "labels": found["labels"][best], "scores": scores[best]}
            self.boxes[k] = {name: truth[name].clone() for name in ("boxes", "labels")}, kept

    def merge(self, other: BoxCollector) -> None:
        """Add its boxes."""
        self.boxes |= other.boxes

    def pictures(self, shown: Shown) -> list[Picture]:
        """Images with boxes."""
        most = max((int(part["labels"].max(initial=0)) for part in self._arrays()), default=0)
        names = shown.names(most + 1)
        samples = []
        for k, (truth, found) in sorted(self.boxes.items()):
            labels = [[names[label] for label in part["labels"].tolist()] for part in (truth, found)]
            of_model = found["boxes"].numpy(), labels[1], found["scores"].numpy()
            samples.append(BoxSample(shown.index(k), shown.picture(k), (truth["boxes"].numpy(), labels[0]), of_model))
        return [Boxes(samples, THRESHOLD)]

    def _arrays(self) -> list[dict[str, Any]]:
        return [{"labels": part["labels"].numpy()} for pair in self.boxes.values() for part in pair]


@dataclass
class TokenCollector:
    """The loss at each position over all samples, and `kept` sequences."""

    kept: list[int]
    ignored: list[int]
    totals: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))  # losses, tokens
    sequences: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def add(self, samples: range, outputs: Tensor, targets: Tensor) -> None:
        """Logits (n, T, vocabulary), targets (n, T)."""
        counts = (targets >= 0) & ~torch.isin(targets, torch.tensor(self.ignored, dtype=targets.dtype))
        truth = targets.where(counts, 0).long()
        losses = functional.cross_entropy(outputs.transpose(1, 2), truth, reduction="none").where(counts, 0.0)
        self._total(torch.stack([losses.double().sum(0), counts.double().sum(0)]))
        for k in sorted(set(self.kept) & set(samples)):
            row = k - samples.start
            kept = losses[row].where(counts[row], torch.nan).clone()
            self.sequences[k] = kept, truth[row].where(counts[row], -1).clone(), outputs[row].argmax(-1)

    def merge(self, other: TokenCollector) -> None:
        """Add its sums and sequences."""
        self._total(other.totals)
        self.sequences |= other.sequences

    def _total(self, totals: Tensor) -> None:
        length = max(totals.shape[1], self.totals.shape[1])
        both = [functional.pad(part, (0, length - part.shape[1])) for part in (totals, self.totals)]
        self.totals = both[0] + both[1]

    def pictures(self, shown: Shown) -> list[Picture]:
        """Losses and samples."""
        decode = attribute_of(shown.dataset, "decode")
        samples = []
        for k, (losses, truth, predicted) in sorted(self.sequences.items()):
            counted = truth >= 0
            words = [_words(tokens[counted].tolist(), decode) for tokens in (truth, predicted)]
            samples.append(TokenSample(shown.index(k), losses.numpy(), *words))
        mean = torch.where(self.totals[1] > 0, self.totals[0] / self.totals[1], torch.nan)
        return [Tokens(mean.numpy(), samples, "" if callable(decode) else " ")]


def _words(tokens: list[int], decode: Callable[[list[int]], str] | None) -> list[str]:
    return [visible(str(decode([token])), keep="") if callable(decode) else str(token) for token in tokens]


@dataclass
class GridCollector:
    """The first images that a model gives, and the true ones."""

    images: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, samples: range, outputs: Tensor, targets: Tensor) -> None:
        """(n, C, H, W) both."""
        for k in range(samples.start, min(samples.stop, IMAGES)):
            self.images[k] = outputs[k - samples.start].clone(), targets[k - samples.start].clone()

    def merge(self, other: GridCollector) -> None:
        """Add its images."""
        self.images |= other.images

    def pictures(self, shown: Shown) -> list[Picture]:
        """Grids, with those that were recorded."""
        pairs = [pair for _, pair in sorted(self.images.items())]
        outputs, targets = (pictures(torch.stack(part), color=True)[0] for part in zip(*pairs, strict=True))
        return [Grids(outputs, targets, shown.frames)]


def sample_picture(seed: int, dataset: Any, index: int) -> Any:
    """A sample's input as an image, rescaled to [0, 1] if it was normalized; None if it isn't an image."""
    if is_stream(dataset):
        return None
    seed_sample(seed, -1, index)  # as in evaluation
    sample = dataset[index]
    image = sample[0] if isinstance(sample, tuple | list) else sample
    if isinstance(image, Mapping):  # samples with names: the only image in it
        images = [value for value in image.values() if isinstance(value, Tensor | np.ndarray) and value.ndim in (2, 3)]
        image = images[0] if len(images) == 1 else None
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] in (1, 3):
        image = image.permute(1, 2, 0)
    elif not isinstance(image, Tensor) or image.dim() != 2:
        return None
    array = image.numpy()
    if array.dtype == np.uint8 or (array.min() >= 0 and array.max() <= 1):
        return array
    return (array - array.min()) / max(float(array.max() - array.min()), 1e-12)
