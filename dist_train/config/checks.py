"""Rules that involve several keys, or the inside of a component's reserved keys."""

from __future__ import annotations

from collections.abc import Iterator

from .durations import Duration
from .errors import describe, did_you_mean
from .fields import METRICS
from .names import PLACEHOLDER
from .schema import Config
from .source import Key

Finding = tuple[Key, str]


def cross_checks(config: Config) -> Iterator[Finding]:
    """Every broken rule as (key, what is wrong)."""
    yield from _workers(config)
    yield from _loop(config)
    yield from _watched(config)
    yield from _model(config)
    yield from _optimizer(config)
    yield from _scheduler(config)
    if config.loss is None and config.task is None:
        cure = "give it a component such as {_target_: torch.nn.CrossEntropyLoss}"
        yield ("loss",), f"a loss is needed, unless there is a task; {cure}"
    for index, metric in enumerate(config.metrics):
        if isinstance(metric, str) and metric not in METRICS:
            hint = did_you_mean(metric, METRICS)
            hint = hint or f"; those with a name are {', '.join(METRICS)}, any class goes by {{_target_: ...}}"
            yield ("metrics", index), f"no metric is called {metric}{hint}"
    if config.run.name is not None:
        yield from _name(config, config.run.name)


def _name(config: Config, name: str) -> Iterator[Finding]:
    key: Key = ("run", "name")
    for placeholder in PLACEHOLDER.findall(name):
        if placeholder in ("time", "job"):
            continue
        try:
            config.get(placeholder)
        except KeyError:
            yield (
                key,
                f"{{{placeholder}}} is no key of this config; use {{time}}, {{job}} or a key like {{optimizer.lr}}",
            )
    if name.startswith(("/", "~")) or ".." in name.split("/"):
        yield (
            key,
            f"expected a name for a directory inside run.dir, found {describe(name)}; set run.dir for another place",
        )


def _workers(config: Config) -> Iterator[Finding]:
    data = config.data
    if data.num_workers != 0:
        return
    for name, unset in (
        ("persistent_workers", ("auto", False)),
        ("prefetch_factor", (None,)),
        ("timeout", (0,)),
        ("worker_start_method", ("auto",)),
    ):
        if getattr(data, name) not in unset:
            yield (
                ("data", name),
                "this does nothing with data.num_workers=0; leave it out, or set data.num_workers above 0",
            )


def _loop(config: Config) -> Iterator[Finding]:
    trainer, data = config.trainer, config.data
    size, micro = data.global_batch_size, trainer.micro_batch_size
    if isinstance(size, int) and isinstance(micro, int) and micro > size:
        message = f"expected at most data.global_batch_size={size}, which all ranks share, found {micro}"
        yield ("trainer", "micro_batch_size"), message
    if size == "all" and data.drop_last is False:
        yield ("data", "drop_last"), "with data.global_batch_size=all there is no smaller last batch; leave it out"
    if not config.distributed.hang_timeout.is_time:
        found = config.distributed.hang_timeout
        yield ("distributed", "hang_timeout"), f"expected a time like 10min, found {found}"


def _watched(config: Config) -> Iterator[Finding]:
    """stop_when, keep_best and scheduler.metric name figures that evaluation really gives."""
    rule = config.trainer.stop_when
    best = config.checkpoint.keep_best
    if rule is not None:
        key: Key = ("trainer", "stop_when")
        if rule.above is None and rule.below is None and rule.patience is None:
            yield key, "it never stops: give above, below or patience"
        if rule.above is not None and rule.below is not None:
            yield (*key, "below"), "above is given too; keep one of them"
        if rule.patience is None and (rule.min_delta or rule.mode != "auto"):
            yield (*key, "min_delta" if rule.min_delta else "mode"), "this counts only with patience, which isn't given"
        if rule.patience is not None and rule.patience.is_time:
            yield (*key, "patience"), f"expected epochs or steps, like 5ep or 500step, found {rule.patience}"
        yield from _metric_is_there(config, (*key, "metric"), rule.metric)
    if best not in (None, "auto"):
        words = str(best).split()
        if len(words) > 2 or (len(words) == 2 and words[0] not in ("min", "max")):
            message = f"expected a metric such as val/accuracy, or min or max and a metric, found {describe(best)}"
            yield ("checkpoint", "keep_best"), message
        else:
            yield from _metric_is_there(config, ("checkpoint", "keep_best"), words[-1])
    if isinstance(config.scheduler, dict) and isinstance(config.scheduler.get("metric"), str):
        yield from _metric_is_there(config, ("scheduler", "metric"), config.scheduler["metric"])


def _metric_is_there(config: Config, key: Key, name: str) -> Iterator[Finding]:
    if not name.startswith("val/"):
        hint = f"; did you mean val/{name.rpartition('/')[2]}?"
        yield key, f"expected a figure of the validation data, like val/loss, found {describe(name)}{hint}"
        return
    if config.data.val is None:
        yield key, f"{name} needs validation data: set data.val"
    elif config.trainer.evaluate_every is None:
        yield key, f"{name} is never computed during training: trainer.evaluate_every is null"
    if config.task is None and all(isinstance(metric, str) for metric in config.metrics):
        known = ["val/loss", *(f"val/{metric}" for metric in config.metrics)]
        if name not in known:
            cure = f"; add {name[4:]} to metrics" if name[4:] in METRICS else did_you_mean(name, known)
            yield key, f"{name} isn't computed{cure or '; the config gives ' + ', '.join(known)}"


def _model(config: Config) -> Iterator[Finding]:
    for index, rule in enumerate(config.model_init):
        if isinstance(rule, dict):
            yield from _patterns(("model_init", index, "match"), rule.get("match"))
    if config.transfer.weights is None and not config.transfer.strict:
        yield ("transfer", "strict"), "this counts only with transfer.weights, which isn't given"


def _patterns(key: Key, value: object) -> Iterator[Finding]:
    patterns = value if isinstance(value, list) else [value]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        yield key, f"expected a name pattern or a list of them, found {describe(value)}"


def _optimizer(config: Config) -> Iterator[Finding]:
    if not isinstance(config.optimizer, dict) or config.optimizer.get("groups") is None:
        return
    groups, key = config.optimizer["groups"], ("optimizer", "groups")
    if not isinstance(groups, list):
        yield key, f"expected a list of groups like {{match: 'head.*', lr: 0.1}}, found {describe(groups)}"
        return
    for index, group in enumerate(groups):
        if not isinstance(group, dict) or "match" not in group:
            hint = "; the key of the pattern is match" if isinstance(group, dict) and "params" in group else ""
            message = f"expected a group like {{match: 'head.*', lr: 0.1}}, found {describe(group)}{hint}"
            yield (*key, index), message
            continue
        yield from _patterns((*key, index, "match"), group["match"])


def _scheduler(config: Config) -> Iterator[Finding]:
    if not isinstance(config.scheduler, dict):
        return
    for name in ("every", "horizon"):
        value = config.scheduler.get(name)
        if value is None:
            continue
        try:
            length = Duration.parse(value)
        except ValueError as error:
            yield ("scheduler", name), str(error)
            continue
        if length.is_time:
            yield ("scheduler", name), f"expected epochs or steps, like 1ep or 1step, found {length}"
    timed = config.trainer.duration.is_time and config.scheduler.get("horizon") is None
    for name, value in config.scheduler.items():
        if timed and value == "total_steps":
            message = (
                "total_steps isn't known while trainer.duration is a time; set scheduler.horizon to epochs or steps"
            )
            yield ("scheduler", name), message
    metric = config.scheduler.get("metric")
    if metric is not None and not isinstance(metric, str):
        yield ("scheduler", "metric"), f"expected a metric such as val/loss, found {describe(metric)}"
    plateau = str(config.scheduler["_target_"]).endswith("ReduceLROnPlateau")
    if plateau and config.data.val is None:
        yield ("scheduler", "_target_"), "ReduceLROnPlateau looks at a figure of the validation data: set data.val"
    if plateau and config.scheduler.get("every") is not None:
        yield (
            ("scheduler", "every"),
            "ReduceLROnPlateau goes by evaluations (trainer.evaluate_every); leave `every` out",
        )
