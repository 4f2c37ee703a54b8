"""Data: the plan of samples, the sampler, loaders, datasets and batched augmentation."""

from dist_train.data.augment import (
    Augment,
    Augmentation,
    CutMix,
    Draws,
    Mixup,
    OneOf,
    RandomErasing,
    RandomHorizontalFlip,
    RandomShift,
)
from dist_train.data.datasets import Digits
from dist_train.data.errors import DataError, SampleError
from dist_train.data.loader import EvalLoader, MicroBatch, StepWork, TrainLoader, build_train_loader
from dist_train.data.plan import EvalPlan, Plan, parts, share, smallest_part, split
from dist_train.data.sampler import Request, StepSampler
from dist_train.data.workers import resolve_workers, usable_cpus

__all__ = [
    "Augment",
    "Augmentation",
    "CutMix",
    "DataError",
    "Digits",
    "Draws",
    "EvalLoader",
    "EvalPlan",
    "MicroBatch",
    "Mixup",
    "OneOf",
    "Plan",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomShift",
    "Request",
    "SampleError",
    "StepSampler",
    "StepWork",
    "TrainLoader",
    "build_train_loader",
    "parts",
    "resolve_workers",
    "share",
    "smallest_part",
    "split",
    "usable_cpus",
]
