"""The loops that bench/gpu.py compares, their batches, and the clock that all of them call after each step."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from dist_train.data.augment import Augmentation
from dist_train.data.normalize import Normalize
from dist_train.vision.geometry import RandomCrop, RandomHorizontalFlip

COUNTED = 20  # steps whose syncs are counted, after those that are timed
Batch = tuple[Any, Any]
Batches = Callable[[], Iterator[Batch]]


class Stop(Exception):  # noqa: N818
    """The clock has seen all its steps."""


class Clock:
    """Waits for the device at the end of the first step, and at both ends of the measurement; then counts syncs, on CUDA."""

    def __init__(self, device: torch.device, warmup: int, steps: int) -> None:
        self.device, self.warmup, self.steps = device, warmup, steps
        self.total = warmup + steps + (COUNTED if device.type == "cuda" else 0)
        self.done, self.first = 0, 0.0
        self._began = time.perf_counter()
        self._from = self._to = 0.0
        self._counting = contextlib.ExitStack()
        self._seen: list[warnings.WarningMessage] = []

    def tick(self) -> None:
        """The end of a step. Raises Stop at the last one."""
        self.done += 1
        if self.done == 1:
            self.first = self._now() - self._began
        if self.done == self.warmup:
            self._from = self._now()
        if self.done == self.warmup + self.steps:
            self._to = self._now()
            if self.device.type == "cuda":
                self._seen = self._counting.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self._counting.callback(torch.cuda.set_sync_debug_mode, "default")
        if self.done >= self.total:
            self._counting.close()
            raise Stop

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rate(self) -> float:
        """Steps per second."""
        if self.done < self.total:
            raise RuntimeError(f"expected {self.total} steps, saw {self.done}")
        return self.steps / (self._to - self._from)

    def syncs_per_step(self) -> float:
        """How often a step has waited for the device."""
        return sum("synchroniz" in str(warning.message) for warning in self._seen) / COUNTED


class OneBatch(Dataset[Any]):
    """Float pictures on the device, of which every batch is the same."""

    def __init__(self, size: int, batch: int, device: torch.device) -> None:
        self.inputs = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        self.targets = torch.randint(0, 10, (batch,), device=device)

    def __len__(self) -> int:
        return 1000 * len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index % len(self.inputs)], self.targets[index % len(self.targets)]

    def read_batch(self, indices: Any) -> Batch:
        """(n, 3, size, size) float32, (n,) int64."""
        return self.inputs[: len(indices)], self.targets[: len(indices)]

    def forever(self) -> Iterator[Batch]:
        """The batch, again and again."""
        while True:
            yield self.inputs, self.targets


class Pictures(Dataset[Any]):
    """Random uint8 pictures in host memory, read by whole batches."""

    def __init__(self, size: int, count: int) -> None:
        generator = np.random.default_rng(0)
        self.inputs = torch.from_numpy(generator.integers(0, 256, (count, 3, size, size), np.uint8))
        self.targets = torch.from_numpy(generator.integers(0, 10, count))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], self.targets[index]

    def read_batch(self, indices: Any) -> Batch:
        """(n, 3, size, size) uint8, (n,) int64."""
        rows = torch.from_numpy(np.asarray(indices))
        return self.inputs[rows], self.targets[rows]


def augmented(
    data: Pictures, batch: int, device: torch.device, mean: Sequence[float], std: Sequence[float]
) -> Iterator[Batch]:
    """Batches in random order, copied from pinned memory, then cropped, flipped and normalized on the device as by dist_train."""
    size = data.inputs.shape[-1]
    augmentation = Augmentation([RandomCrop(size, padding=4), RandomHorizontalFlip()], Normalize(mean, std))
    generator, epoch = np.random.default_rng(1), 0
    while True:
        order = generator.permutation(len(data))
        for first in range(0, len(order) - batch + 1, batch):
            indices = order[first : first + batch]
            host = data.read_batch(indices)
            if device.type == "cuda":
                host = host[0].pin_memory(), host[1].pin_memory()
            moved = host[0].to(device, non_blocking=True), host[1].to(device, non_blocking=True)
            yield augmentation(moved, seed=0, epoch=epoch, indices=indices)
        epoch += 1


def from_files(
    folder: Path, size: int, batch: int, workers: int, mean: Sequence[float], std: Sequence[float]
) -> Iterator[Batch]:
    """torchvision's ImageFolder with v1 transforms behind a stock DataLoader."""
    steps = [
        transforms.RandomResizedCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    data = datasets.ImageFolder(folder, transforms.Compose(steps))
    pinned = torch.cuda.is_available()
    loader = DataLoader(
        data,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def _on(device: torch.device, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    inputs = inputs.to(device, non_blocking=True, memory_format=torch.channels_last)
    return inputs, targets.to(device, non_blocking=True)


def raw(model: nn.Module, device: torch.device, batches: Batches, clock: Clock) -> None:
    """The loop of somebody who knows: fused optimizer, no sync, no logging."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    loss_fn = nn.CrossEntropyLoss()
    for inputs, targets in batches():
        inputs, targets = _on(device, inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        clock.tick()


def timm_form(model: nn.Module, device: torch.device, batches: Batches, clock: Clock) -> None:
    """As timm's train.py and its PrefetchLoader: the next batch travels on a stream of its own, and each step reads its loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    loss_fn, total = nn.CrossEntropyLoss(), 0.0
    optimizer.zero_grad()
    for inputs, targets in _prefetched(batches(), device):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        clock.tick()


def _prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ready: Batch | None = None
    for inputs, targets in batches:
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            coming = _on(device, inputs, targets)
        if ready is not None:
            yield ready
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        ready = coming


def lightning(model: nn.Module, device: torch.device, batches: Batches, clock: Clock) -> None:
    """Lightning's Trainer without logger, bar and checkpoints, on an iterable of batches."""
    import lightning as L  # noqa: N812

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = model, nn.CrossEntropyLoss()

        def training_step(self, batch: Batch, index: int) -> Tensor:
            inputs, targets = batch
            loss: Tensor = self.loss_fn(self.model(inputs.to(memory_format=torch.channels_last)), targets)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, fused=device.type == "cuda")

    class Ticks(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            try:
                clock.tick()
            except Stop:
                trainer.should_stop = True

    class Endless(torch.utils.data.IterableDataset[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            return batches()

    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision="bf16-mixed", max_steps=-1, max_epochs=-1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Ticks()],
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(Endless(), batch_size=None))
