"""The loop that `train()` must equal bit for bit, in plain PyTorch: to be checked by eye against docs/how-it-works.md.

Of dist_train it imports the data plan, the seeding functions and the augmentation, which have tests of their own. What a
config names is built in described.py; test_equal.py shows that a mistake in a line of this file is noticed.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from described import described
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from dist_train.data.augment import Augmentation
from dist_train.data.plan import Plan, micro_slices, rank_slice
from dist_train.runtime.seeding import seed_forward, seed_sample

CPU, INF = torch.device("cpu"), float("inf")


def clone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def part_of(batch: Any, path: str) -> Any:
    return functools.reduce(lambda part, key: part[key], path.split("."), batch)


def endless(stream: Any, seed: int) -> Iterator[Any]:
    """A stream's samples as they come, over and over; each under the seeds of its pass and of its place in the pass."""
    for number in itertools.count():
        seed_sample(seed, number, -1)
        iterator = iter(stream)
        seed_sample(seed, number, 0)
        for place, sample in enumerate(iterator, start=1):
            yield sample
            seed_sample(seed, number, place)


def summed(leaves: list[list[Tensor]], start: int, count: int) -> list[Tensor]:
    """Along a binary tree: of `count` leaves, a power of two, those that there are."""
    if count == 1:
        return leaves[start]
    first, middle = summed(leaves, start, count // 2), start + count // 2
    if middle >= len(leaves):
        return first
    return [a + b for a, b in zip(first, summed(leaves, middle, count // 2), strict=True)]


def plain_loop(config: dict[str, Any], ranks: int = 1) -> SimpleNamespace:
    """Train what a config describes as `ranks` processes would; `rows`, `saved` (by step), `result` and `model_file`."""
    c = described(config)
    model, optimizer, schedule, scaler = c.model, c.optimizer, c.schedule, c.scaler
    plan = Plan(c.seed, c.length, c.global_batch_size, c.shuffle, c.drop_last)
    augmentation = Augmentation(c.augment, c.normalize)
    stream = endless(c.train, c.seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = clone(parameters) if c.ema_decay else {}
    evaluated = copy.deepcopy(model).eval()  # so that an evaluation leaves no trace in the one that is trained

    def samples_of(step: int) -> tuple[Any, Any]:
        """(the samples of a step, what else than their indices their draws depend on)."""
        if c.weights is None:
            return plan.batch(step), plan.batch(step)
        sums, epoch = np.cumsum(np.array(c.weights, dtype=np.float64)), plan.epoch_of(step)
        drawn = np.random.RandomState([6, c.seed, 0, epoch, 0]).random_sample(c.length) * sums[-1]
        start = step % plan.steps_per_epoch * c.global_batch_size
        places = np.arange(c.length)[start : start + c.global_batch_size]
        return np.array([next(k for k in range(c.length) if sums[k] > drawn[place]) for place in places]), places

    def read(dataset: Any, indices: Any, epoch: int, keys: Any = None) -> Any:
        samples = []
        for index, key in zip(map(int, indices), map(int, indices if keys is None else keys), strict=True):
            if isinstance(dataset, IterableDataset):
                samples.append(next(stream))
            else:
                seed_sample(c.seed, epoch, key)
                samples.append(dataset[index])
        batch = c.collate(samples)
        if c.inputs is not None:
            batch = {path.rpartition(".")[2]: part_of(batch, path) for path in c.inputs}, part_of(batch, c.target)
        if c.channels_last:
            batch = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in batch]
        return batch

    def forward(model: nn.Module, batch: Any) -> tuple[Any, ...]:
        """(loss sum, its weight, outputs, targets); a loss is computed outside autocast, a task inside."""
        with torch.autocast("cpu", c.half, enabled=c.half is not None):
            if c.task is not None:
                return c.task.step(model, batch)
            outputs = model(**batch[0]) if isinstance(batch[0], dict) else model(batch[0])
        return *c.loss(outputs, batch[1]), outputs, batch[1]

    @torch.no_grad()
    def measure(dataset: Any, weights: dict[str, Tensor]) -> dict[str, float]:
        """Sums over the eval batches, in the order of the dataset and in float64, and one division at the end."""
        evaluated.load_state_dict(weights)
        sums = torch.zeros(1 + len(c.metrics), 2, dtype=torch.float64)
        for start in range(0, len(dataset), c.eval_batch_size):
            indices = range(start, min(start + c.eval_batch_size, len(dataset)))
            batch = read(dataset, indices, epoch=-1)
            if c.normalize:
                batch = [c.normalize(batch[0]), batch[1]]
            loss, weight, outputs, targets = forward(evaluated, batch)
            pairs = [(loss, weight), *(metric(outputs.float(), targets) for metric in c.metrics.values())]
            sums += torch.tensor([[float(total), float(count)] for total, count in pairs], dtype=torch.float64)
        values = (sums[:, 0] / sums[:, 1]).tolist()
        return {**dict(zip(["loss", *c.metrics], values, strict=True)), "eval_samples": len(dataset)}

    def evaluate(dataset: Any, weights: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, float]:
        """With an EMA the values of its weights, and as `raw_*` those of the weights that are trained."""
        raw = measure(dataset, weights)
        if not ema:
            return raw
        renamed = {f"raw_{name}": value for name, value in raw.items() if name != "eval_samples"}
        return {**measure(dataset, {**weights, **ema}), **renamed}

    def validate() -> dict[str, float]:
        values = evaluate(c.val, model.state_dict(), ema)
        run.rows.append({**place, "split": "val", **values})
        if c.plateau_metric is not None:
            schedule.step(values[c.plateau_metric])
        return values

    logged: dict[str, float] = {}  # by callbacks
    run = SimpleNamespace(rows=[], saved={}, step=0, optimizer=optimizer, log=logged.__setitem__)
    place = {"step": 0, "epoch": 0, "samples": 0}
    open_loss, open_weight, skipped = 0.0, 0.0, 0  # since the last row; in the whole run
    best, best_step, stop_best, stop_step, state = (-INF, -INF), None, -INF, 0, None
    val = validate() if c.evaluate_at_start else None

    while state is None:
        (indices, keys), epoch = samples_of(run.step), plan.epoch_of(run.step)
        n, loss_sum, weight_sum = len(indices), torch.zeros((), dtype=torch.float64), 0
        buffers = before = clone(dict(model.named_buffers()))
        leaves: list[list[Tensor]] = []
        # 1. Each micro-batch; an augmentation that mixes samples reads the next ones of the global batch too.
        for rank in range(1 if c.bitwise else ranks):  # which doesn't matter there
            count = -(-n // c.micro_batch_size)
            fixed = [rank_slice(n, k, count) for k in range(count)]
            for part in fixed if c.bitwise else micro_slices(n, rank, ranks, c.micro_batch_size):
                places = range(part.start, part.stop + augmentation.neighbours)
                rows, row_keys = (values.take(places, mode="wrap") for values in (indices, keys))
                batch = read(c.train, rows, epoch, row_keys)
                if c.augment or c.normalize:
                    batch = augmentation(batch, seed=c.seed, epoch=epoch, indices=row_keys)
                if c.bitwise:
                    model.load_state_dict(before, strict=False)
                seed_forward(c.seed, run.step, part.start, CPU)
                loss, weight, *_ = forward(model, batch)
                scaler.scale(loss if c.summed else loss * (1 / n)).backward()
                loss_sum, weight_sum = loss_sum + loss.detach().double(), weight_sum + weight
                if c.bitwise:
                    averaged = [b.clone() for b in model.buffers() if b.is_floating_point()]
                    leaves.append([loss.detach(), *averaged, *(p.grad for p in parameters.values())])
                    optimizer.zero_grad()
            if rank == 0:  # each rank has buffers of its own: those of rank 0 are evaluated and saved
                buffers = clone(dict(model.named_buffers()))
        if c.bitwise:  # sums along the tree; running statistics are the mean over the leaves
            loss_sum, *sums = summed(leaves, 0, 1 << (len(leaves) - 1).bit_length())
            for buffer in (b for b in model.buffers() if b.is_floating_point()):
                buffer.copy_(sums.pop(0) / len(leaves))
            buffers = clone(dict(model.named_buffers()))
            for parameter, gradient in zip(parameters.values(), sums, strict=True):
                parameter.grad = gradient
        # 2. fp16.
        scaler.unscale_(optimizer)
        # 3. Over the weight instead of the samples.
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if not c.summed:
            for gradient in gradients:
                gradient.mul_(n / float(weight_sum) if weight_sum else 0.0)
        # 4. and 5. Is it a bad step? Clipping; the norm is known after the clipping by value.
        finite = all(bool(x.isfinite().all()) for x in [loss_sum, *gradients])
        nn.utils.clip_grad_value_(parameters.values(), c.clip_grad_value)
        norm = nn.utils.clip_grad_norm_(parameters.values(), c.clip_grad_norm)
        finite = finite and (bool(norm.isfinite()) or c.clip_grad_norm == INF)
        if not finite and not scaler.is_enabled() and c.on_nonfinite == "stop":
            raise FloatingPointError(f"step {run.step + 1}")
        model.load_state_dict(buffers if finite else before, strict=False)
        # 6. The update.
        lr = optimizer.param_groups[0]["lr"]
        if finite:
            open_loss, open_weight = open_loss + float(loss_sum), open_weight + float(weight_sum)
            for group in optimizer.param_groups:  # of layer_decay
                group["lr"], group["unscaled"] = group["lr"] * group.get("lr_scale", 1.0), group["lr"]
            scaler.step(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = group.pop("unscaled")
        else:
            skipped += 1
        scaler.update()
        optimizer.zero_grad()
        run.step += 1
        # 7. Schedule and EMA.
        if c.plateau_metric is None and run.step % c.schedule_every == 0:
            schedule.step()
        for name, average in ema.items():
            average.lerp_(parameters[name].detach(), 1 - c.ema_decay)

        # After a step: callbacks, the row, evaluation with early stop and the best, saving.
        place = {"step": run.step, "epoch": epoch + 1, "samples": place["samples"] + n}
        for callback in c.callbacks:
            callback.on_step_end(run)
            if run.step % plan.steps_per_epoch == 0:
                callback.on_epoch_end(run)
        over, improved = run.step >= c.duration, False
        if over or run.step % c.log_every == 0:
            mean = open_loss / open_weight if open_weight else None
            row = {**place, "split": "train", "loss": mean, "lr": lr, "grad_norm": float(norm), **logged}
            run.rows.append({**row, "skipped": skipped} if skipped else row)
            open_loss, open_weight = 0.0, 0.0
            logged.clear()
        if c.val is not None and (over or run.step % c.evaluate_every == 0):
            val = validate()
            value, rule = val[c.stop_when.metric], c.stop_when
            if rule.sign * value - stop_best > rule.min_delta:
                stop_best, stop_step = rule.sign * value, run.step
            over = over or value > rule.above or value < rule.below or run.step - stop_step >= rule.patience
            merit = (c.best_sign * val[c.best_metric], -val["loss"])  # of equal ones the one with the least loss
            if c.keep_best is not None and merit > best:
                improved, best, best_step = True, merit, run.step
        state = "completed" if over else "preempted" if run.step >= c.stop_at else None
        if state is not None or improved or any(run.step % every == 0 for every in c.every):
            weights = {"model": clone(model.state_dict()), "ema": clone(ema)}
            states = {"optimizer": copy.deepcopy(optimizer.state_dict()), "scaler": scaler.state_dict()}
            run.saved[run.step] = {**weights, **states, "place": place, "val": val}
            newest = sorted(run.saved)[-c.keep_last :]
            run.saved = {step: saved for step, saved in run.saved.items() if step in newest or step == best_step}

    run.result = {"state": state, **place, "world_size": ranks}
    if state == "preempted":
        return run
    # The end: where there are best weights they are kept, and tested.
    kept = run.saved[best_step or run.step]
    run.model_file = {**kept["model"], **kept["ema"]}
    run.result["metrics"] = {} if kept["val"] is None else {"val": kept["val"]}
    if c.test is not None:
        run.result["metrics"]["test"] = evaluate(c.test, kept["model"], kept["ema"])
        run.rows.append({**kept["place"], "split": "test", **run.result["metrics"]["test"]})
    run.result |= {"kept": "best" if best_step else "last", "kept_step": kept["place"]["step"], "ema": bool(ema)}
    return run
