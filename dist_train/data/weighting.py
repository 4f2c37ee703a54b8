"""Where sampling weights come from: a list, a file, a function of the dataset, or its labels (`data.weights: balanced`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from dist_train.config.components import build
from dist_train.config.fields import expand_path
from dist_train.data.errors import DataError, SampleError, dataset_name, describe_error
from dist_train.data.plan import rank_slice
from dist_train.data.reading import LoaderOptions, dataset_length, is_hugging_face
from dist_train.data.stream import is_stream
from dist_train.data.weights import Weights
from dist_train.runtime.seeding import seed_everything, seed_sample
from dist_train.task.batch import NamedParts, is_pair

_LABEL_NAMES = ("targets", "labels")


def sampling_weights(dataset: Any, options: LoaderOptions) -> Weights | None:
    """What `data.weights` says of the training data; None where it is null. A collective: all ranks call it.

    Raises:
        DataError: they can't be read, don't fit the dataset, or differ between ranks.
    """
    setting = options.config.weights
    if setting is None:
        return None
    if is_stream(dataset):
        raise DataError(
            f"data.weights: samples are drawn by weight from a map-style dataset, but {dataset_name(dataset)} is an "
            f"IterableDataset, which comes in an order of its own: draw inside the stream, or leave data.weights out"
        )
    length = dataset_length(dataset)
    if setting == "balanced":
        weights = _balanced(dataset, length, options)
    elif isinstance(setting, str):
        weights = Weights.of(_file(Path(expand_path(setting))), length, setting)
    elif isinstance(setting, list):
        weights = Weights.of(setting, length)
    else:
        seed_everything(options.seed)
        values = build(setting, dataset)
        origin = setting["_target_"] if isinstance(setting, dict) else getattr(setting, "__qualname__", "a function")
        weights = Weights.of(
            values.detach().cpu().numpy() if isinstance(values, Tensor) else values, length, str(origin)
        )
    digests = options.all_gather(weights.digest)
    if len({*digests}) > 1:
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise DataError(
            f"data.weights: {weights.origin} gives rank {other} other weights than rank 0: give all ranks the same file, and "
            f"let a function draw only from torch, numpy or random, which are seeded before it is called"
        )
    return weights


def _file(path: Path) -> Any:
    """The numbers in a .npy file, or in a text with one on each line; the first line of a .csv may be a name."""
    if not path.is_file():
        raise DataError(f"data.weights: no file {path} (looked in {path.absolute().parent})")
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"data.weights: {path} can't be read: {error}") from error
    if path.suffix not in (".csv", ".txt"):
        raise DataError(f"data.weights: expected a .npy, .csv or .txt file, found {path}")
    numbers: list[float] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            numbers += [float(line)] if line.strip() else []
        except ValueError:
            if number > 1 or path.suffix != ".csv":
                message = f"expected one number on each line, found {line.strip()[:40]!r}"
                raise DataError(f"data.weights: {path}:{number}: {message}") from None
    return numbers


def _balanced(dataset: Any, length: int, options: LoaderOptions) -> Weights:
    """1 / (samples of its class) for each sample: every class is drawn equally often."""
    data = options.config
    parts = NamedParts(data.inputs, data.target) if data.inputs is not None and data.target is not None else None
    labels, how = known_labels(dataset, data.target), "its labels"
    if labels is not None and not _agree(dataset, labels, options.seed, parts):
        labels = None  # its samples have other targets than the attribute: a subclass changes them, say
    if labels is None:
        mine = rank_slice(length, options.rank, options.world_size)
        read = [_label(dataset, index, options.seed, parts) for index in range(length)[mine]]
        labels = np.asarray([label for part in options.all_gather(read) for label in part])
        how = "labels that were read from every sample once (an attribute `targets` would save that)"
    if labels.ndim != 1 or len(labels) != length or labels.dtype.kind not in "biuUS":
        found = f"{labels.dtype} of shape {labels.shape}"
        raise DataError(
            f"data.weights: balanced needs a class (an integer, a string) for each of the {length:,} samples of "
            f"{dataset_name(dataset)}, found {found}: give the weights as a list, a file or a function of the dataset"
        )
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sizes = f"{len(counts)} classes of {counts.min():,} to {counts.max():,} samples"
    return Weights.of(1.0 / counts[numbers], length, f"balanced over {sizes}, by {how}")


def known_labels(dataset: Any, column: str | None = None) -> np.ndarray | None:
    """The labels that a dataset has without being read, (length,); None if it has none.

    They are its attribute `targets` or `labels`, of a `datasets.Dataset` a column (by default `label` or `labels`), and through
    a `Subset` those of its samples. With a `target_transform` the attribute holds something else than the samples.
    """
    if isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        inner = known_labels(dataset.dataset, column)
        return None if inner is None else inner[np.asarray(dataset.indices)]
    if is_hugging_face(dataset):
        names = [column] if column is not None else ["label", "labels"]
        name = next((name for name in names if name in dataset.column_names), None)
        return None if name is None else np.asarray(dataset.with_format("numpy", columns=[name])[:][name])
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in _LABEL_NAMES if column is None else (column,):
        labels = getattr(dataset, name, None)
        if labels is not None and hasattr(labels, "__len__") and len(labels) == len(dataset):
            return np.asarray(labels)
    return None


def _agree(dataset: Any, labels: np.ndarray, seed: int, parts: NamedParts | None) -> bool:
    """Whether some samples, spread over the dataset, are of the classes that an attribute says, by whatever name."""
    places = np.unique(np.linspace(0, len(labels) - 1, 16).astype(int))
    pairs = {(str(labels[index]), str(_label(dataset, int(index), seed, parts))) for index in places}
    return len(pairs) == len({mine for mine, _ in pairs}) == len({theirs for _, theirs in pairs})


def _label(dataset: Any, index: int, seed: int, parts: NamedParts | None) -> Any:
    seed_sample(seed, -1, index)  # as in evaluation
    try:
        sample = dataset[index]
        if parts is None and not is_pair(sample):
            raise ValueError("a sample isn't (input, target): set data.inputs and data.target")
        label = parts(sample)[1] if parts is not None else sample[1]
        return label.item() if isinstance(label, Tensor | np.generic) else label
    except (Exception, SystemExit) as error:
        what = f"data.weights: reading the label of sample {index} of {dataset_name(dataset)}"
        raise SampleError(f"{what} failed: {describe_error(error)}") from error
