"""The same small training with other libraries: python contenders.py NAME RESULT.json [options], alone or under torchrun.

Digits MLP 64-128-10, cross-entropy, SGD with momentum, 64 samples per optimizer step over all processes, on the CPU.
Each contender follows its own documentation, with all extras disabled (progress bars, loggers, checkpoints). The exception is
`raw_chores`: the raw loop that also evaluates and saves after each epoch and logs every 50 steps.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clock import Clock, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
BATCH = 64 // WORLD


def parts(repeat: int) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, TensorDataset]:
    """Model, optimizer, loss and training set."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return (
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        nn.CrossEntropyLoss(),
        TensorDataset(*digits(repeat)),
    )


def loader_of(data: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
    """A stock DataLoader for one process."""
    return DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)


def raw(clock: Clock, repeat: int, chores: Path | None = None) -> None:
    """The loop of the PyTorch tutorials; with several processes, using DistributedDataParallel and DistributedSampler."""
    model, optimizer, loss_fn, data = parts(repeat)
    net: nn.Module = model
    sampler: DistributedSampler[Any] | None = None
    if WORLD > 1:
        dist.init_process_group("gloo")
        net = nn.parallel.DistributedDataParallel(model)
        sampler = DistributedSampler(data)
        loader = DataLoader(data, batch_size=BATCH, sampler=sampler, drop_last=True)
    else:
        loader = loader_of(data)
    epoch, done = 0, False
    while not done:
        if sampler is not None:
            sampler.set_epoch(epoch)
        for step, (inputs, targets) in enumerate(loader):
            optimizer.zero_grad()
            loss = loss_fn(net(inputs), targets)
            loss.backward()
            optimizer.step()
            if chores is not None and step % 50 == 0 and int(os.environ.get("RANK", "0")) == 0:
                print(f"epoch {epoch} step {step} loss {loss.item():.4f}")
            done = clock.tick()
            if done:
                break
        clock.boundary()
        epoch += 1
        if chores is not None:
            evaluate_and_save(model, optimizer, epoch, chores)
    if WORLD > 1:
        dist.destroy_process_group()


@torch.no_grad()
def evaluate_and_save(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, folder: Path) -> None:
    """Validation accuracy and a checkpoint: what a user adds to the raw loop by hand."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    model.eval()
    inputs, targets = digits(1, "val")
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(TensorDataset(inputs, targets), batch_size=256)
    )
    model.train()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, folder / "last.pt")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": epoch, "accuracy": right / len(targets)}) + "\n")


def fabric(clock: Clock, repeat: int) -> None:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    fab = Fabric(accelerator="cpu", devices=WORLD, strategy="ddp" if WORLD > 1 else "auto")
    fab.launch()
    bare, optimizer, loss_fn, data = parts(repeat)
    model, optimizer = fab.setup(bare, optimizer)
    loader = fab.setup_dataloaders(loader_of(data))
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            fab.backward(loss_fn(model(inputs), targets))
            optimizer.step()
            if clock.tick():
                return
        clock.boundary()


def lightning(clock: Clock, repeat: int) -> None:
    """The Lightning Trainer."""
    from lightning import LightningModule, Trainer

    _, _, loss_fn, data = parts(repeat)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = parts(1)[0]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            loss: Tensor = loss_fn(self.net(inputs), targets)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            clock.tick()

        def on_train_epoch_end(self) -> None:
            clock.boundary()

    Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp" if WORLD > 1 else "auto",
        max_epochs=-1,
        max_steps=clock.total,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), loader_of(data))


def accelerate(clock: Clock, repeat: int) -> None:
    """Hugging Face accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    bare, optimizer, loss_fn, data = parts(repeat)
    model, optimizer, loader = accelerator.prepare(bare, optimizer, loader_of(data))
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(model(inputs), targets))
            optimizer.step()
            if clock.tick():
                accelerator.end_training()
                return
        clock.boundary()


def ignite(clock: Clock, repeat: int) -> None:
    """PyTorch Ignite's supervised trainer, with its own helpers for distributed training."""
    import ignite.distributed as idist
    from ignite.engine import Engine, Events, create_supervised_trainer

    def training(local_rank: int) -> None:
        bare, optimizer, loss_fn, data = parts(repeat)
        model, optimizer = idist.auto_model(bare), idist.auto_optim(optimizer)
        loader = idist.auto_dataloader(data, batch_size=BATCH * WORLD, shuffle=True, drop_last=True)
        trainer = create_supervised_trainer(model, optimizer, loss_fn, output_transform=lambda x, y, p, loss: loss)

        @trainer.on(Events.ITERATION_COMPLETED)
        def _tick(engine: Engine) -> None:
            if clock.tick():
                engine.terminate()

        @trainer.on(Events.EPOCH_COMPLETED)
        def _boundary(engine: Engine) -> None:
            clock.boundary()

        trainer.run(loader, max_epochs=clock.total)

    if WORLD > 1:
        with idist.Parallel(backend="gloo") as parallel:
            parallel.run(training)
    else:
        training(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["raw", "raw_chores", "fabric", "lightning", "accelerate", "ignite"])
    parser.add_argument("result")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    clock = Clock(args.warmup, args.steps)
    if args.name == "raw_chores":
        raw(clock, args.repeat, chores=Path(args.result).parent)
    else:
        globals()[args.name](clock, args.repeat)
    clock.write(args.result)


if __name__ == "__main__":
    main()
