"""What to change where training waits for its data, for this config, dataset and machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_train.data.reading import attribute_of, batch_reader
from dist_train.data.stream import is_stream
from dist_train.runtime.world import usable_cpus
from dist_train.task.batch import tensors_in

if TYPE_CHECKING:
    from dist_train.training.parts import Parts

_OWN = {  # torchvision's -> ours, which read the same files
    **{name: name for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN")},
    "ImageFolder": "ImageFolder",
    "ImageNet": "ImageFolder",
}


@dataclass(frozen=True)
class InputFacts:
    """What advice depends on.

    Attributes:
        dataset: class of `data.train`, with its module. whole: it is read by whole batches. stream: an IterableDataset.
        workers: loader workers of a rank. cpus: CPUs that a rank may use. cached: `data.cache` or the like is in use.
        floats: its samples have images (3 or 4 dimensions in a batch) that are floats when they are read.
        own: what the dataset itself advises (its `input_advice`).
        cuda: it trains on a GPU. pinned, persistent: how workers hand batches over.
    """

    dataset: str
    whole: bool = False
    stream: bool = False
    workers: int = 0
    cpus: int = 1
    floats: bool = False
    cuda: bool = False
    pinned: bool = True
    persistent: bool = True
    own: tuple[str, ...] = ()

    @classmethod
    def of(cls, parts: Parts, batch: Any) -> InputFacts:
        """Of a start and its first micro-batch, as it was read."""
        config, world, loader = parts.config.data, parts.world, parts.train_loader
        inner = parts.datasets["train"]
        while hasattr(inner, "dataset"):  # a Subset, a RandomSplit
            inner = inner.dataset
        kind = type(inner)
        images = [tensor for tensor in tensors_in(batch) if tensor.dim() >= 4]
        return cls(
            f"{kind.__module__}.{kind.__qualname__}",
            config.collate is None and batch_reader(parts.datasets["train"]) is not None,
            is_stream(parts.datasets["train"]),
            loader.num_workers,
            max(1, usable_cpus() // max(1, world.placement.local_size)),
            any(tensor.is_floating_point() for tensor in images) and parts.normalize is None and not config.augment,
            world.device.type == "cuda",
            config.pin_memory is not False,
            config.persistent_workers is not False,
            tuple(attribute_of(parts.datasets["train"], "input_advice") or ()),
        )


def advice(share: float, facts: InputFacts) -> str:
    """A sentence on how much time is lost, and what helps, the cheapest change first."""
    module, _, name = facts.dataset.rpartition(".")
    tips = []
    spare = facts.cpus - 1
    if facts.workers < spare:
        tips.append(f"data.num_workers={spare} ({facts.workers} now, and {facts.cpus} CPUs for this process)")
    if not facts.persistent and facts.workers:
        tips.append("data.persistent_workers=auto (workers start again in each epoch)")
    if facts.cuda and not facts.pinned:
        tips.append("data.pin_memory=auto (copies from pageable memory wait)")
    if module.startswith("torchvision.datasets") and name in _OWN:
        tips.append(f"dist_train.data.{_OWN[name]}, which reads the same files without PIL or by whole batches")
    elif facts.own:
        tips += facts.own
    elif not facts.whole and not facts.stream:
        tips.append(
            f"a read_batch(indices) in {name}, which reads a batch at once, if its samples draw nothing at random"
        )
    if facts.floats:
        tips.append("samples as uint8 with data.normalize, and data.augment, on the device, in place of transforms")
    if facts.workers >= spare > 0 and not facts.whole:
        tips.append("more CPUs for each GPU, or cheaper samples: all CPUs are in use")
    lost = f"the input is the bottleneck: training waits for data {share:.0%} of the time"
    gain = f", and would be up to {1 / max(1 - share, 0.01):.1f} times as fast without"
    what = "".join(f"\n  - {tip}" for tip in tips) or "\n  - a faster disk or dataset"
    return f"{lost}{gain}. What helps (docs/performance.md):{what}"
