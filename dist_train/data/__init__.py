"""Data: the plan of samples, the sampler, loaders, datasets and batched augmentation."""

from dist_train.data.arrays import Arrays
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
from dist_train.data.datasets import Digits, Gaussians, RandomSplit
from dist_train.data.download import downloads, missing_data, once_per_node
from dist_train.data.errors import DataError, SampleError
from dist_train.data.loader import EvalLoader, MicroBatch, StepWork, TrainLoader, build_plan, build_train_loader
from dist_train.data.plan import EvalPlan, Plan, parts, share, smallest_part, split
from dist_train.data.sampler import Request, StepSampler
from dist_train.data.stream import is_stream, stream_notes
from dist_train.data.tables import CSV
from dist_train.data.workers import resolve_workers, usable_cpus

__all__ = [
    "Arrays",
    "Augment",
    "Augmentation",
    "CSV",
    "CutMix",
    "DataError",
    "Digits",
    "Draws",
    "EvalLoader",
    "EvalPlan",
    "Gaussians",
    "MicroBatch",
    "Mixup",
    "OneOf",
    "Plan",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomShift",
    "RandomSplit",
    "Request",
    "SampleError",
    "StepSampler",
    "StepWork",
    "TrainLoader",
    "build_plan",
    "build_train_loader",
    "downloads",
    "is_stream",
    "missing_data",
    "once_per_node",
    "parts",
    "resolve_workers",
    "share",
    "smallest_part",
    "split",
    "stream_notes",
    "usable_cpus",
]
