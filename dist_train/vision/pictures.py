"""torchvision's small datasets of pictures, read as uint8 and by whole batches instead of one by one through PIL.

torchvision's own classes download, check and read the files. Their pixels are held once in a process, however many datasets
(train and val of a `RandomSplit`, say) are made of them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dist_train.data.plan import Indices

Transform = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class _Files:
    """What the files of a split hold: pixels (N, C, H, W) uint8, read-only; targets as torchvision's class has them."""

    pixels: NDArray[np.uint8]
    targets: Any
    classes: Sequence[str]


_read: WeakValueDictionary[tuple[type, str, Any], _Files] = WeakValueDictionary()


class _Pictures(Dataset[Any]):
    """What these datasets share.

    Attributes:
        inputs: (N, C, H, W) uint8, read-only, shared by all datasets of the same files.
        targets: as torchvision's: each dataset has its own, and items follow a change of it.
        classes, class_to_idx: as torchvision's.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        part: Any,
        transform: Transform | None,
        target_transform: Transform | None,
        download: bool,
    ) -> None:
        source, place = self.torchvision_class(), os.path.abspath(os.path.expanduser(root))
        files = _read.get((source, place, part))
        if files is None:
            files = _read[source, place, part] = _files(source(place, part, download=download))
        self._files, self.inputs = files, files.pixels
        self.targets, self.classes = copy.deepcopy(files.targets), list(files.classes)
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}
        self.root, self.transform, self.target_transform = root, transform, target_transform

    _name: str

    @classmethod
    def torchvision_class(cls) -> Any:
        """torchvision's class, which reads the files."""
        from torchvision import datasets

        return getattr(datasets, cls._name)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        pixels, label = self.inputs[index], int(self.targets[index])
        if self.transform is None:
            image = torch.from_numpy(pixels.copy())
            return image, torch.tensor(label) if self.target_transform is None else self.target_transform(label)
        from PIL import Image

        image = self.transform(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
        return image, label if self.target_transform is None else self.target_transform(label)

    @property
    def data(self) -> Any:
        """torchvision's name of the pixels, which its users replace (CIFAR-10-C); here they have another form. AttributeError."""
        raise AttributeError(
            f"{type(self).__name__} has no `data`: its pixels are `inputs`, (N, C, H, W) uint8; set that, and `targets`"
        )

    @data.setter
    def data(self, value: Any) -> None:
        self.data  # noqa: B018 (it raises)

    @property
    def read_batch(self) -> Callable[[Indices], Any] | None:
        """Reads a whole batch, unless something has to be done sample by sample."""
        return self._read if self.transform is None and self.target_transform is None else None

    def _read(self, indices: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        held = self.targets
        labels = [held[index] for index in indices.tolist()] if isinstance(held, list) else np.asarray(held)[indices]
        return torch.from_numpy(self.inputs[indices]), torch.as_tensor(labels, dtype=torch.int64)


def _files(dataset: Any) -> _Files:
    """What an object of torchvision's class holds."""
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 3:  # MNIST's (N, H, W)
        pixels = pixels[:, None]
    elif pixels.shape[3] == 3:  # CIFAR's (N, H, W, C), a view of what the file has
        pixels = pixels.transpose(0, 3, 1, 2)
    pixels = np.ascontiguousarray(pixels).view()
    pixels.flags.writeable = False
    targets = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return _Files(pixels, targets, getattr(dataset, "classes", [str(digit) for digit in range(10)]))


class _TrainOrTest(_Pictures):
    def __init__(
        self,
        root: str | os.PathLike[str],
        train: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, train, transform, target_transform, download)
        self.train = train


class CIFAR10(_TrainOrTest):
    """CIFAR-10: 60,000 color pictures of 32x32 pixels in ten classes (A. Krizhevsky, 2009).

    Args:
        root: where torchvision has or puts `cifar-10-batches-py`.
        train: 50,000 training pictures, or 10,000 for testing.
        transform: called with a PIL image, as torchvision's: items are then exactly those of torchvision's class.
        target_transform: called with the label.
        download: fetch the files where they aren't there.

    Without transforms items are (uint8 (3, 32, 32), int64 label), and batches are read at once: normalize on the device
    (`data.normalize`), and augment in batches (`data.augment`).

    Raises:
        RuntimeError: the files aren't there, or aren't those that were published (torchvision's checksums).
    """

    _name = "CIFAR10"


class CIFAR100(_TrainOrTest):
    """CIFAR-100: as `CIFAR10`, in a hundred classes; in `cifar-100-python`."""

    _name = "CIFAR100"


class MNIST(_TrainOrTest):
    """MNIST: 60,000 and 10,000 handwritten digits of 28x28 pixels (Y. LeCun et al., 1998); in `MNIST/raw`.

    Arguments as for `CIFAR10`; without transforms items are (uint8 (1, 28, 28), int64 label).
    """

    _name = "MNIST"


class FashionMNIST(_TrainOrTest):
    """FashionMNIST: gray pictures of clothing, as many and in the form of `MNIST` (H. Xiao et al., 2017)."""

    _name = "FashionMNIST"


class SVHN(_Pictures):
    """SVHN: house numbers, color pictures of 32x32 pixels in ten classes (Y. Netzer et al., 2011). Reading them needs scipy.

    Args:
        root: where `train_32x32.mat` and the others are.
        split: "train" (73,257), "test" (26,032) or "extra" (531,131).
        transform, target_transform, download: as for `CIFAR10`.
    """

    _name = "SVHN"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, split, transform, target_transform, download)
        self.split = split

    @property
    def labels(self) -> Any:
        """`targets`, by torchvision's name."""
        return self.targets
