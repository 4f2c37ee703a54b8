"""Whether pictures as uint8 train as well as floats did: the augmentation of configs/cifar10_resnet18.yaml, three ways.

    python bench/accuracy.py                 # a few minutes on one core; the table goes to stdout
    python bench/accuracy.py --seeds 1 --epochs 2

Scikit-learn's digits, enlarged to 32x32 and colored, by a small CNN. The inputs are

    uint8        uint8 to the device; shifted and flipped as pixels, `data.normalize`, random erasing (the recipe as it is)
    floats       torchvision's ToTensor and Normalize for each sample, then shift, flip and erasing on floats (as it was)
    torchvision  RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize, RandomErasing for each sample

Each seed trains all three from the same weights on the same order of samples; `uint8` and `floats` draw the same numbers, and
differ in what is shifted in: black, as in torchvision's crop, instead of the mean color.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from overhead import PACKAGES
from rounds import hardware, versions

from dist_train import train
from dist_train.data import Digits

RECIPE = yaml.safe_load((Path(__file__).parent.parent / "configs" / "cifar10_resnet18.yaml").read_text())["data"]
KINDS = ("uint8", "floats", "torchvision")
TINTS = np.array([1.0, 0.8, 0.6])[:, None, None]


def write(folder: Path) -> None:
    """Each split as uint8, (N, 3, 32, 32) in NAME.npy and (N, 32, 32, 3) in NAME-images.npy, and its labels."""
    for split in ("train", "val", "test"):
        digits = Digits(split)
        large = np.kron(np.asarray(digits.inputs), np.ones((4, 4))) * 255 * TINTS
        pixels = large.round().astype(np.uint8)
        np.save(folder / f"{split}.npy", pixels)
        np.save(folder / f"{split}-images.npy", pixels.transpose(0, 2, 3, 1))
        np.save(folder / f"{split}-labels.npy", np.asarray(digits.targets))


def transform(kind: str, split: str) -> dict[str, Any]:
    """torchvision's, for each sample."""
    made = "torchvision.transforms"
    steps: list[dict[str, Any]] = [
        {"_target_": f"{made}.ToTensor"},
        {"_target_": f"{made}.Normalize", **RECIPE["normalize"]},
    ]
    if kind == "torchvision" and split == "train":
        shift, _, erasing = RECIPE["augment"]
        crop = {"_target_": f"{made}.RandomCrop", "size": 32, "padding": shift["pixels"]}
        flip = {"_target_": f"{made}.RandomHorizontalFlip"}
        steps = [crop, flip, *steps, {"_target_": f"{made}.RandomErasing", "p": erasing["p"]}]
    return {"_target_": f"{made}.Compose", "transforms": steps}


def config(kind: str, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """One run."""

    def dataset(split: str) -> dict[str, Any]:
        name = split if kind == "uint8" else f"{split}-images"
        given = {"inputs": str(folder / f"{name}.npy"), "targets": str(folder / f"{split}-labels.npy")}
        more = {} if kind == "uint8" else {"as_image": True, "transform": transform(kind, split)}
        return {"_target_": "dist_train.data.Arrays", **given, **more}

    def block(channels: int, more: int) -> list[dict[str, Any]]:
        convolution = {"_target_": "torch.nn.Conv2d", "_args_": [channels, more, 3, 2, 1], "bias": False}
        return [convolution, {"_target_": "torch.nn.BatchNorm2d", "_args_": [more]}, {"_target_": "torch.nn.ReLU"}]

    pool, flat = {"_target_": "torch.nn.AdaptiveAvgPool2d", "_args_": [2]}, {"_target_": "torch.nn.Flatten"}
    head = {"_target_": "torch.nn.Linear", "_args_": [256, 10]}
    layers = [*block(3, 32), *block(32, 64), *block(64, 64), pool, flat, head]
    data = {split: dataset(split) for split in ("train", "val", "test")}
    return {
        "seed": seed,
        "run": {"dir": str(folder / "runs"), "name": f"{kind}-{seed}"},
        "data": {
            **data, "global_batch_size": 64, "num_workers": 0,
            "augment": [] if kind == "torchvision" else RECIPE["augment"],
            **({"normalize": RECIPE["normalize"]} if kind == "uint8" else {}),
        },
        "model": {"_target_": "torch.nn.Sequential", "_args_": layers},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1},
        "metrics": ["accuracy"],
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        "scheduler": {
            "_target_": "dist_train.schedules.WarmupCosine", "total_steps": "total_steps", "warmup_steps": 20, "every": "1step",
        },
        "trainer": {"duration": f"{epochs}ep", "evaluate_every": None},
        "checkpoint": {"every": f"{epochs}ep", "keep_best": None},
        "tracking": {"tensorboard": False, "report": False},
    }  # fmt: skip


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seconds = dict.fromkeys(KINDS, 0.0)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        for seed in range(options.seeds):
            for kind in KINDS:
                began = time.perf_counter()
                metrics = train(config(kind, seed, options.epochs, Path(name)))["metrics"]
                seconds[kind] += time.perf_counter() - began
                # of all images that weren't trained on
                right = sum(metrics[split]["accuracy"] * metrics[split]["eval_samples"] for split in ("val", "test"))
                found[kind].append(right / sum(metrics[split]["eval_samples"] for split in ("val", "test")))
    print(f"{hardware()}; {versions(PACKAGES)}; {options.seeds} seeds, {options.epochs} epochs\n")
    print("| input | accuracy of each seed | mean | standard deviation | difference to floats, paired | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for kind, values in found.items():
        differences = [a - b for a, b in zip(values, found["floats"], strict=True)]
        several = len(values) > 1
        spread = f"{stdev(values):.4f}" if several else ""
        paired = f"{mean(differences):+.4f} +- {stdev(differences) / len(values) ** 0.5:.4f}" if several else ""
        print(
            f"| {kind} | {', '.join(f'{value:.4f}' for value in values)} | {mean(values):.4f} | {spread} | {paired} "
            f"| {seconds[kind]:.0f} |"
        )


if __name__ == "__main__":
    main()
