"""Steps per second on one GPU: dist_train and a carefully hand-written loop, interleaved in one process.

    python bench/gpu.py            # about two minutes; a table goes to stdout

Both train on the same synthetic images, one tensor in host memory, which reach the GPU through a stock DataLoader (raw loop)
or through dist_train's loader; bf16 autocast, channels_last, fused SGD. dist_train runs with all defaults, except for saving
after each epoch of 16 steps, and checks every step for inf and nan. Reported are the medians of the rounds' ratios.
"""

from __future__ import annotations

import platform
import tempfile
import time
from statistics import median
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dist_train
from dist_train.callbacks import Callback

WARMUP, ROUNDS = 200, 3
CASES = {  # name: model, image size, batch, steps
    "ResNet-18, 32x32, batch 128": ("resnet18", 32, 128, 800),
    "ResNet-50, 224x224, batch 128": ("resnet50", 224, 128, 320),
}


class Clock(Callback):
    """Measures steps per second after the warm-up, synchronizing with the device at both ends."""

    def __init__(self) -> None:
        self.began = self.rate = 0.0

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step == WARMUP:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

    def on_end(self, trainer: Any) -> None:
        torch.cuda.synchronize()
        self.rate = (trainer.step - WARMUP) / (time.perf_counter() - self.began)


def raw(name: str, data: TensorDataset, batch: int, steps: int) -> float:
    """The hand-written loop."""
    model = getattr(torchvision.models, name)(num_classes=10).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    loss_fn = nn.CrossEntropyLoss()
    done, began = 0, 0.0
    while True:
        for inputs, targets in DataLoader(data, batch, shuffle=True, drop_last=True, pin_memory=True):
            inputs = inputs.cuda(non_blocking=True).to(memory_format=torch.channels_last)
            targets = targets.cuda(non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            done += 1
            if done == WARMUP:
                torch.cuda.synchronize()
                began = time.perf_counter()
            if done == steps:
                torch.cuda.synchronize()
                return (steps - WARMUP) / (time.perf_counter() - began)


def ours(name: str, data: TensorDataset, batch: int, steps: int) -> float:
    """The same training with dist_train."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        dist_train.train(
            {
                "run": {"dir": folder, "name": "bench"},
                "data": {"train": data, "global_batch_size": batch, "num_workers": 0},
                "model": {"_target_": f"torchvision.models.{name}", "num_classes": 10},
                "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
                "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9},
                "callbacks": [clock],
                "trainer": {"duration": f"{steps}step"},
                "checkpoint": {"every": "15min"},  # an epoch is only 16 steps here, half a second
            }
        )
    return clock.rate


def main() -> None:
    """Print the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| model | raw loop, steps/s | dist_train, steps/s | ratio |\n| --- | --- | --- | --- |")
    for title, (name, size, batch, steps) in CASES.items():
        images = torch.randn(2048, 3, size, size)
        data = TensorDataset(images, torch.randint(0, 10, (2048,)))
        rounds = [(raw(name, data, batch, steps), ours(name, data, batch, steps)) for _ in range(ROUNDS)]
        ratio = median(b / a for a, b in rounds)
        print(
            f"| {title} | {median(a for a, _ in rounds):.1f} | {median(b for _, b in rounds):.1f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
