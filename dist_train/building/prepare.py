"""From a config to its model and datasets: what is downloaded once per node, and what is changed before training."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import find_at
from dist_train.config.components import build, build_callable, is_spec, locate, reserved
from dist_train.config.errors import ConfigError
from dist_train.config.fields import expand_argument, expand_path
from dist_train.data.errors import DataError, dataset_name
from dist_train.data.loader import EvalLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions, dataset_length, in_tensors, make_batch
from dist_train.data.stream import is_stream, stream_length
from dist_train.data.weights import Weights
from dist_train.files import StorageError
from dist_train.models import transfer
from dist_train.models.weights import is_folder, is_torchvision_name, read_file, read_torchvision
from dist_train.optim.parameters import check_parameters
from dist_train.runtime.seeding import seed_everything, undisturbed_generators
from dist_train.runtime.storage import open_storage
from dist_train.task.batch import NamedParts, tensors_in

if TYPE_CHECKING:
    from dist_train.config.schema import Config, DataConfig
    from dist_train.runtime.world import World

T = TypeVar("T")


@contextlib.contextmanager
def building(key: str) -> Iterator[None]:
    """Turn errors of a component's own code, while it is being built, into errors of its key in the config.

    Raises:
        ConfigError: naming key, exception and the line that raised.
    """
    try:
        yield
    except ConfigError:
        raise
    except DataError as error:
        head, _, rest = str(error).partition(": ")
        named = head.startswith("data.") and " " not in head  # it names its own key
        raise ConfigError.single(head if named else key, rest if named else str(error)) from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"could not be built: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        raise ConfigError.single(key, message) from error


def build_dataset(config: Config, split: str, world: World | None = None) -> Any:
    """The dataset of a split that the config has; with a `world`, one process per node downloads it (`download: true`).

    Raises:
        ConfigError: it can't be built, or its files aren't there; with their names and place.
    """
    spec = getattr(config.data, split)
    seed_everything(config.seed)
    with building(f"data.{split}"):
        try:
            return in_tensors(once_per_node(lambda: build(spec), world if _downloads(spec) else None))
        except (OSError, RuntimeError) as error:
            for inner in _specs(spec):
                root, dataset = inner.get("root"), locate(inner["_target_"])
                if isinstance(root, str):
                    root = expand_argument(root)
                    if not all(map(os.path.exists, [root, *expected_files(dataset, root)])):
                        raise missing_data(split, dataset, root, error) from error
            raise


def _specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every component in a value, the outer ones first."""
    if is_spec(value):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _specs(item)


def _downloads(spec: Any) -> bool:
    return any(inner.get("download") is True for inner in _specs(spec))


def once_per_node(make: Callable[[], T], world: World | None) -> T:
    """`make()` in turns: rank 0, then the first rank of every other node, then all others, which find the files there.

    Rank 0 goes alone because nodes may share a disk, where two downloads would write into each other. Every rank
    takes part in all barriers, also one whose `make` failed.
    """
    if world is None or world.size == 1:
        return make()
    turn = 0 if world.is_main else 1 if world.placement.local_rank == 0 else 2
    for _ in range(turn):
        world.barrier()
    try:
        return make()
    finally:
        for _ in range(2 - turn):
            world.barrier()


def expected_files(dataset: Any, root: str | os.PathLike[str]) -> list[str]:
    """Where torchvision's CIFAR and MNIST classes, and ours of them, look for their files; [] for other classes."""
    names: list[str] = []
    dataset = getattr(dataset, "torchvision_class", lambda: dataset)()
    if hasattr(dataset, "base_folder") and hasattr(dataset, "train_list"):  # CIFAR10, CIFAR100
        names = [os.path.join(dataset.base_folder, entry[0]) for entry in dataset.train_list + dataset.test_list]
    elif isinstance(getattr(dataset, "resources", None), list):  # MNIST and its relatives
        names = [os.path.join(dataset.__name__, "raw", entry[0]) for entry in dataset.resources]
    return [os.path.join(root, name) for name in names]


def missing_data(split: str, dataset: type, root: str | os.PathLike[str], error: BaseException) -> DataError:
    """The error of a dataset class that didn't find its files in its argument `root`, and couldn't download them."""
    absent = [file for file in expected_files(dataset, root) if not os.path.exists(file)]
    reason = next(iter(str(error).splitlines()), "")
    text = f"data.{split}: {dataset.__name__} has no data in {os.path.abspath(root)}: {type(error).__name__}: {reason}"
    if not absent:  # a class of the user's own, say
        return DataError(f"{text}; relative paths count from the working directory")
    text += f"; expected {len(absent)} files that aren't there: {', '.join(absent)}"  # MNIST takes them unpacked, too
    return DataError(f"{text}; with a network, download: true fetches them; without one, copy them there")


def first_samples(config: Config, dataset: Any, count: int) -> Any:
    """The first `count` samples of a dataset or stream, or all where there are fewer, collated."""
    collate = build_callable(config.data.collate) if config.data.collate is not None else make_batch
    if is_stream(dataset):
        return collate(list(itertools.islice(iter(dataset), count)))
    return collate([dataset[index] for index in range(min(count, len(dataset)))])


def named_parts(config: Config) -> NamedParts | None:
    """What makes (inputs, target) of a batch whose parts have names; None where batches are pairs, or a task's matter."""
    inputs, target = config.data.inputs, config.data.target
    return None if inputs is None or target is None else NamedParts(inputs, target)


def loader_options(config: Config, world: World) -> LoaderOptions:
    """How this rank reads its datasets."""
    with building("data.collate"):
        collate = build_callable(config.data.collate) if config.data.collate is not None else None
    place = (world.rank, world.size, world.placement.local_size)
    return LoaderOptions(config.data, config.seed, world.device, *place, collate, world.all_gather)


def eval_loader(config: Config, world: World, dataset: Any, split: str = "val") -> EvalLoader:
    """The loader of this rank for a dataset that isn't trained on.

    Raises:
        ConfigError: it is empty, or can't be read.
    """
    if not is_stream(dataset) and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ConfigError.single(f"data.{split}", "expected at least 1 sample, found 0")
    with building(f"data.{split}"):
        return EvalLoader(dataset, config.data.eval_batch_size, loader_options(config, world), split)


def check_pictures(config: Config, world: World, dataset: Any, split: str, move: Callable[..., Any]) -> str:
    """Move a sample to the device, so that what `data.normalize` doesn't fit shows before anything is started. All ranks call it.

    Args:
        move: `ModelParts.move`.

    Returns:
        A warning of pictures that seem to be normalized already; "" for none.

    Raises:
        ConfigError: it isn't a picture of so many channels, on rank 0, which reads it as evaluation does.
    """

    def look() -> str:
        loader = eval_loader(config, world, dataset, split)
        with undisturbed_generators(world.device, dataset), contextlib.closing(loader.some(1)) as given:
            try:
                with building(f"data.{split}"):
                    batch = next(given)[1]
                    move(batch, labeled=False)
            except ConfigError as error:
                if isinstance(error.__cause__, DataError):
                    raise
                return ""  # reported where the samples are read
        pictures = [tensor for tensor in tensors_in(batch) if tensor.dim() == 4 and tensor.is_floating_point()]
        if not pictures or pictures[0].min() >= 0:
            return ""
        return (
            f"data.normalize: the pictures of data.{split} are floats from {float(pictures[0].min()):.3g} on, as if a transform "
            f"had normalized them already: leave one of the two out"
        )

    return world.on_main(look) if config.data.normalize is not None and not is_stream(dataset) else ""


def build_plan(
    dataset: Any, *, seed: int, config: DataConfig, weights: Weights | None = None, leaf_size: int | None = None
) -> Plan:
    """The plan of the training data by the `data` section's global_batch_size, shuffle, drop_last and steps_per_epoch.

    A stream comes in its own order: it isn't shuffled, and its epoch is `steps_per_epoch` steps, else its own length.
    Raises DataError for no samples, no full batch, or a stream of unknown length.
    """
    size, steps = config.global_batch_size, config.steps_per_epoch
    if not is_stream(dataset):
        samples = dataset_length(dataset)
        size = samples if size == "all" else int(size)
        return Plan(seed, samples, size, config.shuffle, config.drop_last, weights, leaf_size)
    if leaf_size is not None:
        what = "distributed.reproducibility=bitwise needs a map-style dataset (__len__ and __getitem__)"
        raise DataError(f"data.train: {what}, found the IterableDataset {dataset_name(dataset)}")
    if size == "all":
        raise DataError(f"data.global_batch_size: all needs a map-style dataset, found {dataset_name(dataset)}")
    length = stream_length(dataset) if steps is None else steps * int(size)
    if length is None:
        raise DataError(
            f"data.train: {dataset_name(dataset)} is an IterableDataset without a length: give it a __len__ (samples "
            f"of one pass), or set data.steps_per_epoch"
        )
    return Plan(seed, length, int(size), shuffle=False, drop_last=config.drop_last)


def build_model(
    config: Config, world: World | None = None, *, fresh: bool = False, notes: list[str] | None = None
) -> nn.Module:
    """The model with its initial weights, a function of the run's seed, changed as `transfer` and `model_init` say.

    Args:
        world: one process per node fetches what the model needs; None for a process alone.
        fresh: load `transfer.weights`; otherwise a checkpoint's weights follow (but with `checkpoint.what: trained` only the
            trained ones, so that they are loaded at each start).
        notes: gets lines for the user, on what `transfer` did.

    Raises:
        ConfigError: it can't be built, or something doesn't fit it.
    """
    spec, changes, notes = config.model, config.transfer, [] if notes is None else notes
    hub = any(str(inner["_target_"]).startswith("torchvision.") for inner in _specs(spec))
    fetches = hub and is_spec(spec) and spec.get("weights") is not None
    seed_everything(config.seed)
    with building("model"), _only_weights() if hub else contextlib.nullcontext():
        model = once_per_node(lambda: build(spec), world if fetches else None)
    if not isinstance(model, nn.Module):
        message = f"expected a torch.nn.Module, but {config.get('model._target_')} gave {type(model).__name__}"
        raise ConfigError.single("model", message)
    check_parameters(model)
    head = transfer.find_head(model, changes.head.at) if changes.head is not None else None
    if changes.weights is not None and (fresh or config.checkpoint.what == "trained"):
        content = _read_weights(changes.weights, config, world)
        notes += transfer.load_weights(model, content, changes.weights, strict=changes.strict, replaced=head)
    if head is not None and changes.head is not None:
        notes.append(transfer.replace_head(model, head, changes.head.classes))
    if changes.append is not None:
        with building("transfer.append.module"):
            module = build(changes.append.module)
        notes.append(transfer.append_module(model, changes.append.at, changes.append.name, module))
    for index, rule in enumerate(config.model_init):
        fill, extra = reserved(rule, {"match"})
        patterns = [extra["match"]] if isinstance(extra["match"], str) else extra["match"]
        transfer.initialize(model, patterns, functools.partial(build, fill), f"model_init.{index}")
    if changes.freeze:
        transfer.freeze(model, changes.freeze)
    return model


def frozen_source(config: Config) -> str:
    """The key that gives a model its frozen weights."""
    return "model" if config.transfer.weights is None else "transfer.weights"


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Load files in torch.hub's cache without running any code in them, which torchvision's builders don't ask for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _read_weights(weights: str, config: Config, world: World | None) -> Any:
    """The content of `transfer.weights`: torchvision's, a file's, or a run's (its newest checkpoint's before it has ended)."""
    location = expand_path(weights)
    if is_torchvision_name(weights) and not os.path.exists(weights):
        builder = str(config.model["_target_"]).rpartition(".")[2] if is_spec(config.model) else ""
        return once_per_node(lambda: read_torchvision(weights, builder), world)
    if not is_folder(location):
        return read_file(location)
    storage = open_storage(location)
    try:
        return read_file(storage.join("model.pt")) if storage.exists("model.pt") else find_at(location).load("model")
    except (CheckpointError, StorageError) as error:
        message = f"{weights} holds neither a model.pt nor a valid checkpoint: {error}"
        raise ConfigError.single("transfer.weights", message) from error
