from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.data import Arrays, DataError

IMAGES = np.random.RandomState(0).randint(0, 256, (12, 6, 5, 3), dtype=np.uint8)
FEATURES = np.random.RandomState(0).standard_normal((12, 4))
LABELS = np.arange(12) % 3


def twice(value: Any) -> Any:
    return 2 * value


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(form: str) -> tuple[Any, Any]:
    """Arguments of Arrays for the features and labels in a form."""
    if form == "npy":
        np.save("x.npy", FEATURES)
        np.save("y.npy", LABELS)
        return "x.npy", "y.npy"
    if form == "npz":
        np.savez("both.npz", inputs=FEATURES, targets=LABELS)
        return "both.npz", None
    if form == "dict":
        torch.save({"inputs": torch.from_numpy(FEATURES), "targets": torch.from_numpy(LABELS)}, "both.pt")
        return "both.pt", None
    if form == "pair":
        torch.save((torch.from_numpy(FEATURES), torch.from_numpy(LABELS)), "pair.pt")
        return Path("pair.pt"), None
    if form == "lists":
        return FEATURES.tolist(), LABELS.tolist()
    return FEATURES, LABELS


@pytest.mark.parametrize("form", ["npy", "npz", "dict", "pair", "lists", "arrays"])
def test_every_form_gives_the_same_samples_one_by_one_and_in_batches(form: str) -> None:
    data = Arrays(*saved(form))
    assert len(data) == 12
    x, y = data[5]
    assert x.dtype == torch.float32
    assert x.equal(torch.from_numpy(FEATURES[5]).float())
    assert int(y) == LABELS[5]
    assert data.read_batch is not None
    inputs, targets = data.read_batch(np.array([7, 0, 7]))
    assert inputs.equal(torch.from_numpy(FEATURES[[7, 0, 7]]).float())
    assert targets.equal(torch.tensor(LABELS[[7, 0, 7]]))


def test_transforms_of_torchvision_are_applied_to_images() -> None:
    from torchvision.transforms import Compose, Resize, ToTensor, v2

    data = Arrays(IMAGES, LABELS, transform=Compose([Resize((8, 8)), ToTensor()]), as_image=True)
    assert data.read_batch is None
    image, label = data[3]
    assert image.shape == (3, 8, 8)
    assert (image.dtype, int(label)) == (torch.float32, 0)
    plain = Arrays(IMAGES, LABELS, transform=v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    assert torch.allclose(plain[3][0].as_subclass(torch.Tensor), torch.from_numpy(IMAGES[3]).permute(2, 0, 1) / 255)
    assert Arrays(FEATURES, LABELS, target_transform=twice)[4][1] == 2


def test_lists_of_things_that_make_no_array_stay_lists() -> None:
    uneven = [np.ones(2), np.ones(3), np.ones(4)]
    data = Arrays(uneven, ["a", "b", "c"], transform=len)
    assert data[2] == (4, "c")
    assert data.read_batch is None


def test_inputs_alone_are_samples_for_prediction() -> None:
    data = Arrays(FEATURES)
    assert data[2].shape == (4,)
    assert data.read_batch is not None
    assert data.read_batch(np.array([1, 2])).shape == (2, 4)


def test_a_npy_file_is_memory_mapped() -> None:
    inputs, targets = saved("npy")
    assert isinstance(Arrays(inputs, targets).inputs, np.memmap)


def test_what_is_wrong_with_a_file_is_reported() -> None:
    with pytest.raises(DataError, match=rf"inputs: no file x.npy \(looked in {os.getcwd()}\)"):
        Arrays("x.npy")
    Path("x.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"expected a .npy, .npz or .pt file, found x.txt"):
        Arrays("x.txt")
    Path("torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match=r"torn.npz can't be read: BadZipFile"):
        Arrays("torn.npz")
    np.savez("names.npz", images=FEATURES)
    with pytest.raises(DataError, match=r"names.npz holds no 'inputs'; it holds 'images'"):
        Arrays("names.npz")
    with pytest.raises(DataError, match=r"a target for each input, found 12 inputs and 11 targets"):
        Arrays(FEATURES, LABELS[:-1])
    np.save("objects.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects.npy can't be read: ValueError: .*Python objects"):
        Arrays("objects.npy")
