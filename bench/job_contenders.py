"""configs/digits.yaml with other libraries, as a plain script would have it: python job_contenders.py NAME FOLDER [--epochs N].

DigitsCNN on the 1,257 digits for 20 epochs: random shifts by a pixel, label smoothing, warm-up and cosine schedule, 64 samples a
step over all processes; accuracy on val after each epoch, a checkpoint of each epoch and the best one, a row for TensorBoard
every 20 steps, and accuracy on test by the best at the end. Alone or under torchrun; Fabric and accelerate wrap the same
loop.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clock import digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
BATCH = 64 // WORLD


class Shifted(Dataset[Any]):
    """The digits, each shifted by up to a pixel in both directions."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = functional.pad(inputs.view(-1, 1, 8, 8), (1, 1, 1, 1)), targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        y, x = torch.randint(0, 3, (2,)).tolist()
        return self.inputs[index, :, y : y + 8, x : x + 8], self.targets[index]


def network() -> nn.Module:
    """dist_train.models.DigitsCNN."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(1024, 10),
    )  # fmt: skip


def scale(step: int, total: int, warmup: int = 50) -> float:
    """Of the lr, at a step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def optimizer_of(model: nn.Module, total: int) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale(step, total))


def held_out(split: str) -> DataLoader[tuple[Tensor, ...]]:
    """val or test, on every rank."""
    inputs, targets = digits(1, split)
    return DataLoader(TensorDataset(inputs.view(-1, 1, 8, 8), targets), batch_size=256)


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> float:
    """In eval mode."""
    model.eval()
    right = [(model(inputs).argmax(1) == targets).float() for inputs, targets in loader]
    model.train()
    return float(torch.cat(right).mean())


class Records:
    """What rank 0 keeps: TensorBoard's rows, a checkpoint of each epoch, the best model, and the result."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.best = folder, -1.0
        self.writer: Any = SummaryWriter(str(folder)) if RANK == 0 else None

    def step(self, step: int, loss: Tensor) -> None:
        """Every 20 steps."""
        if self.writer is not None and step % 20 == 0:
            self.writer.add_scalar("train/loss", loss.item(), step)

    def epoch(self, epoch: int, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
        """After each epoch's evaluation."""
        if self.writer is None:
            return
        self.writer.add_scalar("val/accuracy", value, step)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch},
            self.folder / f"{epoch}.pt",
        )
        if value > self.best:
            self.best = value
            torch.save(model.state_dict(), self.folder / "best.pt")

    def end(self, bare: nn.Module) -> None:
        """The test, with the best model."""
        if self.writer is None:
            return
        bare.load_state_dict(torch.load(self.folder / "best.pt", weights_only=True))
        (self.folder / "result.json").write_text(
            json.dumps({"test": accuracy(bare, held_out("test")), "val": self.best})
        )
        self.writer.close()


def loop(
    folder: Path,
    epochs: int,
    wrap: Callable[..., Any] | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> None:
    """The plain loop; `wrap(model, optimizer, loader)` gives what a library makes of them."""
    torch.manual_seed(0)
    bare, data = network(), Shifted(*digits(1))
    total = epochs * (len(data) // 64)
    optimizer, schedule = optimizer_of(bare, total)
    sampler: DistributedSampler[Any] | None = None
    net: nn.Module = bare
    if wrap is not None:
        net, stepper, loader = wrap(bare, optimizer, DataLoader(data, BATCH, shuffle=True, drop_last=True))
    else:
        stepper = optimizer
        if WORLD > 1:
            net, sampler = nn.parallel.DistributedDataParallel(bare), DistributedSampler(data)
        loader = DataLoader(data, BATCH, shuffle=sampler is None, sampler=sampler, drop_last=True)
    loss_fn, records, val, step = nn.CrossEntropyLoss(label_smoothing=0.1), Records(folder), held_out("val"), 0
    for epoch in range(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for inputs, targets in loader:
            stepper.zero_grad()
            loss = loss_fn(net(inputs), targets)
            backward(loss)
            stepper.step()
            schedule.step()
            step += 1
            records.step(step, loss)
        records.epoch(epoch, step, bare, optimizer, accuracy(bare, val))
    records.end(bare)


def plain(folder: Path, epochs: int) -> None:
    """PyTorch alone."""
    if WORLD > 1:
        dist.init_process_group("gloo")
    loop(folder, epochs)
    if WORLD > 1:
        dist.destroy_process_group()


def fabric(folder: Path, epochs: int) -> None:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    fab = Fabric(accelerator="cpu", devices=WORLD, strategy="ddp" if WORLD > 1 else "auto")
    fab.launch()
    loop(
        folder,
        epochs,
        lambda model, optimizer, data: (*fab.setup(model, optimizer), fab.setup_dataloaders(data)),
        fab.backward,
    )


def accelerate(folder: Path, epochs: int) -> None:
    """Hugging Face accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loop(folder, epochs, accelerator.prepare, accelerator.backward)
    accelerator.end_training()


def ignite(folder: Path, epochs: int) -> None:
    """Ignite: its engines for training and evaluation, with handlers."""
    import ignite.distributed as idist
    from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Accuracy

    def training(local_rank: int) -> None:
        del local_rank
        torch.manual_seed(0)
        bare, data = network(), Shifted(*digits(1))
        optimizer, schedule = optimizer_of(bare, epochs * (len(data) // 64))
        model, stepper = idist.auto_model(bare), idist.auto_optim(optimizer)
        loader = idist.auto_dataloader(data, batch_size=64, shuffle=True, drop_last=True)
        loss_fn, records, val = nn.CrossEntropyLoss(label_smoothing=0.1), Records(folder), held_out("val")
        trainer = create_supervised_trainer(model, stepper, loss_fn, output_transform=lambda x, y, p, loss: loss)
        evaluator = create_supervised_evaluator(bare, {"accuracy": Accuracy()})

        @trainer.on(Events.ITERATION_COMPLETED)
        def _step(engine: Engine) -> None:
            schedule.step()
            records.step(engine.state.iteration, engine.state.output)

        @trainer.on(Events.EPOCH_COMPLETED)
        def _epoch(engine: Engine) -> None:
            value = evaluator.run(val).metrics["accuracy"]
            records.epoch(engine.state.epoch, engine.state.iteration, bare, optimizer, value)

        trainer.run(loader, max_epochs=epochs)
        records.end(bare)

    if WORLD > 1:
        with idist.Parallel(backend="gloo") as parallel:
            parallel.run(training)
    else:
        training(0)


def lightning(folder: Path, epochs: int) -> None:
    """The Lightning Trainer with its TensorBoard logger and checkpoints."""
    from lightning import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_fn = network(), nn.CrossEntropyLoss(label_smoothing=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.loss_fn(self.net(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
            self.log("accuracy", right, sync_dist=WORLD > 1)

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            optimizer, schedule = optimizer_of(self, epochs * (1257 // 64))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    seed_everything(0, verbose=False)
    best = ModelCheckpoint(folder, monitor="accuracy", mode="max", save_top_k=1, save_last=True)
    trainer = Trainer(
        accelerator="cpu", devices=WORLD, strategy="ddp" if WORLD > 1 else "auto", max_epochs=epochs, log_every_n_steps=20,
        logger=TensorBoardLogger(str(folder)), callbacks=[best], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    train = DataLoader(Shifted(*digits(1)), BATCH, shuffle=True, drop_last=True)
    trainer.fit(Module(), train, held_out("val"))
    found = trainer.test(Module(), held_out("test"), ckpt_path=best.best_model_path, verbose=False)
    if RANK == 0:
        (folder / "result.json").write_text(
            json.dumps({"test": found[0]["accuracy"], "val": float(best.best_model_score or 0)})
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["plain", "fabric", "lightning", "accelerate", "ignite"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    globals()[options.name](options.folder, options.epochs)


if __name__ == "__main__":
    main()
