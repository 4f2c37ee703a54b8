"""torchvision's small datasets, read by batches: beside torchvision's own classes, on files in their formats."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor
from torch.utils.data import Subset
from torchvision import datasets, transforms

from dist_train import data
from dist_train.building.prepare import build_dataset
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.config.schema import DataConfig
from dist_train.data import RandomSplit
from dist_train.data.reading import LoaderOptions, batch_reader
from dist_train.data.weighting import sampling_weights

FIXED = {
    "model": {"_target_": "torch.nn.Flatten"},
    "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"_target_": "torch.optim.SGD"},
}
RANDOM = np.random.RandomState(0)


def write_cifar(root: Path, kind: Any, each: int = 12) -> dict[str, Any]:
    """Files of torchvision's CIFAR class below `root`; returns the class's lists with their checksums."""
    fine, classes = ("fine_", 100) if kind is datasets.CIFAR100 else ("", 10)

    def write(name: str, content: dict[str, Any]) -> str:
        file = root / kind.base_folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(content))
        return hashlib.md5(file.read_bytes()).hexdigest()

    def part() -> dict[str, Any]:
        pixels = RANDOM.randint(0, 256, (each, 3072)).astype(np.uint8)
        return {"data": pixels, f"{fine}labels": [k % classes for k in range(each)]}

    lists = {
        key: [[name, write(name, part())] for name, _ in getattr(kind, key)] for key in ("train_list", "test_list")
    }
    name, key = kind.meta["filename"], kind.meta["key"]
    md5 = write(name, {key: [f"class {k}" for k in range(classes)]})
    return {**lists, "meta": {"filename": name, "key": key, "md5": md5}}


def write_mnist(root: Path, kind: Any) -> dict[str, Any]:
    folder = root / kind.__name__ / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 12)):
        for name, shape, most in (("images-idx3", (count, 28, 28), 256), ("labels-idx1", (count,), 10)):
            values = RANDOM.randint(0, most, shape).astype(np.uint8)
            head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(head + values.tobytes())
    return {}


def write_svhn(root: Path, kind: Any) -> dict[str, Any]:
    entries = {}
    for part, count in (("train", 30), ("test", 12), ("extra", 8)):
        url, name, _ = kind.split_list[part]
        pixels = RANDOM.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        savemat(root / name, {"X": pixels, "y": 1 + np.arange(count)[:, None] % 10})
        entries[part] = [url, name, hashlib.md5((root / name).read_bytes()).hexdigest()]
    return {"split_list": entries}


KINDS = {
    "CIFAR10": (write_cifar, (3, 32, 32)),
    "CIFAR100": (write_cifar, (3, 32, 32)),
    "MNIST": (write_mnist, (1, 28, 28)),
    "FashionMNIST": (write_mnist, (1, 28, 28)),
    "SVHN": (write_svhn, (3, 32, 32)),
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`files(name)` writes a dataset's files; returns our class and torchvision's, which knows their checksums."""

    def make(name: str) -> tuple[Any, Any]:
        theirs = getattr(datasets, name)
        for key, value in KINDS[name][0](tmp_path, theirs).items():
            monkeypatch.setattr(theirs, key, value)
        return getattr(data, name), theirs

    return make


@pytest.mark.parametrize("name", KINDS)
def test_items_and_batches_are_those_of_torchvisions_class(name: str, files: Any, tmp_path: Path) -> None:
    ours, theirs = files(name)
    for part in ("train", "test", "extra") if name == "SVHN" else (True, False):
        mine, other = ours(str(tmp_path), part), theirs(str(tmp_path), part, transform=transforms.PILToTensor())
        assert len(mine) == len(other) > 0
        items = [mine[k] for k in range(len(mine))]
        for (image, label), (pixels, number) in zip(items, other, strict=True):
            assert torch.equal(image, pixels)
            assert (label.dtype, label.item(), image.shape) == (torch.int64, number, KINDS[name][1])
        indices = np.array([5, 0, len(mine) - 1, 5])
        images, labels = batch_reader(mine)(indices)  # type: ignore[misc]
        assert torch.equal(images, torch.stack([items[k][0] for k in indices]))
        assert torch.equal(labels, torch.stack([items[k][1] for k in indices]))
        assert images.is_contiguous()
        told = other.labels if name == "SVHN" else other.targets
        assert type(mine.targets) is type(told)
        assert list(mine.targets) == list(told)
        if name == "SVHN":
            assert mine.labels is mine.targets
        else:
            assert (mine.classes, mine.class_to_idx) == (other.classes, other.class_to_idx)


@pytest.mark.parametrize("name", KINDS)
def test_with_transforms_items_are_exactly_torchvisions(name: str, files: Any, tmp_path: Path) -> None:
    ours, theirs = files(name)
    seen: list[Any] = []
    first = transforms.Compose(
        [lambda image: seen.append((type(image), image.mode)) or image, transforms.RandomCrop(20)]
    )
    pair = [
        kind(tmp_path, transform=first, target_transform=lambda label: (type(label), -label)) for kind in (ours, theirs)
    ]
    assert batch_reader(pair[0]) is None, "PIL gets each image by itself"
    for k in (0, 7):
        (mine, label), (other, expected) = (torch.manual_seed(k) and dataset[k] for dataset in pair)
        assert (mine.tobytes(), mine.size, label) == (other.tobytes(), other.size, expected)
    assert seen[0::2] == seen[1::2]
    again = pickle.loads(pickle.dumps(ours(tmp_path)))  # as spawned workers get it
    assert all(map(torch.equal, again[3], ours(tmp_path)[3]))
    only_labels = ours(tmp_path, target_transform=lambda label: -label)
    assert (type(only_labels[3][0]), only_labels[3][1]) == (Tensor, -int(only_labels.targets[3]))
    assert batch_reader(only_labels) is None


def test_the_pixels_are_read_once_and_freed_with_the_last_dataset(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = files("CIFAR10")
    reads: list[bool] = []
    load = theirs.__init__
    monkeypatch.setattr(
        theirs, "__init__", lambda self, *args, **more: reads.append(args[1]) or load(self, *args, **more)
    )
    monkeypatch.chdir(tmp_path)
    train, val = (RandomSplit(ours(root), split, parts=[0.8, 0.2], stratify=True) for root, split in (
        (str(tmp_path), "train"), (".", "val")))  # fmt: skip
    test = ours(tmp_path, train=False)
    assert reads == [True, False]
    assert np.shares_memory(train.dataset.inputs, val.dataset.inputs)
    read = batch_reader(train)
    assert read is not None, "through a split, too"
    assert torch.equal(read(np.arange(4))[0], torch.stack([train[k][0] for k in range(4)]))
    read(np.arange(4))[0].fill_(0)
    train[0][0].fill_(0)
    with pytest.raises(ValueError, match="read-only"):
        test.inputs[0] = 0
    del train, val, read
    ours(tmp_path)
    assert reads == [True, False, True], "what nobody holds is read again"


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "SVHN"])
def test_items_follow_the_targets_of_their_own_dataset(name: str, files: Any, tmp_path: Path) -> None:
    ours, _ = files(name)
    clean, noisy = ours(tmp_path), ours(tmp_path)
    before = int(clean.targets[4])
    noisy.targets[4] = (before + 1) % 10
    for dataset, label in ((clean, before), (noisy, (before + 1) % 10)):
        assert dataset[4][1] == label
        assert dataset.read_batch(np.array([4]))[1].tolist() == [label]
        assert batch_reader(Subset(dataset, [4]))(np.array([0]))[1].tolist() == [label]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["CIFAR100", "FashionMNIST", "SVHN"])
def test_balanced_weights_follow_the_labels_that_are_known(name: str, files: Any, tmp_path: Path) -> None:
    ours, theirs = files(name)
    split = RandomSplit(ours(tmp_path), "train", parts=[0.7, 0.3])
    other = theirs(tmp_path)
    labels = np.asarray(other.labels if name == "SVHN" else other.targets)[np.asarray(split.indices)]
    options = LoaderOptions(DataConfig(train=object(), weights="balanced"), 0, torch.device("cpu"))
    weights = sampling_weights(split, options)
    assert weights is not None
    assert weights.origin.endswith("by its labels"), "without reading the samples"
    np.testing.assert_allclose(
        np.diff(weights.cumulative, prepend=0), [1 / np.sum(labels == label) for label in labels]
    )


def test_pixels_are_replaced_as_inputs_and_not_as_torchvisions_data(files: Any, tmp_path: Path) -> None:
    kind, _ = files("CIFAR10")
    ours = kind(tmp_path)
    for other in (lambda: ours.data, lambda: setattr(ours, "data", ours.inputs)):
        with pytest.raises(AttributeError, match="CIFAR10 has no `data`: its pixels are `inputs`"):
            other()
    ours.inputs, ours.targets = 255 - ours.inputs[:2], [7, 8]
    pixels, labels = ours.read_batch(np.arange(len(ours)))
    assert len(ours) == 2
    assert labels.tolist() == [7, 8]
    assert torch.equal(pixels[1], 255 - kind(tmp_path)[1][0])
    assert torch.equal(pixels[1], ours[1][0])


def test_missing_files_are_named_with_their_place(tmp_path: Path) -> None:
    made = {"_target_": "dist_train.data.CIFAR10", "root": str(tmp_path)}
    config = load_config({**FIXED, "data": {"train": {"_target_": "torch.utils.data.Subset", "_args_": [made, [0]]}}})
    with pytest.raises(ConfigError, match=r"CIFAR10 has no data in .* expected 6 files .*data_batch_1.*download: true"):
        build_dataset(config, "train")


def test_files_that_are_missing_or_changed_are_refused_by_torchvision(files: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        data.CIFAR100(tmp_path)
    ours, _ = files("CIFAR10")
    with (tmp_path / "cifar-10-batches-py/test_batch").open("ab") as file:
        file.write(b"x")
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        ours(tmp_path, train=False)
