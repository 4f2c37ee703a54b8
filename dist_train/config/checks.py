"""Rules that pydantic's types can't express: over several keys, inside a component's reserved keys, on secrets and paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from .errors import REFUSED, SECRET_HINT, describe, did_you_mean, holds_secret, mask
from .fields import METRICS, PLACEHOLDER, Duration, Key, dotted, expand_argument, expand_path, is_named, keyed, leaves
from .metrics import metric_records
from .schedules import Warmup
from .schema import KEYS, Config

Finding = tuple[Key, str]  # (key, message)
Violation = tuple[str, str]  # (dotted key, message)
PATHS = ("run.dir", "run.code_paths", "data.weights", "transfer.weights", "checkpoint.resume")
_SECRET_NAME = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|credential|api_?key|(access|account|secret|private)_key)s?$"
    r"|^((auth|access|api|bearer|hf|use_auth)_)?token$|_(auth|access|refresh|session|security|secret|service|bearer)_token$"
    r"|^(github|gitlab|wandb|session|refresh|security|secret|service|oauth|jwt)_token$"
)


def check_values(data: Any) -> Iterator[Finding]:
    """The secrets in plain data, which would be written into the run's records, and paths with a variable that isn't set."""
    found = list(leaves(data))
    secret = {part for part in {part for key, _ in found for part in key} if holds_secret(str(part))}
    hint = f"a secret, which would be written into the run's records; {SECRET_HINT}"
    for key, value in found:
        if bad := [index for index, part in enumerate(key) if part in secret]:
            masked = tuple(mask(part, REFUSED) if isinstance(part, str) else part for part in key[: bad[0] + 1])
            yield masked, f"this key holds {hint}"
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            if holds_secret(str(value)):
                yield key, f"{mask(str(value), REFUSED)} holds {hint}"
            elif value != "" and any(_SECRET_NAME.search(_words(part)) for part in key):
                yield key, f"a secret would be written into the run's records; {SECRET_HINT}"
        if isinstance(value, str):
            holder = dotted(key[:-1] if key and type(key[-1]) is int else key)
            try:
                _ = expand_path(value) if holder in PATHS else holder in KEYS or expand_argument(value)
            except ValueError as error:
                yield key, str(error)


def _words(name: str | int) -> str:
    """`api_key` for `apiKey` and `api-key`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", str(name)).lower()


def cross_checks(config: Config) -> Iterator[Finding]:
    """Every violated rule over the keys of a valid config."""
    for rules in (_name, _data, _model, _optimizer, _by_optimizer, _schedulers, _watched, _bitwise):
        for key, message in rules(config):
            yield keyed(key), message
    if (profile := config.trainer.profile) is not None and (
        len(profile.steps) != 2 or profile.steps != sorted(profile.steps)
    ):
        yield (
            ("trainer", "profile", "steps"),
            f"expected the first and the last step, [100, 110], found {profile.steps}",
        )
    for name in ("images", "histograms", "graph"):
        if getattr(config.tracking, name) and not config.tracking.tensorboard:
            yield ("tracking", name), "this needs TensorBoard, which is off: set tracking.tensorboard=true"


def _name(config: Config) -> Iterator[Violation]:
    name = config.run.name or ""
    for placeholder in PLACEHOLDER.findall(name):
        try:
            _ = placeholder in ("time", "job") or config.get(placeholder)
        except KeyError:
            hint = "use {time}, {job} or a key like {optimizer.lr}"
            yield "run.name", f"{{{placeholder}}} is not a key of this config; {hint}"
    if name and (name.startswith("~") or {"", ".", ".."} & set(name.split("/")) or not name.isprintable()):
        hint = "set run.dir for another place"
        yield "run.name", f"expected a name for a directory inside run.dir, found {describe(name)}; {hint}"


def _data(config: Config) -> Iterator[Violation]:
    data, micro = config.data, config.trainer.micro_batch_size
    without_effect = {
        "persistent_workers": data.persistent_workers is True,
        "prefetch_factor": data.prefetch_factor is not None,
        "timeout": data.timeout > 0,
        "worker_start_method": data.worker_start_method != "auto",
    }
    for name, given in without_effect.items():
        if given and data.num_workers == 0:
            message = "this has no effect with data.num_workers=0; leave it out, or set data.num_workers above 0"
            yield f"data.{name}", message
    if data.weights is not None and not data.shuffle:
        yield (
            "data.weights",
            "samples drawn by weight are in random order: leave data.shuffle=false out, or data.weights",
        )
    if data.normalize is not None:
        counts = len(data.normalize.mean), len(data.normalize.std)
        if 0 in counts or (counts[0] != counts[1] and 1 not in counts):
            found = f"found {counts[0]} in mean and {counts[1]} in std"
            yield "data.normalize", f"expected a number for each channel in both, or one for all, {found}"
    if data.placement == "device" and data.num_workers not in ("auto", 0):
        yield (
            "data.num_workers",
            "batches in device memory (data.placement=device) are made there, without workers: leave it auto",
        )
    yield from _named_parts(config)
    if isinstance(data.global_batch_size, int) and isinstance(micro, int) and micro > data.global_batch_size:
        most = f"data.global_batch_size={data.global_batch_size}, which all ranks share"
        yield "trainer.micro_batch_size", f"expected at most {most}, found {micro}"


def _bitwise(config: Config) -> Iterator[Violation]:
    """What `distributed.reproducibility: bitwise` needs and excludes."""
    distributed, batch, micro = config.distributed, config.data.global_batch_size, config.trainer.micro_batch_size
    if distributed.reproducibility != "bitwise":
        return
    why = "with distributed.reproducibility=bitwise"
    if isinstance(batch, int) and (micro == "auto" or batch % micro):
        fitting = [size for size in range(1, batch + 1) if batch % size == 0]
        shown = fitting if len(fitting) <= 12 else [*fitting[:6], "...", *fitting[-5:]]
        sizes = ", ".join(map(str, shown))
        yield (
            "trainer.micro_batch_size",
            f"{why} a global batch is always the same micro-batches, as many as there are processes or more: expected a size "
            f"that divides data.global_batch_size={batch} ({sizes}), found {micro}",
        )
    elif micro == "auto":
        yield "trainer.micro_batch_size", f"{why} micro-batches have a fixed size: expected a number, found auto"
    if distributed.sync_batchnorm:
        yield (
            "distributed.sync_batchnorm",
            f"{why} BatchNorm takes its statistics of each micro-batch: leave it false, and let trainer.micro_batch_size be "
            "as many samples as the statistics need",
        )
    if distributed.strategy == "ddp":
        yield "distributed.strategy", f"{why} gradients are summed in a fixed order, which DDP can't: leave it auto"
    if distributed.deterministic is False:
        yield "distributed.deterministic", f"{why} kernels must be deterministic: leave it auto"


def _named_parts(config: Config) -> Iterator[Violation]:
    """data.inputs and data.target: both or neither, and under different names."""
    data = config.data
    for name, other in (("inputs", "target"), ("target", "inputs")):
        if getattr(data, name) is not None and getattr(data, other) is None:
            needed = {"inputs": "which parts of a sample the model gets", "target": "which one the loss gets"}[other]
            yield f"data.{name}", f"this needs data.{other} too: {needed}"
    if isinstance(data.inputs, list):
        names = [path.rpartition(".")[2] for path in data.inputs]
        if twice := [name for name in names if names.count(name) > 1]:
            yield "data.inputs", f"two of them would be the model's argument {twice[0]}: give the model different names"
        if not names:
            yield "data.inputs", "expected at least one name of a part of a sample, found []"


def _model(config: Config) -> Iterator[Violation]:
    for index, rule in enumerate(config.model_init):
        if isinstance(rule, dict):
            yield from _patterns(f"model_init.{index}.match", rule.get("match"))
    if config.loss is None and config.task is None:
        example = "{_target_: torch.nn.CrossEntropyLoss}"
        yield "loss", f"a loss is required unless there is a task; give it a component such as {example}"
    if config.val_loss is not None and config.task is not None:
        yield (
            "val_loss",
            "a task has its own losses: give it a method evaluate(model, batch) for another one in evaluation",
        )


def _patterns(key: str, value: Any) -> Iterator[Violation]:
    patterns = value if isinstance(value, list) else [value]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        yield key, f"expected a name pattern or a list of them, found {describe(value)}"


def _optimizer(config: Config) -> Iterator[Violation]:
    if not is_named(config.optimizer):
        yield from _groups("optimizer", config.optimizer)
        if isinstance(config.optimizer, dict) and "match" in config.optimizer:
            yield (
                "optimizer.match",
                "this is for several optimizers; for some parameters of one use `groups` or transfer.freeze",
            )
        return
    rest = [name for name, spec in config.optimizer.items() if spec.get("match") is None]
    if len(rest) > 1:
        yield (
            f"optimizer.{rest[1]}",
            f"{rest[0]} and {rest[1]} both have no `match`: one may take the rest of the parameters",
        )
    for name, spec in config.optimizer.items():
        yield from _groups(f"optimizer.{name}", spec)
        if spec.get("match") is not None:
            yield from _patterns(f"optimizer.{name}.match", spec["match"])


def _by_optimizer(config: Config) -> Iterator[Violation]:
    """Keys that may have a value for each of several optimizers name these."""
    for name in ("clip_grad_norm", "clip_grad_value", "ema_decay"):
        value = getattr(config.trainer, name)
        for optimizer in value if isinstance(value, dict) else ():
            if not is_named(config.optimizer):
                yield f"trainer.{name}", f"expected a number, as there is one optimizer, found {describe(value)}"
                break
            if optimizer not in config.optimizer:
                hint = did_you_mean(optimizer, config.optimizer) or f"; there are {', '.join(config.optimizer)}"
                yield f"trainer.{name}.{optimizer}", f"there is no optimizer {optimizer}{hint}"


def _groups(key: str, spec: Any) -> Iterator[Violation]:
    spec = spec if isinstance(spec, dict) else {}
    groups, decay = spec.get("groups"), spec.get("layer_decay")
    if decay is not None and (isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1):
        yield f"{key}.layer_decay", f"expected a factor above 0 and at most 1 for each layer, found {describe(decay)}"
    if not isinstance(spec.get("named_parameters", True), bool):
        yield f"{key}.named_parameters", f"expected true or false, found {describe(spec['named_parameters'])}"
    form = "{match: 'head.*', lr: 0.1}"
    if groups is not None and not isinstance(groups, list):
        yield f"{key}.groups", f"expected a list of groups like {form}, found {describe(groups)}"
    for index, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, dict) and group.keys() & {"match", "ndim_below"}:
            yield from _patterns(f"{key}.groups.{index}.match", group.get("match", "*"))
            below = group.get("ndim_below", 1)
            if type(below) is not int or below < 1:
                message = f"expected a number of dimensions, like 2 for norms and biases, found {describe(below)}"
                yield f"{key}.groups.{index}.ndim_below", message
        else:
            yield f"{key}.groups.{index}", f"expected a group like {form}, found {describe(group)}"


def _schedulers(config: Config) -> Iterator[Violation]:
    if not is_named(config.scheduler):
        yield from _scheduler(config, "scheduler", config.scheduler)
        return
    named = config.optimizer if is_named(config.optimizer) else {}
    for name, spec in (config.scheduler or {}).items():
        if name not in named:
            hint = did_you_mean(name, named) or "; several schedulers are named after several optimizers"
            yield f"scheduler.{name}", f"there is no optimizer {name}{hint}"
        yield from _scheduler(config, f"scheduler.{name}", spec)


def _scheduler(config: Config, key: str, scheduler: Any) -> Iterator[Violation]:
    if not isinstance(scheduler, dict):
        return
    for name, parse in (("every", Duration.parse_count), ("horizon", Duration.parse_count), ("warmup", Warmup.parse)):
        try:
            _ = scheduler.get(name) is None or parse(scheduler[name])
        except ValueError as error:
            yield f"{key}.{name}", str(error)
    if config.trainer.duration.is_time and scheduler.get("horizon") is None:
        hint = f"set {key}.horizon to epochs or steps"
        for place in (dotted(place) for place, value in leaves(scheduler) if str(value).startswith("total_steps")):
            yield f"{key}.{place}", f"total_steps isn't known while trainer.duration is a time; {hint}"
    if scheduler.get("metric") is not None and not isinstance(scheduler["metric"], str):
        yield f"{key}.metric", f"expected a metric such as val/loss, found {describe(scheduler['metric'])}"
    if str(scheduler["_target_"]).endswith("ReduceLROnPlateau"):
        if config.data.val is None:
            yield f"{key}._target_", "ReduceLROnPlateau monitors a metric of the validation data: set data.val"
        if scheduler.get("every") is not None:
            message = "ReduceLROnPlateau is stepped at evaluations (trainer.evaluate_every); leave `every` out"
            yield f"{key}.every", message


def _watched(config: Config) -> Iterator[Violation]:
    """stop_when, keep_best and scheduler.metric name metrics that evaluation computes."""
    rule, best = config.trainer.stop_when, config.checkpoint.keep_best
    if rule is not None:
        if rule.above is None and rule.below is None and rule.patience is None:
            yield "trainer.stop_when", "it never stops: give above, below or patience"
        if rule.above is not None and rule.below is not None:
            yield "trainer.stop_when.below", "above is given too; keep one of them"
        yield from _is_computed(config, "trainer.stop_when.metric", rule.metric)
    if best not in (None, "auto"):
        direction, _, metric = best.rpartition(" ")
        if direction in ("", "min", "max"):
            yield from _is_computed(config, "checkpoint.keep_best", metric)
        else:
            wanted = "a metric such as val/accuracy, or min or max and a metric"
            yield "checkpoint.keep_best", f"expected {wanted}, found {describe(best)}"
    schedulers = {"scheduler": config.scheduler}
    if is_named(config.scheduler):
        schedulers = {f"scheduler.{name}": spec for name, spec in (config.scheduler or {}).items()}
    for key, spec in schedulers.items():
        if isinstance(spec, dict) and isinstance(spec.get("metric"), str):
            yield from _is_computed(config, f"{key}.metric", spec["metric"])


def _is_computed(config: Config, key: str, name: str) -> Iterator[Violation]:
    metric = name.removeprefix("val/")
    if metric == name:
        wanted = "expected a metric of the validation data, like val/loss"
        yield key, f"{wanted}, found {describe(name)}; did you mean val/{name.rpartition('/')[2]}?"
    elif config.data.val is None:
        yield key, f"{name} needs validation data: set data.val"
    elif config.trainer.evaluate_every is None:
        yield key, f"{name} is never computed during training: trainer.evaluate_every is null"
    elif config.task is None and all(named := [metric_records(item) for item in config.metrics]):
        known = ["loss", *(name for names in named for name in names)]
        if not metric.startswith(("loss/", "raw_loss/")) and not any(fnmatchcase(metric, pattern) for pattern in known):
            hint = f"; add {metric} to metrics" if metric in METRICS else did_you_mean(metric, known, prefix="val/")
            yield key, f"{name} isn't computed{hint or '; the config gives val/' + ', val/'.join(known)}"
