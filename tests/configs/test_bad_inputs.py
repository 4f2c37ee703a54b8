"""Bad files, columns, shapes, labels, layers and sizes: each is answered with what is expected and what was found.

`early` ones end before anything is written (exit code 2); the others are seen on the first batch that has them.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import torch
import yaml
from runs import CONFIGS

from dist_train.config.errors import ConfigError
from dist_train.run.api import train

LINEAR: dict[str, Any] = {"_target_": "dist_train.models.MLP", "in_features": 4, "hidden": [], "out_features": 3}


def base(**changes: Any) -> dict[str, Any]:
    """A config that is right, with other values at dotted keys (`__` for a dot)."""
    config: dict[str, Any] = {
        "run": {"name": "bad", "code_paths": ["."]},
        "data": {"train": {"_target_": "own.Rows"}, "global_batch_size": 16},
        "model": LINEAR,
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "2step"},
        "tracking": {"tensorboard": False, "report": False},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = config
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return config


def rows(**arguments: Any) -> dict[str, Any]:
    return {"_target_": "own.Rows", **arguments}


def arrays(**arguments: Any) -> dict[str, Any]:
    return base(data__train={"_target_": "dist_train.data.Arrays", **arguments})


def table(path: str, target: str = "y", **arguments: Any) -> dict[str, Any]:
    return base(data__train={"_target_": "dist_train.data.CSV", "path": path, "target": target, **arguments})


def split(**arguments: Any) -> dict[str, Any]:
    spec = {"_target_": "dist_train.data.RandomSplit", "dataset": rows(), "split": "train", **arguments}
    return base(data__train=spec)


def folder_of(root: str) -> dict[str, Any]:
    return base(data__train={"_target_": "torchvision.datasets.ImageFolder", "root": root})


def loss(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"torch.nn.{name}", **arguments}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    shutil.copy(Path(__file__).parent / "programs" / "own.py", folder)
    np.save(folder / "x.npy", np.zeros((8, 4), np.float32))
    np.save(folder / "y.npy", np.zeros(7, np.int64))
    np.save(folder / "none.npy", np.zeros((0, 4), np.float32))
    np.save(folder / "objects.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    np.savez(folder / "other.npz", images=np.zeros((8, 4)))
    (folder / "broken.npy").write_bytes(b"\x93NUMPY and no more")
    (folder / "x.csv.txt").write_text("")
    for name, text in {
        "empty": "", "header": "a,y\n", "ragged": "a,y\n1,2\n3\n", "words": "a,y\n1,2\nred,3\n", "gap": "a,y\n1,2\n,3\n",
        "double": "a,a,y\n1,2,3\n", "semicolon": "a;y\n1;2\n", "labels": "a,y\n1,cat\n2,dog\n", "bird": "a,y\n1,bird\n",
        "infinite": "a,y\n1,inf\n", "quote": 'a,y\n"1,2\n',
    }.items():  # fmt: skip
        (folder / f"{name}.csv").write_text(text)
    (folder / "latin.csv").write_bytes("a,y\n\xe9,2\n".encode("latin-1"))
    (folder / "flat").mkdir()
    (folder / "hollow" / "cat").mkdir(parents=True)
    small_data.write_images(folder / "images", 20)
    small_data.write_images(folder / "spoiled", 16)
    (folder / "spoiled/flower/0.png").write_bytes(b"\x89PNG and no more")
    torch.save({"layers.1.weight": torch.zeros(7, 4)}, folder / "other.pt")
    return folder


CIFAR = {"_target_": "torchvision.datasets.CIFAR10", "root": "flat"}
HEAD = {"at": "layers.9", "classes": 2}
LAST = {"_target_": "torch.nn.Linear", "in_features": 5, "out_features": 2}
EARLY: list[tuple[dict[str, Any], str]] = [
    # files
    (arrays(inputs="nowhere.npy"), "data.train: Arrays: inputs: no file nowhere.npy (looked in "),
    (arrays(inputs="x.csv.txt"), "expected a .npy, .npz or .pt file, found x.csv.txt"),
    (arrays(inputs="broken.npy"), "Arrays: inputs: broken.npy can't be read"),
    (arrays(inputs="objects.npy"), "Arrays: inputs: objects.npy can't be read"),
    (arrays(inputs="other.npz"), "other.npz holds no 'inputs'; it holds 'images'"),
    (arrays(inputs="x.npy", targets="y.npy"), "expected a target for each input, found 8 inputs and 7 targets"),
    (arrays(inputs="none.npy"), "data.train: Arrays has no samples; expected at least 1"),
    (folder_of("nowhere"), "data.train: ImageFolder has no data in"),
    (folder_of("flat"), "Couldn't find any class folder in flat"),
    (folder_of("hollow"), "Found no valid file for the classes cat"),
    (base(data__train=CIFAR), "CIFAR10 has no data in"),
    # tables
    (table("nowhere.csv"), "CSV: no file nowhere.csv (looked in "),
    (table("empty.csv"), "empty.csv is empty; expected a first line with the names of the columns"),
    (table("header.csv"), "CSV: header.csv: no row remains for training"),
    (table("ragged.csv"), "ragged.csv line 3: expected 2 columns as in the header, found 1"),
    (table("words.csv"), "words.csv line 3, column 'a': expected a number, found 'red'"),
    (table("gap.csv"), "gap.csv line 3, column 'a': no value"),
    (table("double.csv"), "double.csv line 1: column 'a' occurs more than once"),
    (table("semicolon.csv"), "semicolon.csv has no column 'y'"),
    (table("infinite.csv"), "infinite.csv line 2, column 'y': expected a number, found 'inf'"),
    (table("latin.csv"), "latin.csv: expected UTF-8 text"),
    (table("quote.csv"), "quote.csv line 2: unexpected end of data"),
    (table("words.csv", "yy"), "words.csv has no column 'yy'; it has a, y; did you mean y?"),
    (table("words.csv", ignore=["a"]), "words.csv: no feature remains of the columns a, y"),
    (table("words.csv", kind="ranking"), "expected kind to be regression or classification, found 'ranking'"),
    (table("words.csv", missing="zero"), "expected missing to be error, drop or mean, found 'zero'"),
    (table("words.csv", standardize=True), "give train_path, the file that holds them"),
    (table("bird.csv", kind="classification", train_path="labels.csv"), "class 'bird' is in no training row; known are cat"),
    # splits and sizes
    (split(parts=[0.9, 0.3]), "fractions of a split must sum to at most 1, found [0.9, 0.3]"),
    (split(parts=[60, 20]), "a split asks for 80 samples of [60, 20], but the dataset has 64"),
    (split(parts=[1.0], split="val"), "RandomSplit: no sample remains for val"),
    (split(split="training"), "expected split to be one of train, val, test, found 'training'"),
    (base(data__train={"_target_": "dist_train.data.Digits", "split": "valid"}), "one of train, val, test, found 'valid'"),
    (base(data__train={"_target_": "dist_train.data.Gaussians", "samples": 0}), "samples and dimensions must be at least 1"),
    (base(data__train=rows(count=0)), "data.train: Rows has no samples; expected at least 1"),
    (base(data__train=rows(count=10)), "10 samples"),
    (base(data__val=rows(count=0)), "data.val: expected at least 1 sample, found 0"),
    (base(data__train={"_target_": "own.Endless"}), "expected a dataset, with __getitem__ and __len__"),
    (base(data__train={"_target_": "own.Stream"}), "set data.steps_per_epoch"),
    # models
    (base(model={**LINEAR, "activation": "swoosh"}), "expected activation to be one of relu"),
    (base(model={"_target_": "torchvision.models.vgg16", "num_class": 3}), "unexpected keyword argument 'num_class'"),
    (base(transfer={"head": HEAD}), "MLP has no layer 'layers.9'; names look like layers"),
    (base(transfer={"head": {"at": "layers.0", "classes": 2}}), "expected a Linear or Conv2d layer, but layers.0 is a Flatten"),
    (base(transfer={"append": {"at": "layers", "name": "x", "module": LAST}}), "has 3 outputs, but this takes 5 inputs"),
    (base(transfer={"freeze": "layer.*"}), "layer.* matches no parameter of MLP; names look like layers.1"),
    (base(transfer={"weights": "other.pt"}), "0 of the model's 2 tensors match one in other.pt"),
    (base(optimizer__groups=[{"match": "head.*"}]), "head.* matches no parameter of MLP; names look like"),
    # augmentation
    (base(data__augment=[{"_target_": "dist_train.data.RandomErasing", "p": 2}]), "expected p between 0 and 1, found 2"),
    (base(data__augment=[{"_target_": "dist_train.data.Mixup", "classes": 1}]), "alpha > 0 and classes >= 2, found 0.2 and 1"),
    (base(data__augment=[{"_target_": "dist_train.data.OneOf", "augments": []}]), "at least one augmentation, found none"),
    (base(data__augment=[{"_target_": "dist_train.data.RandomShift", "pixels": -1}]), "expected pixels >= 0, found -1"),
    # evaluation
    (
        base(loss=loss("L1Loss"), model={**LINEAR, "out_features": 1}, metrics=["accuracy"], data__val=rows()),
        "metric accuracy expects outputs of shape (N, classes), got (64, 1)",
    ),
]  # fmt: skip
LATE: list[tuple[dict[str, Any], str]] = [
    (base(data__train=rows(label=3)), "has 3 outputs, so labels must be 0 to 2, but this batch's labels range from 3 to 3"),
    (base(data__train=rows(label=-1)), "labels must be 0 to 2, but this batch's labels range from -1 to -1"),
    (base(data__train=rows(label=1.5)), "expects targets that are class numbers"),
    (base(data__train=rows(kind="text")), "expects the targets as one tensor, but found a tuple; for words as labels"),
    (base(data__train=rows(kind="triple")), "a batch of (inputs, target) was expected, but the dataset's samples collate to"),
    (base(data__train=rows(kind="alone")), "a batch of (inputs, target) was expected, but the dataset's samples collate to"),
    (base(data__train=rows(kind="ragged")), "samples must be alike (resize, pad), and hold tensors"),
    (base(data__train=rows(odd=5), data__shuffle=False), "reading sample 5 of own.Rows in epoch 0 failed: OSError"),
    (folder_of("images"), "making a batch of samples"),
    (folder_of("spoiled"), "reading sample 0 of torchvision.datasets.folder.ImageFolder in epoch 0 failed"),
    (base(data__train=rows(width=5)), "mat1 and mat2 shapes cannot be multiplied (16x5 and 4x3)"),
    (base(loss=loss("MSELoss")), "MSELoss compares outputs and targets element by element"),
    (base(loss=loss("BCELoss"), model={**LINEAR, "out_features": 1}), "BCELoss expects targets between 0 and 1"),
    (
        base(loss=loss("BCELoss"), model={**LINEAR, "out_features": 1}, data__train=rows(label=1.0)),
        "BCELoss expects outputs between 0 and 1, but they range from",
    ),
    (
        base(data__augment=[{"_target_": "dist_train.data.RandomShift", "pixels": 1}]),
        "RandomShift needs images (N, C, H, W), found a batch of shape (16, 4)",
    ),
]  # fmt: skip


def fails(folder: Path, config: dict[str, Any]) -> tuple[BaseException, str]:
    """What training by a config is refused with, and the name of its file and run."""
    name = f"bad{len(list(folder.glob('bad*.yaml')))}"
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    with contextlib.chdir(folder), pytest.raises(Exception) as caught:
        train(path.name, f"run.name={name}")
    return caught.value, name


def test_the_config_that_these_are_made_of_is_right(folder: Path) -> None:
    (folder / "good.yaml").write_text(yaml.safe_dump(base()))
    with contextlib.chdir(folder):
        assert train("good.yaml", "run.name=good")["step"] == 2
    assert len(EARLY) + len(LATE) > 60
    assert CONFIGS.is_dir()


@pytest.mark.parametrize(("config", "answer"), EARLY, ids=[answer[:60] for _, answer in EARLY])
def test_a_bad_input_is_answered_before_anything_starts(folder: Path, config: dict[str, Any], answer: str) -> None:
    error, name = fails(folder, config)
    assert isinstance(error, ConfigError), repr(error)
    assert answer in str(error)
    assert f"{name}.yaml:" in str(error), "with the line of its key"
    assert not (folder / "runs" / name).exists()


@pytest.mark.parametrize(("config", "answer"), LATE, ids=[answer[:60] for _, answer in LATE])
def test_a_bad_input_is_answered_when_it_is_met(folder: Path, config: dict[str, Any], answer: str) -> None:
    assert answer in str(fails(folder, config)[0])
