"""One optimizer step as docs/how-it-works.md says it, in plain PyTorch: reading, forwards, the gradient, the update.

Of dist_train it imports the data plan, the seeding functions and the augmentation, which have tests of their own. Each piece
of the arithmetic is a method, so that tests can get one of them wrong and see that they notice.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from described import DEFAULTS, loss_of, made, model_of, named, optimizer_of, schedule_of, steps_of
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from dist_train.data.augment import Augmentation
from dist_train.data.plan import Plan, parts
from dist_train.runtime.seeding import seed_forward, seed_sample

CPU = torch.device("cpu")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PlainStep:
    """What a config describes, cut for `ranks` processes, trained in this one."""

    def __init__(self, config: dict[str, Any], ranks: int = 1):
        self.config, self.ranks, self.seed = config, ranks, config.get("seed", 0)
        self.data = data = {**DEFAULTS["data"], **config["data"]}
        self.options = options = {**DEFAULTS["trainer"], **config.get("trainer", {})}
        self.saving = {**DEFAULTS["checkpoint"], **config.get("checkpoint", {})}
        self.sets = {split: made(data[split]) for split in ("train", "val", "test") if data[split] is not None}
        self.model = model_of(config, self.seed)
        if options["channels_last"]:
            self.model.to(memory_format=torch.channels_last)
        self.task = made(config["task"]) if "task" in config else None
        self.loss = loss_of(config["loss"]) if self.task is None else None
        self.summed = self.task is None and config["loss"].get("reduction") == "sum"
        self.collate = named(data["collate"]) if data["collate"] is not None else default_collate
        augments = [made(spec) for spec in data["augment"]]
        self.augmentation = Augmentation(augments) if augments else None
        self.callbacks = [made(spec) for spec in config.get("callbacks", [])]
        batch, stream = data["global_batch_size"], isinstance(self.sets["train"], IterableDataset)
        length = data["steps_per_epoch"] * batch if data["steps_per_epoch"] else len(self.sets["train"])
        batch = length if batch == "all" else batch
        self.plan = Plan(self.seed, length, batch, data["shuffle"] and not stream, data["drop_last"])
        self.epoch_steps = self.plan.steps_per_epoch
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(config, self.model)
        self.last_step = self.steps(options["duration"])
        schedule = schedule_of(config, self.optimizer, self.last_step, self.epoch_steps)
        self.schedule, self.schedule_every, self.schedule_metric = schedule
        self.plateau = isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        self.scaler = torch.amp.GradScaler("cpu") if options["precision"] == "fp16" else None
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {n: p.detach().clone() for n, p in trained.items()} if options["ema_decay"] else None
        self.stream = self.numbered(self.sets["train"]) if stream else None
        self.step, self.samples, self.skipped, self.norm, self.open = 0, 0, 0, None, [0.0, 0.0]

    def steps(self, length: str | None) -> int:
        return steps_of(length, self.epoch_steps)

    # Reading.

    def numbered(self, stream: Any) -> Any:
        """A stream's samples as they come, begun again at its end; each under the seeds of its pass and place."""
        for number in range(1 << 30):
            seed_sample(self.seed, number, -1)
            iterator = iter(stream)
            for place in range(1 << 30):
                seed_sample(self.seed, number, place)
                try:
                    yield next(iterator)
                except StopIteration:
                    break

    def read(self, dataset: Any, indices: Any, epoch: int) -> Any:
        samples = []
        for index in [int(i) for i in indices]:
            if isinstance(dataset, IterableDataset):
                samples.append(next(self.stream))
                continue
            seed_sample(self.seed, epoch, index)
            samples.append(dataset[index])
        batch = self.collate(samples)
        if self.options["channels_last"]:
            batch = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in batch]
        return batch

    def micro_batches(self, n: int) -> list[tuple[int, int, int]]:
        """(rank, first position in the global batch, one behind the last) of each."""
        share = -(-self.plan.global_batch_size // self.ranks)
        micro = share if self.options["micro_batch_size"] == "auto" else min(share, self.options["micro_batch_size"])
        return [(r, cut.start, cut.stop) for r in range(self.ranks) for cut in parts(n, r, self.ranks, micro)]

    # A step.

    def forward(self, batch: Any) -> tuple[Any, ...]:
        """(loss sum, its weight, outputs, targets); the loss in full precision, outside autocast."""
        half = HALF.get(self.options["precision"])
        with torch.autocast("cpu", dtype=half) if half else contextlib.nullcontext():
            if self.task is not None:
                return self.task.step(self.model, batch)
            outputs = self.model(batch[0])
        return (*self.loss(outputs, batch[1]), outputs, batch[1])

    def seeds(self, step: int, position: int) -> None:
        seed_forward(self.seed, step, position, CPU)

    def augmented(self, batch: Any, epoch: int, indices: Any) -> Any:
        return self.augmentation(batch, seed=self.seed, epoch=epoch, indices=indices) if self.augmentation else batch

    def train_step(self, step: int) -> None:
        batch, epoch = self.plan.batch(step), self.plan.epoch_of(step)
        n, more = len(batch), self.augmentation.neighbours if self.augmentation else 0
        loss: Any = 0.0
        weight: Any = 0
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        first = before
        for rank, start, stop in self.micro_batches(n):
            rows = batch.take(range(start, stop + more), mode="wrap")
            read = self.augmented(self.read(self.sets["train"], rows, epoch), epoch, rows)
            self.seeds(step, start)
            total, count, *_ = self.forward(read)
            scaled = total if self.summed else total * (1 / n)
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            loss, weight = loss + total.detach().double(), weight + count
            if rank == 0:  # each rank has buffers of its own; those of rank 0 are evaluated and saved
                first = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bad = self.finish_gradients(gradients, n, loss, weight)
        if bad and self.scaler is None and self.options["on_nonfinite"] == "stop":
            raise FloatingPointError(step + 1)
        self.model.load_state_dict(before if bad else first, strict=False)
        self.lr = self.optimizer.param_groups[0]["lr"]
        if bad:
            self.skipped += 1
        else:
            self.open = [self.open[0] + float(loss), self.open[1] + float(weight)]
            (self.optimizer.step if self.scaler is None else lambda: self.scaler.step(self.optimizer))()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()

    def finish_gradients(self, gradients: list[Tensor], n: int, loss: Tensor, weight: Any) -> bool:
        """Over the weight instead of the samples; then clipped. Whether anything is inf or nan."""
        self.divide(gradients, n, weight)
        bad = not all(bool(g.isfinite().all()) for g in [loss, *gradients])
        if self.options["clip_grad_value"] is not None:
            nn.utils.clip_grad_value_(self.parameters, self.options["clip_grad_value"])
        limit = self.options["clip_grad_norm"]
        self.norm = nn.utils.clip_grad_norm_(self.parameters, float("inf") if limit is None else limit)
        return bad or (limit is not None and not bool(self.norm.isfinite()))

    def divide(self, gradients: list[Tensor], n: int, weight: Any) -> None:
        for gradient in [] if self.summed else gradients:
            gradient.mul_(n / float(weight) if weight else 0.0)

    def after_update(self) -> None:
        if self.schedule is not None and not self.plateau and self.step % self.schedule_every == 0:
            self.schedule.step()
        if self.ema is not None:
            self.average()

    @torch.no_grad()
    def average(self) -> None:
        for name, average in self.ema.items():
            average.lerp_(self.model.get_parameter(name), 1 - self.options["ema_decay"])
