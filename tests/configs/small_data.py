"""Small data in the true formats of the datasets that can't be had without a network, for torchvision's own classes."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, load_sample_images


def write_mnist(root: Path, name: str, train: int = 200, test: int = 80) -> None:
    """MNIST's or FashionMNIST's four idx files below `root`: handwritten digits, three times as large."""
    bunch = load_digits()
    images = np.pad(np.kron(bunch.images * 15, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, cut in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        for kind, values in (("images-idx3", images[cut]), ("labels-idx1", bunch.target[cut].astype(np.uint8))):
            head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + values.tobytes())


def crops(size: int, count: int) -> list[tuple[int, np.ndarray]]:
    """(photo, (size, size, 3) uint8) by turns from scikit-learn's two photographs, a temple and a flower."""
    photos = load_sample_images().images
    random = np.random.RandomState(0)
    result = []
    for k in range(count):
        photo = photos[k % 2]
        top, left = random.randint(0, photo.shape[0] - size), random.randint(0, photo.shape[1] - size)
        result.append((k % 2, photo[top : top + size, left : left + size]))
    return result


def tinted_digits(count: int) -> list[tuple[int, np.ndarray]]:
    """(digit, (32, 32, 3) uint8): handwritten digits, four times as large, in one random color on another that is darker."""
    bunch, random = load_digits(), np.random.RandomState(0)
    result = []
    for digit, image in zip(bunch.target[:count], bunch.images[:count]):
        ink, ground = random.uniform(140, 255, 3), random.uniform(0, 110, 3)
        share = np.kron(image / 16, np.ones((4, 4)))[..., None]
        result.append((int(digit), (share * ink + (1 - share) * ground).astype(np.uint8)))
    return result


def write_cifar(root: Path, module: Path, each: int = 32, images: list[tuple[int, np.ndarray]] | None = None) -> None:
    """CIFAR-10's seven pickles below `root`, of `each` images, and a module with a `CIFAR10` that knows their checksums.

    images: (label, (32, 32, 3) uint8) of all of them; by default crops of two photographs.

    torchvision compares every file with the md5 of the real one; a subclass brings those of these files.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}

    def write(name: str, content: dict[str, object]) -> None:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()

    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    taken = images or [
        (photo + 2 * (n % each % 5), image) for n, (photo, image) in enumerate(crops(32, each * len(names)))
    ]
    for k, name in enumerate(names):
        part = taken[k * each : (k + 1) * each]
        pixels = np.stack([image.transpose(2, 0, 1).reshape(-1) for _, image in part])
        labels = [label for label, _ in part]
        write(name, {"data": pixels, "labels": labels, "batch_label": name, "filenames": [""] * each})
    write("batches.meta", {"label_names": [f"class {k}" for k in range(10)], "num_vis": 3072})
    module.write_text(
        "import torchvision\nfrom dist_train import data\n\n\nclass Checked(torchvision.datasets.CIFAR10):\n"
        f"    train_list = {[[name, sums[name]] for name in names[:-1]]}\n"
        f"    test_list = {[[names[-1], sums[names[-1]]]]}\n"
        f"    meta = {{'filename': 'batches.meta', 'key': 'label_names', 'md5': '{sums['batches.meta']}'}}\n\n\n"
        "class CIFAR10(data.CIFAR10):\n    @classmethod\n    def torchvision_class(cls):\n        return Checked\n"
    )


def write_images(root: Path, count: int, size: int = 48) -> None:
    """A folder of images for each of two classes below `root`, PNG and JPEG by turns."""
    from PIL import Image

    for k, (photo, image) in enumerate(crops(size, count)):
        folder = root / ("temple", "flower")[photo]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k:03d}.{'png' if k % 4 < 2 else 'jpg'}")
