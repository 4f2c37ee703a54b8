"""Pictures that travel as uint8 train, evaluate and predict in the bits of those that torchvision's transforms make floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import CONFIGS, ROOT, result, rows

from dist_train import train
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.data import Digits
from dist_train.main import main
from dist_train.views.collect import sample_picture

MEAN, STD = [0.5, 0.4, 0.45], [0.25, 0.2, 0.3]
AFTER = {"_target_": "torchvision.transforms.Normalize", "mean": MEAN, "std": STD}
TRANSFORM = {
    "_target_": "torchvision.transforms.Compose",
    "transforms": [{"_target_": "torchvision.transforms.ToTensor"}, AFTER],
}
PIXELS = {"normalize": {"mean": MEAN, "std": STD}}
QUIET = {"tensorboard": False, "report": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in three colors, (N, H, W, 3) for PIL and (N, 3, H, W)."""
    folder = tmp_path_factory.mktemp("pixels")
    for split in ("train", "val"):
        digits = Digits(split)
        gray = (digits.inputs * 255).byte().repeat_interleave(2, 2).repeat_interleave(2, 3)
        images = torch.cat([gray, 255 - gray, gray // 2], 1)[:96]
        np.save(folder / f"{split}-pixels.npy", images.numpy())
        np.save(folder / f"{split}-images.npy", images.permute(0, 2, 3, 1).contiguous().numpy())
        np.save(folder / f"{split}-labels.npy", np.asarray(digits.targets)[:96])
    return folder


def config(folder: Path, name: str, *, floats: bool, **data: Any) -> dict[str, Any]:
    """A small CNN with augmentation, on uint8 pictures with data.normalize, or on PIL images with torchvision's transforms."""

    def dataset(split: str) -> dict[str, Any]:
        kind = "images" if floats else "pixels"
        given = {"inputs": f"{folder}/{split}-{kind}.npy", "targets": f"{folder}/{split}-labels.npy"}
        more = {"as_image": True, "transform": TRANSFORM} if floats else {}
        return {"_target_": "dist_train.data.Arrays", **given, **more}

    return {
        "run": {"dir": str(folder / "runs"), "name": name},
        "data": {
            "train": dataset("train"), "val": dataset("val"), "global_batch_size": 16, "num_workers": 0,
            "augment": [{"_target_": "dist_train.data.RandomHorizontalFlip"}, {"_target_": "dist_train.data.RandomErasing"}],
            **({} if floats else PIXELS), **data,
        },
        "model": {"_target_": "torch.nn.Sequential", "_args_": [
            {"_target_": "torch.nn.Conv2d", "_args_": [3, 4, 3]}, {"_target_": "torch.nn.ReLU"},
            {"_target_": "torch.nn.Flatten"}, {"_target_": "torch.nn.Linear", "_args_": [784, 10]},
        ]},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"}, "metrics": ["accuracy"],
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "2ep", "log_every": "1step"}, "tracking": QUIET,
    }  # fmt: skip


@pytest.mark.parametrize("data", [{}, {"augment": []}], ids=["augmented", "plain"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_run_on_uint8_is_the_run_on_torchvisions_floats_to_the_bit(
    folder: Path, data: dict[str, Any], channels_last: bool
) -> None:
    runs = []
    for floats in (False, True):
        name = f"{floats}-{len(data)}-{channels_last}"
        described = config(folder, name, floats=floats, **data)
        described["trainer"]["channels_last"] = channels_last
        train(described)
        runs.append(folder / "runs" / name)
    pixels, floating = map(result, runs)
    assert pixels["weights_sha256"] == floating["weights_sha256"]
    assert pixels["metrics"] == floating["metrics"]
    assert [row["loss"] for row in rows(runs[0], "train")] == [row["loss"] for row in rows(runs[1], "train")]
    answers = []
    for run in runs:
        for command in ("evaluate", "predict"):
            out = run / f"{command}.{'json' if command == 'evaluate' else 'csv'}"
            assert main([command, "--run", str(run), "--split", "val", "--output", str(out)]) == 0
        answers.append((run / "predict.csv").read_bytes())
        measured = json.loads((run / "evaluate.json").read_text())
        assert measured["metrics"] == pixels["metrics"]["val"]
    assert answers[0] == answers[1]


def test_a_report_and_pictures_in_tensorboard_are_made_of_uint8(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    described = config(folder, "shown", floats=False)
    described["tracking"] = {"images": {"every": "1ep", "modules": ["0"]}, "graph": True}
    described["debug"] = {"layers": True}
    train(described)
    assert "confusion" in (folder / "runs/shown/report.html").read_text()
    events = EventAccumulator(str(folder / "runs/shown/tensorboard"))
    events.Reload()
    assert {"inputs", "features/0/0"} <= set(events.Tags()["images"])
    assert events.Tags()["graph"]
    capsys.readouterr()
    for command in ("predict", "evaluate"):
        arguments = ["--run", str(folder / "runs/shown"), "--split", "val", "--output", str(folder / "no")]
        assert main([command, *arguments, f"data.val.inputs={folder}/val-images.npy"]) == 2
        assert "uint8 (1, 16, 16, 3); channels come first" in capsys.readouterr().err
    assert not (folder / "no").exists()


def test_the_comparison_of_accuracy_follows_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import accuracy

    recipe = load_config(CONFIGS / "cifar10_resnet18.yaml").data
    for kind in accuracy.KINDS:
        data = load_config(accuracy.config(kind, 0, 1, folder)).data
        assert (data.normalize == recipe.normalize) == (kind == "uint8")
        assert (data.augment == recipe.augment) == (kind != "torchvision")


def test_a_report_shows_the_pixels_of_tensors_and_of_arrays_alike() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    for image in (pixels, torch.from_numpy(pixels), {"image": pixels, "age": np.float32(3)}):
        for sample in (image, (image, 1)):
            shown = sample_picture(0, [sample], 0)
            assert np.array_equal(shown, pixels.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"normalize": {"mean": [0.5] * 4, "std": 1}},
            "data.normalize: mean and std are for 4 channels, but the pictures",
        ),
        (
            {"normalize": {"mean": [120, 110, 100], "std": 60}},
            "data.normalize.mean: expected numbers for pixels in [0, 1]",
        ),
        ({"collate": {"_target_": "dist_train.data.collate_lists"}}, "data.normalize: expected pictures (N, channels"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_data_normalize_does_not_fit_is_refused_before_anything_is_written(
    folder: Path, change: dict[str, Any], message: str, split: str
) -> None:
    described = config(folder, "refused", floats=False, augment=[], **change)
    if split == "train":
        described["data"]["val"] = None
    else:  # training images that fit, so that only those of the evaluation don't
        channels = len(change.get("normalize", PIXELS["normalize"])["mean"])
        np.save(folder / "floats.npy", np.zeros((96, channels, 16, 16), np.float32))
        described["data"]["train"]["inputs"] = f"{folder}/floats.npy"
    with pytest.raises(ConfigError) as caught:
        train(described)
    assert message in str(caught.value)
    assert not (folder / "runs/refused").exists()


def test_floats_that_a_transform_has_normalized_already_are_pointed_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for floats, warned in ((True, True), (False, False)):
        described = config(folder, f"twice-{floats}", floats=floats, **PIXELS)
        train({**described, "trainer": {"duration": "1step", "evaluate_every": None}})
        printed = "".join(capsys.readouterr())
        assert ("data.normalize: the pictures of data.train are floats from -" in printed) == warned


def test_uint8_without_data_normalize_is_answered_with_the_key(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dist_train.watch.failure import hint

    described = config(folder, "bytes", floats=False, normalize=None, augment=[], val=None)
    with pytest.raises(RuntimeError) as caught:
        train(described)
    assert "data.normalize" in hint(f"RuntimeError: {caught.value}")
