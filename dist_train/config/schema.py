"""Every key of a config, its type, its default and what it means: docs/config.md is generated from this file.

Each leaf is declared by `harmless`, `consent` or `refused`: what happens when its value differs from the one that a run
was started with (see `changes.py`). Rules over several keys are in `checks.py`. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from . import fields
from .fields import Auto, Component, Count, Duration, Length, Section, Text, about, consent, harmless, refused
from .metrics import OF, Metric
from .schema_tracking import DebugConfig, ProfileConfig, TrackingConfig
from .source import COMMAND_LINE, DICT, Place, dump, nearest


class RunConfig(Section):
    """The directory of the run. The same name and directory is the same run: starting it again resumes it."""

    name: fields.Name | None = harmless(
        None,
        "The run's directory inside `run.dir`. `{time}`, `{job}` and any key, like `{optimizer.lr}`, are filled in; characters "
        "that a path can't hold are replaced, and a hash is appended; runs started in the same second are numbered. "
        "null: the name of the config file without its suffix; from a Python dict: `run`.",
    )
    dir: Text = harmless(
        "runs",
        "The directory of all runs, or any fsspec URL such as `s3://bucket/runs`. In paths `$VAR` and `${VAR}` are filled in "
        "from the environment where they are used: config.yaml keeps the text.",
    )

    @property
    def place(self) -> str:
        """`dir` with the variables of the environment filled in."""
        return fields.expand_path(self.dir)

    code_paths: list[Text] = harmless(
        [],
        "Directories in which your own code is looked for before installed packages; relative to the file. Empty: the "
        "directory of the config file, then the working directory. Recorded as absolute paths.",
    )


class NormalizeConfig(Section):
    """Normalize pictures (N, C, H, W) on the device, for train, val, test and predict alike, as torchvision's ToTensor and
    Normalize do: uint8 becomes float32 in [0, 1], floats stay; then (pixels - mean) / std. Without it batches stay as they are.
    """

    mean: fields.Numbers = consent(..., "A number for each channel, or one for all: 0 with a std of 1 only scales.")
    std: fields.Positives = consent(..., "The same, above 0. Both are in units of pixels in [0, 1].")


class DataConfig(Section):
    """The datasets, and how they are read."""

    train: Component = consent(..., "The training dataset: anything with `__getitem__` and `__len__`.")
    val: Component | None = consent(None, "The validation dataset, evaluated every `trainer.evaluate_every`.")
    test: Component | None = harmless(None, "The test dataset, evaluated once at the end.")
    global_batch_size: Count | Literal["all"] = refused(
        64, "Samples of one optimizer step, over all ranks. `all`: the whole dataset in every step (full batch)."
    )
    shuffle: bool = refused(True, "Shuffle the training data each epoch, by seed and epoch. Never in evaluation.")
    eval_batch_size: Count = harmless(256, "Samples of one forward in evaluation, on one rank.")
    num_workers: fields.NonNegative | Auto = harmless(
        "auto",
        "DataLoader workers of each rank. `auto`: none for a dataset that reads whole batches itself (`read_batch`) or "
        "where CPUs are few; else the CPUs available to this process, divided among the ranks of the machine.",
    )
    on_error: Literal["stop", "skip"] = harmless(
        "stop",
        "What a sample that can't be read (its `__getitem__` raises) does to training. `stop`: the run fails, naming it. `skip`: "
        "the next sample of the epoch's order that can be read stands in its place, the same one on any number of processes and "
        "workers; the first ones are named in the log, and train rows count all of them since the run began: `skipped_samples`. "
        "A whole global batch in a row is an error. Evaluation never skips.",
    )
    pin_memory: bool | Auto = harmless("auto", "Page-locked batches, for faster copies. `auto`: on CUDA only.")
    placement: Literal["auto", "device", "host"] = harmless(
        "auto",
        "Where datasets that are read by whole batches live. `auto`: in the GPU's memory where they have less than 2 GiB and a "
        "tenth of what is free. `device`: there, else it is an error. On the CPU both are its memory.",
    )
    steps_per_epoch: Count | None = refused(None, "The length of an epoch, for an IterableDataset without a length.")
    weights: fields.SampleWeights | None = refused(
        None,
        "Draw the samples of each epoch with replacement, as often as these weights say: a list; a .npy, .csv or .txt file with "
        "a number for each sample; a function of the dataset; or `balanced`, every class equally often (by the dataset's "
        "`targets` or `labels`, else every sample is read once). By seed and epoch: the same on any number of processes.",
    )
    drop_last: bool = refused(True, "Drop an epoch's last, smaller batch. false: train on it, by its exact mean.")
    inputs: fields.Paths | None = consent(
        None,
        "Which parts of a sample (a dict, a dataclass) the model gets, where samples aren't (inputs, target): "
        "`[input_ids, attention_mask]` go to it by these names, a single one (`pixels`) as its only argument. Dotted paths "
        "lead inside; the last part is the name. A task gets (inputs, target) then.",
    )
    target: Text | None = consent(None, "The part of a sample that the loss gets, like `labels`, beside `data.inputs`.")
    augment: list[Component] = consent([], "Augmentations of batches, on the device, with per-sample randomness.")
    normalize: NormalizeConfig | None = consent(
        None,
        "What is subtracted from pictures, and what they are divided by, on the device. null: they stay as they are.",
    )
    collate: Component | None = consent(None, "Makes a batch from a list of samples. null: torch's default_collate.")
    persistent_workers: bool | Auto = harmless("auto", "Keep workers over epochs. `auto`: where there are any.")
    prefetch_factor: Count | None = harmless(None, "Batches that each worker loads in advance. null: two.")
    timeout: fields.AtLeastZero = harmless(0.0, "Seconds to wait for a worker before failing; 0: no limit.")
    worker_start_method: Literal["auto", "fork", "spawn", "forkserver"] = harmless(
        "auto", "How workers are started. `auto`: Python's default."
    )


class HeadConfig(Section):
    """The last layer, replaced for another number of classes. `head: 10` is short for `head: {classes: 10}`."""

    classes: Count = refused(..., "Outputs of the new layer.")
    at: Text | None = refused(None, "Name of the layer, such as `fc` or `classifier.6`. null: the last linear layer.")


_head = BeforeValidator(
    lambda v: {"classes": v} if type(v) is int else v, json_schema_input_type=Count | HeadConfig | None
)


class AppendConfig(Section):
    """A module appended to a torch.nn.Sequential."""

    at: Text = refused(..., "Name of the Sequential, such as `classifier`.")
    name: Text = refused(..., "Name of the new module in it.")
    module: Component = refused(..., "The torch.nn.Module.")


class TransferConfig(Section):
    """Transfer learning: load pretrained weights, change the model's last layers, freeze parameters.

    In this order, at the first start of a run; weights aren't read again when it resumes.
    """

    weights: Text | None = refused(
        None,
        "A state_dict or safetensors file, a run's directory or a checkpoint in it (paths or fsspec URLs), or the name "
        "of torchvision's weights, like `VGG16_Weights.IMAGENET1K_V1` or `DEFAULT` (downloaded by one process per node).",
    )
    strict: bool = harmless(
        True,
        "Every weight must fit, but that of a replaced head. false: those that fit are loaded, and a table lists the others.",
    )
    head: Annotated[HeadConfig | None, _head] = refused(None, about(HeadConfig))
    append: AppendConfig | None = refused(None, about(AppendConfig))
    freeze: fields.Patterns = consent(
        [],
        "Parameters that aren't trained: patterns of their names (`features.*`), of modules (`layer[1-3]`) or of classes "
        "(`BatchNorm2d`). Normalization layers whose parameters are all frozen keep their statistics too.",
    )


_null_is_default = BeforeValidator(lambda v: {} if v is None else v, json_schema_input_type=TransferConfig | None)


class StopWhenConfig(Section):
    """Early stopping: at a threshold, and/or when a metric stops improving."""

    metric: Text = harmless(..., "The monitored metric, e.g. `val/accuracy` or `val/loss`.")
    above: fields.Number | None = harmless(None, "Stop once the metric is above this.")
    below: fields.Number | None = harmless(None, "Stop once the metric is below this.")
    patience: fields.EpochsOrSteps | None = harmless(None, "Stop when the metric hasn't improved for this long.")
    min_delta: fields.AtLeastZero = harmless(0.0, "With patience: a smaller change is no improvement.")
    mode: Literal["auto", "min", "max"] = harmless(
        "auto",
        "With patience: the better direction. `auto`: min for names with loss, error, mae, mse, perplexity, ..., else max.",
    )


class TrainerConfig(Section):
    """The training loop: its length, its precision, and its intervals."""

    duration: Length = harmless(Duration(20, "ep"), "Total length of training, over all starts of this run.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = consent(
        "auto",
        "Precision of forward and backward; weights stay fp32. `auto`: bf16 on CUDA from compute capability 8.0, fp16 "
        "(with loss scaling) on 7.x, fp32 otherwise and on CPU; ACCELERATE_MIXED_PRECISION takes precedence where it is set.",
    )
    stop_at: Length | None = harmless(None, "End this start early, to be resumed; the schedule's horizon stays.")
    micro_batch_size: Count | Auto = harmless(
        "auto",
        "Samples of one forward on one rank; the rest of its share is gradient accumulation. `auto`: the whole share.",
    )
    whole_batch: bool | Auto = consent(
        "auto",
        "The loss compares samples with each other (SimCLR, CLIP, VICReg) and is computed of the outputs of the whole global "
        "batch, over micro-batches and ranks, in two passes. `auto`: where the task says so (`whole_batch = True`).",
    )
    clip_grad_norm: fields.Positive | dict[str, fields.Positive] | None = consent(
        None,
        "Scale the gradient down to at most this 2-norm; of several optimizers each one's, or {NAME: norm} of some.",
    )
    clip_grad_value: fields.Positive | dict[str, fields.Positive] | None = consent(
        None, "Clamp each gradient entry to [-value, value]; or {NAME: value} of some of several optimizers."
    )
    ema_decay: fields.Decay | dict[str, fields.Decay] | None = consent(
        None,
        "Evaluate EMA weights (exponential moving average); or {NAME: decay} of those of some of several optimizers.",
    )
    compile: bool = harmless(False, "Compile the model with torch.compile (dynamic=False).")
    channels_last: bool | Auto = harmless(
        "auto", "Memory format of 4-d tensors. `auto`: on CUDA with 2-d convolutions."
    )
    evaluate_every: Length | None = harmless(Duration(1, "ep"), "When `data.val` is evaluated. null: only at the end.")
    evaluate_at_start: bool = harmless(False, "Evaluate `data.val` before the first step too.")
    log_every: Length = harmless(Duration(50, "step"), "How often a train row is logged: the mean since the last one.")
    train_metrics: list[Text] = harmless(
        [],
        "Names of those of `metrics` that train rows have too, over all samples of the training batches since the last one "
        "(as augmented, and by the model as it trains). Metrics that are sums of a known length: accuracy, mae, ...",
    )
    stop_when: StopWhenConfig | None = harmless(None, about(StopWhenConfig))
    profile: ProfileConfig | None = harmless(None, about(ProfileConfig))
    on_nonfinite: Literal["stop", "skip"] = harmless(
        "stop", "At an infinite or NaN loss or gradient, end the run before the update (stop), or skip the update."
    )


class DistributedConfig(Section):
    """Devices, processes and their communication."""

    device: Literal["auto", "cpu", "cuda"] = harmless("auto", "`auto`: CUDA where there is a GPU, else CPU.")
    strategy: Literal["auto", "ddp", "none"] = harmless(
        "auto",
        "`auto`: none on one process; on several ddp, or, where gradients of up to 1 MiB on the CPU fit one bucket, a pairwise "
        "exchange that is faster. `none` on several processes is an error.",
    )
    reproducibility: Literal["fast", "bitwise"] = consent(
        "fast",
        "`fast`: bitwise identical results on the same number of processes. `bitwise`: on any number, and over any change of it, "
        "with fixed micro-batches (trainer.micro_batch_size); a little slower (docs/reproducibility.md).",
    )
    sync_batchnorm: bool = consent(False, "BatchNorm statistics over all ranks (torch.nn.SyncBatchNorm; CUDA).")
    find_unused_parameters: bool = harmless(False, "For models that don't use all parameters in each forward; slower.")
    bucket_mb: fields.Positive = harmless(25.0, "MiB of gradients in one all-reduce.")
    threads: Count | Auto = harmless(
        "auto",
        "Intra-op threads of a process. `auto`: OMP_NUM_THREADS, else its share of the CPUs (one on CUDA, and for bitwise).",
    )
    deterministic: bool | Auto = harmless("auto", "torch.use_deterministic_algorithms. `auto`: for bitwise.")
    hang_timeout: fields.Time = harmless(Duration(600.0, "s"), "A step or collective that takes longer ends the run.")


class CheckpointConfig(Section):
    """When checkpoints are saved, how many are kept, and how a run resumes."""

    every: fields.Lengths = harmless([Duration(1, "ep"), Duration(900.0, "s")], "When to save: one duration or more.")
    keep_last: Count = harmless(3, "How many of the newest checkpoints are kept.")
    keep_best: Text | None = harmless(
        "auto",
        "Also keep the best by this metric, e.g. `val/accuracy` (`min val/loss`, `max val/f1` to say which direction is "
        "better, else as in stop_when.mode). `auto`: the first of `metrics` on val, or val/loss without metrics; "
        "nothing without data.val, or with several optimizers and no metrics. null: none.",
    )
    what: Literal["all", "trained"] = refused(
        "all",
        "`trained`: checkpoints and model.pt leave out parameters that are frozen and as the config makes them (the base of "
        "adapters). They are kept by hash, made again from `model` and transfer.weights, and compared when weights are loaded.",
    )
    asynchronous: bool = harmless(True, "Write in the background; training waits only for a copy to host memory.")
    on_error: Literal["fail", "warn"] = harmless(
        "fail",
        "What a failed save does, once retries (a minute for a store) haven't helped. `fail`: the run ends. `warn`: a "
        "warning, and training continues; a stop whose save fails is always a failure.",
    )
    resume: Text = harmless(
        "auto",
        "`auto`: resume from the newest good checkpoint of this run, if any. `never`: refuse to start a run that has "
        "checkpoints. Otherwise the path of a checkpoint or run to start from.",
    )
    accept_changes: bool = harmless(False, "Resume with changed values that need consent (docs/config.md lists them).")


class Config(Section):
    """A training run. `_target_` names any class or function by its import path, with its arguments beside it."""

    seed: fields.Seed = refused(0, "The seed of everything random: weights, order, augmentation, dropout.")
    run: RunConfig = Field(default_factory=RunConfig, description=about(RunConfig))
    data: DataConfig = Field(description=about(DataConfig))
    model: Component = consent(..., "The nn.Module, with its constructor's arguments.")
    model_init: list[Component] = refused(
        [],
        "Functions that initialize parameters before training, in order, each with the key `match`, a pattern or a list of "
        "patterns of parameters as in transfer.freeze: {match: Conv2d.weight, _target_: torch.nn.init.kaiming_normal_}.",
    )
    transfer: Annotated[TransferConfig, _null_is_default] = Field(
        default_factory=TransferConfig, description=about(TransferConfig)
    )
    task: Component | None = consent(
        None,
        "How a batch becomes a loss, where it isn't `loss(model(inputs), target)`: one of `dist_train.tasks`, or a class with "
        "`step(model, batch)` and `predict(model, batch)` (docs/tasks.md).",
    )
    loss: Component | None = consent(
        None, "Class, function or factory; called with (output, target). Required without `task`."
    )
    val_loss: Component | None = consent(
        None,
        "The loss of evaluation, where it isn't that of training (cross-entropy beside mixup's soft targets, say).",
    )
    metrics: list[Metric] = harmless(
        [],
        "Names of built-in metrics, or components (torchmetrics classes, say). Reserved keys beside either: `name`, what it is "
        f"recorded as, and `of`, what it is computed of: {OF}.",
    )
    optimizer: fields.Optimizer = consent(
        ...,
        "Called with the parameters. Reserved keys: `groups`, a list of {match: pattern or list of patterns of names or classes "
        "as in transfer.freeze, and/or ndim_below: dimensions, then the group's own options}, e.g. {match: 'head.*', lr: 0.1} "
        "or, for norms and biases, {ndim_below: 2, weight_decay: 0}; a parameter is in the first group that matches it. "
        "`layer_decay`: the lr of each layer is that of the next one times this (BEiT, MAE: 0.75), in every group and under any "
        "schedule; the layers are those of timm's group_matcher, else the numbered blocks by their names (encoder.layer.3, h.3, "
        "layers.3, blocks.3), else the modules with parameters in their order. "
        "`named_parameters: true` passes (name, parameter) pairs, as a class whose first argument has this name gets them. A "
        "fused kernel is used where there is one, unless `fused` or `foreach` is given. Several optimizers by name: "
        "{generator: {_target_: ..., match: 'G.*'}, discriminator: {...}}, each with the parameters that it matches first; one "
        "without `match` gets the rest. All of them move on one loss (Muon and AdamW), or each on its own, where the task's "
        "`step` takes the name of an optimizer as its third argument (GANs).",
    )
    scheduler: fields.Scheduler | None = consent(
        None,
        "Called with the optimizer; nested schedulers get it too. Reserved keys: `every` (how often it is stepped, "
        "1step or 1ep, say; by default 1step for OneCycleLR, CyclicLR, WarmupCosine and those of transformers, else "
        "1ep; required for LambdaLR, for mixtures, and for functions that get numbers; ReduceLROnPlateau is stepped by "
        "evaluations), `metric` (what ReduceLROnPlateau monitors, by default the metric of checkpoint.keep_best; its "
        "`mode` follows from it), `horizon` (the duration that `total_steps` counts, by default trainer.duration at the "
        "first start), `warmup` (500step, 2ep, or {duration: 500step, from: 0.01}: the lr first rises linearly, each optimizer "
        "step, from that share of it, by default one step's, to the lr; then the scheduler begins, and counts from there). "
        "Arguments may be `total_steps`, `steps_per_epoch`, durations (`T_max: 20ep`, `milestones: [500step]`) and "
        "`total_steps - 5ep`: they are replaced by the numbers, counted in `every`: with 1ep, `total_steps` is the number of "
        "epochs. A warm-up isn't part of `total_steps`. Of several optimizers: one for each, or several by their names.",
    )
    callbacks: list[Component] = consent([], "Objects with hooks (dist_train.callbacks.Callback), called in order.")
    trainer: TrainerConfig = Field(default_factory=TrainerConfig, description=about(TrainerConfig))
    distributed: DistributedConfig = Field(default_factory=DistributedConfig, description=about(DistributedConfig))
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description=about(CheckpointConfig))
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description=about(TrackingConfig))
    debug: DebugConfig = Field(default_factory=DebugConfig, description=about(DebugConfig))

    _places: dict[fields.Key, Place] = PrivateAttr(default_factory=dict)

    @property
    def places(self) -> dict[fields.Key, Place]:
        """Where each key was written, by its path (see `source.Place`)."""
        return self._places

    def from_source(self, source: str | None, places: dict[fields.Key, Place], name: str) -> Config:
        """The same with its `places`, the run's name (by default the file's, else `name`) and absolute code paths."""
        name = self.run.name or (Path(source).stem if source is not None else name)
        paths = list(dict.fromkeys([os.path.abspath(os.path.dirname(source or "")), os.getcwd()]))
        if self.run.code_paths:
            written = nearest(places, ("run", "code_paths")).source
            origin = "" if written in (COMMAND_LINE, DICT) else os.path.dirname(written)
            with contextlib.suppress(ValueError):  # a variable that isn't set has been reported
                paths = [os.path.abspath(os.path.join(origin, fields.expand_path(p))) for p in self.run.code_paths]
        config = self.model_copy(update={"run": self.run.model_copy(update={"name": name, "code_paths": paths})})
        config._places = places
        return config

    def where(self, key: str) -> str:
        """Where a dotted key, or what holds it, was written: `file:line`, `command line` or `dict`."""
        return str(nearest(self._places, fields.keyed(key)))

    @property
    def has_live_objects(self) -> bool:
        """Whether some component is an object (or class) handed over from Python, which no file can name."""
        return next(fields.live_objects(self), None) is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars that YAML and JSON can hold; a live object is {"_live_": its class}."""
        return {name: fields.plain(value) for name, value in self}

    def to_yaml(self) -> str:
        """The resolved config as YAML; `load_config` reads it back to an equal config."""
        return dump(self.to_dict())

    def get(self, key: str) -> Any:
        """The plain value at a dotted key (`optimizer.lr`, `data.augment.0.pixels`). Raises KeyError(key)."""
        value: Any = self.to_dict()
        try:
            for part in key.split("."):
                value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise KeyError(key) from None
        return value


KEYS = dict(fields.walk(Config))  # every dotted key of the schema, with its field
