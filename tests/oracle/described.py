"""What a config describes, built without dist_train: defaults as docs/config.md has them, components by their import paths."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import IterableDataset, default_collate

INF, NEVER = float("inf"), 1 << 60  # steps, or samples of a micro-batch
DATA = {
    "val": None, "test": None, "global_batch_size": 64, "shuffle": True, "eval_batch_size": 256, "collate": None,
    "steps_per_epoch": None, "drop_last": True, "augment": [], "inputs": None, "target": None,
    "weights": None, "normalize": None,
}  # fmt: skip
TRAINER = {
    "duration": "20ep", "precision": "fp32", "stop_at": None, "micro_batch_size": NEVER, "clip_grad_norm": INF,
    "clip_grad_value": INF, "ema_decay": None, "channels_last": False, "evaluate_every": "1ep",
    "evaluate_at_start": False, "log_every": "50step", "stop_when": None, "on_nonfinite": "stop",
}  # fmt: skip
CHECKPOINT = {"every": "1ep", "keep_last": 3, "keep_best": "auto"}
TRANSFER = {"weights": None, "strict": True, "head": None, "append": None, "freeze": []}


def described(config: dict[str, Any]) -> SimpleNamespace:
    """Every key of data, trainer and checkpoint as a plain value (lengths in steps), and all that the config names, built."""
    c = SimpleNamespace(**DATA, **TRAINER, **CHECKPOINT, seed=config.get("seed", 0))
    for section in ("data", "trainer", "checkpoint"):
        vars(c).update(config.get(section, {}))
    c.train, c.val, c.test, c.augment = made(c.train), made(c.val), made(c.test), made(c.augment)
    if c.normalize is not None:
        mean, std = (torch.tensor(c.normalize[key]).view(-1, 1, 1) for key in ("mean", "std"))
        c.normalize = lambda images: (images - mean) / std
    c.collate = default_collate if c.collate is None else named(c.collate)
    stream = isinstance(c.train, IterableDataset)
    c.length, c.shuffle = c.steps_per_epoch * c.global_batch_size if stream else len(c.train), c.shuffle and not stream
    c.global_batch_size = c.length if c.global_batch_size == "all" else c.global_batch_size
    epoch = c.length // c.global_batch_size if c.drop_last else -(-c.length // c.global_batch_size)
    c.every = [steps_of(every, epoch) for every in (c.every if isinstance(c.every, list) else [c.every])]
    for key in ("duration", "stop_at", "log_every", "evaluate_every"):
        setattr(c, key, steps_of(getattr(c, key), epoch))

    c.bitwise = config.get("distributed", {}).get("reproducibility") == "bitwise"
    c.model = model_of(config, c.seed)
    if c.channels_last:
        c.model.to(memory_format=torch.channels_last)
    c.task = made(config.get("task"))
    c.loss = None if c.task is not None else loss_of(config["loss"])
    c.summed = c.task is None and config["loss"].get("reduction") == "sum"
    c.optimizer = optimizer_of(config, c.model)
    c.half = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[c.precision]
    c.scaler = torch.amp.GradScaler("cpu", enabled=c.half is torch.float16)
    c.callbacks = made(config.get("callbacks", []))
    c.metrics = {name: METRICS[name] for name in config.get("metrics", [])}
    if c.keep_best == "auto":
        c.keep_best = f"val/{[*c.metrics, 'loss'][0]}"
    mode, _, metric = (c.keep_best or "val/loss").rpartition(" ")
    c.best_metric, c.best_sign = metric.removeprefix("val/"), sign_of(metric, mode or "auto")
    c.schedule, c.schedule_every, metric = schedule_of(config, c.optimizer, c.duration, epoch)
    on_plateau = isinstance(c.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    c.plateau_metric = (metric or c.best_metric).removeprefix("val/") if on_plateau else None
    c.stop_when = stop_rule(c.stop_when or {}, epoch)
    return c


def stop_rule(spec: dict[str, Any], epoch: int) -> SimpleNamespace:
    """trainer.stop_when; one that never ends a run for {}."""
    metric, patience = spec.get("metric", "val/loss"), steps_of(spec.get("patience"), epoch)
    rule = {"above": INF, "below": -INF, "min_delta": 0.0, **spec, "sign": sign_of(metric, spec.get("mode", "auto"))}
    return SimpleNamespace(**{**rule, "metric": metric.removeprefix("val/"), "patience": patience})


def sign_of(metric: str, mode: str) -> float:
    """-1 where lower is better: by `min` or `max`, else by the metric's name."""
    lower = any(word in metric for word in ("loss", "mae")) if mode == "auto" else mode == "min"
    return -1.0 if lower else 1.0


def made(spec: Any, *arguments: Any, **more: Any) -> Any:
    """The object that `_target_` names, nested ones first; lists as tensors where the signature says Tensor."""
    if isinstance(spec, list):
        return [made(item) for item in spec]
    if not isinstance(spec, dict) or "_target_" not in spec:
        return spec
    target = named(spec)
    given = {name: made(value) for name, value in spec.items() if name not in ("_target_", "_args_")}
    for name, value in given.items():
        if isinstance(value, list) and "Tensor" in str(inspect.signature(target).parameters[name].annotation):
            given[name] = torch.tensor(value)
    return target(*arguments, *made(spec.get("_args_", [])), **{**given, **more})


def named(spec: dict[str, Any]) -> Any:
    """The class or function itself."""
    module, _, name = spec["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def steps_of(length: str | None, epoch: int) -> int:
    """`3ep` or `7step` in optimizer steps; more than any run has for null."""
    if length is None:
        return NEVER
    count, unit = re.fullmatch(r"(\d+)(ep|step)", length).groups()  # type: ignore[union-attr]
    return int(count) * (epoch if unit == "ep" else 1)


def matches(model: nn.Module, patterns: str | list[str]) -> list[str]:
    """Names of the parameters that a pattern means: of themselves, or of their module's class."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    kinds = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name, _ in model.named_parameters()}
    return [n for n, kind in kinds.items() if any(fnmatch.fnmatch(n, p) or p == kind for p in patterns)]


def model_of(config: dict[str, Any], seed: int) -> nn.Module:
    """The model with its first weights: under the run's seed; weights, head, what is appended, first values, frozen."""
    transfer = {**TRANSFER, **(config.get("transfer") or {})}
    torch.manual_seed(seed)
    model = made(config["model"])
    if transfer["weights"] is not None:
        saved, own = torch.load(transfer["weights"], weights_only=True), model.state_dict()
        fitting = {name: value for name, value in saved.items() if name in own and value.shape == own[name].shape}
        model.load_state_dict(saved if transfer["strict"] else fitting, strict=transfer["strict"])
    if transfer["head"] is not None:
        at = transfer["head"]["at"]
        model.set_submodule(at, nn.Linear(model.get_submodule(at).in_features, transfer["head"]["classes"]))
    if transfer["append"] is not None:
        holder = model.get_submodule(transfer["append"]["at"])
        holder.add_module(transfer["append"]["name"], made(transfer["append"]["module"]))
    for rule in config.get("model_init", []):
        for name in matches(model, rule["match"]):
            made({key: value for key, value in rule.items() if key != "match"}, model.get_parameter(name))
    for name in matches(model, transfer["freeze"]):
        model.get_parameter(name).requires_grad_(False)
    for module in model.modules():  # a normalisation that is wholly frozen keeps its statistics
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and not module.weight.requires_grad:
            module.train(module.bias.requires_grad)
    return model


def optimizer_of(config: dict[str, Any], model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    """Groups in the config's order behind that of the rest; the first pattern that matches takes a parameter.

    With layer_decay each is divided by layers, which are the modules with parameters in their order.
    """
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    spec = {key: value for key, value in config["optimizer"].items() if key not in ("groups", "layer_decay")}
    named_groups = []
    for group in config["optimizer"].get("groups", []):
        options = {key: value for key, value in group.items() if key not in ("match", "ndim_below")}
        taken = [name for name in matches(model, group.get("match", "*")) if name in left]
        taken = [name for name in taken if left[name].ndim < group.get("ndim_below", NEVER)]
        named_groups.append((options, {name: left.pop(name) for name in taken}))
    decay, groups = config["optimizer"].get("layer_decay"), []
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))
    for options, members in [({}, left), *named_groups]:
        if decay is None:
            groups.append({"params": list(members.values()), **options})
        for number, module in enumerate(modules if decay is not None else []):
            params = [parameter for name, parameter in members.items() if name.rpartition(".")[0] == module]
            scale = decay ** (len(modules) - 1 - number)
            groups += [{"params": params, **options, "lr_scale": scale}] if params else []
    if "fused" in inspect.signature(named(spec)).parameters and not {"fused", "foreach"} & spec.keys():
        more = {"fused": True, **more}
    return made(spec, groups, **more)


def schedule_of(config: dict[str, Any], optimizer: Any, duration: int, epoch: int) -> tuple[Any, int, str | None]:
    """(scheduler, steps between its steps, the metric that it watches)."""
    spec = dict(config.get("scheduler") or {})
    if not spec:
        return None, NEVER, None
    each_step = spec["_target_"].rpartition(".")[2] in ("OneCycleLR", "CyclicLR", "WarmupCosine")
    every, metric, horizon, warmup = (spec.pop(key, None) for key in ("every", "metric", "horizon", "warmup"))
    first = steps_of(warmup, epoch) if warmup else 0  # of every: 1step
    total = (steps_of(horizon, epoch) if horizon else duration) - first
    numbers = {"total_steps": total, "steps_per_epoch": epoch}
    spec = {key: numbers.get(value, value) if isinstance(value, str) else value for key, value in spec.items()}
    warm = lrs.LinearLR(optimizer, 1 / (first + 1), total_iters=first) if first else None
    schedule = made(spec, optimizer)
    if warm is not None:
        schedule = lrs.SequentialLR(optimizer, [warm, schedule], [first])
    return schedule, steps_of(every or ("1step" if each_step else "1ep"), epoch), metric


def loss_of(spec: dict[str, Any]) -> Callable[[Any, Any], tuple[Tensor, Any]]:
    """(outputs, targets) -> (the loss summed over the samples, what it is divided by)."""
    if not spec["_target_"].startswith("torch.nn."):
        return partial(named(spec), **{key: value for key, value in spec.items() if key != "_target_"})
    loss, plain_sum = made({**spec, "reduction": "sum"}), spec.get("reduction") == "sum"

    def summed(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        if outputs.shape == (*targets.shape, 1):
            outputs = outputs.squeeze(-1)
        if plain_sum:
            return loss(outputs, targets), len(outputs)
        if not isinstance(loss, nn.CrossEntropyLoss):
            return loss(outputs, targets), outputs.numel()
        if targets.is_floating_point():
            return loss(outputs, targets), len(outputs)
        kept = targets[targets != loss.ignore_index]
        return loss(outputs, targets), kept.numel() if loss.weight is None else loss.weight[kept].sum()

    return summed


def accuracy(outputs: Tensor, targets: Tensor) -> tuple[Any, Any]:
    """(how many are right, how many count)."""
    kept = targets != -100
    return (outputs.argmax(1) == targets)[kept].sum(), kept.sum()


def binary_accuracy(logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
    """(how many are right, how many there are)."""
    return ((logits.view(-1) > 0) == (targets > 0.5)).sum(), len(logits)


def mae(outputs: Tensor, targets: Tensor) -> tuple[Any, Any]:
    """(sum of the absolute errors, how many there are)."""
    return (outputs.double() - targets.double().view_as(outputs)).abs().sum(), outputs.numel()


METRICS = {"accuracy": accuracy, "binary_accuracy": binary_accuracy, "mae": mae}
