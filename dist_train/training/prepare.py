"""From a config to its model and datasets: what is fetched once per node, and what is changed before training."""

from __future__ import annotations

import contextlib
import functools
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
from dist_train.data.download import downloads, expected_files, missing_data, once_per_node
from dist_train.data.errors import DataError
from dist_train.data.loader import EvalLoader, Reading
from dist_train.data.passes import is_stream
from dist_train.files import StorageError
from dist_train.models import transfer
from dist_train.models.weights import is_folder, is_torchvision_name, read_file, read_torchvision
from dist_train.runtime.seeding import seed_everything
from dist_train.runtime.storage import open_storage
from dist_train.step.parameters import check_parameters

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

T = TypeVar("T")


@contextlib.contextmanager
def building(key: str) -> Iterator[None]:
    """Errors of a component's own code, while it is being built, as errors of its key in the config.

    Raises:
        ConfigError: naming key, exception and the line that raised.
    """
    try:
        yield
    except ConfigError:
        raise
    except DataError as error:
        head, _, rest = str(error).partition(": ")
        named = head.startswith("data.") and " " not in head  # it says its own key
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
            return _in_turns(lambda: build(spec), world if downloads(spec) else None)
        except (OSError, RuntimeError) as error:
            for inner in _specs(spec):
                root, dataset = inner.get("root"), locate(inner["_target_"])
                if isinstance(root, str):
                    root = expand_argument(root)
                    files = [root, *expected_files(dataset, root)]
                    if not all(map(os.path.exists, files)):
                        raise missing_data(split, dataset, root, error) from error
            raise


def reading_of(config: Config, world: World) -> Reading:
    """How this rank reads its datasets."""
    with building("data.collate"):
        collate = build_callable(config.data.collate) if config.data.collate is not None else None
    place = (world.rank, world.size, world.placement.local_size)
    return Reading(config.data, config.seed, world.device, *place, collate, world.all_gather)


def eval_loader(config: Config, world: World, dataset: Any, split: str = "val") -> EvalLoader:
    """The loader of this rank for a dataset that isn't trained on.

    Raises:
        ConfigError: it is empty, or can't be read.
    """
    if not is_stream(dataset) and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ConfigError.single(f"data.{split}", "expected at least 1 sample, found 0")
    with building(f"data.{split}"):
        return EvalLoader(dataset, config.data.eval_batch_size, reading_of(config, world), split)


def build_model(
    config: Config, world: World | None = None, *, fresh: bool = False, notes: list[str] | None = None
) -> nn.Module:
    """The model with its first weights, a function of the run's seed, with what `transfer` and `model_init` change.

    Args:
        world: one process per node fetches what the model needs; None for a process alone.
        fresh: load `transfer.weights`; otherwise a checkpoint's weights follow.
        notes: gets lines for the person, on what `transfer` did.

    Raises:
        ConfigError: it can't be built, or something doesn't fit it.
    """
    spec, wanted, notes = config.model, config.transfer, [] if notes is None else notes
    hub = any(str(inner["_target_"]).startswith("torchvision.") for inner in _specs(spec))
    fetches = hub and is_spec(spec) and spec.get("weights") is not None
    seed_everything(config.seed)
    with building("model"), _only_weights() if hub else contextlib.nullcontext():
        model = _in_turns(lambda: build(spec), world if fetches else None)
    if not isinstance(model, nn.Module):
        message = f"expected a torch.nn.Module, but {config.get('model._target_')} gave {type(model).__name__}"
        raise ConfigError.single("model", message)
    check_parameters(model)
    head = transfer.find_head(model, wanted.head.at) if wanted.head is not None else None
    if wanted.weights is not None and fresh:
        content = _read_weights(wanted.weights, config, world)
        notes += transfer.load_weights(model, content, wanted.weights, strict=wanted.strict, replaced=head)
    if head is not None and wanted.head is not None:
        notes.append(transfer.replace_head(model, head, wanted.head.classes))
    if wanted.append is not None:
        with building("transfer.append.module"):
            module = build(wanted.append.module)
        notes.append(transfer.append_module(model, wanted.append.at, wanted.append.name, module))
    for index, rule in enumerate(config.model_init):
        fill, extra = reserved(rule, {"match"})
        patterns = [extra["match"]] if isinstance(extra["match"], str) else extra["match"]
        transfer.initialise(model, patterns, functools.partial(build, fill), f"model_init.{index}")
    if wanted.freeze:
        transfer.freeze(model, wanted.freeze)
    return model


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Files in torch.hub's cache are loaded without running code of theirs: torchvision's builders don't ask for that."""
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


def _in_turns(make: Callable[[], T], world: World | None) -> T:
    """`make()` in one process per node while the others wait, and then in these, which find on disk what was fetched."""
    if world is None or world.size == 1:
        return make()
    return once_per_node(make, rank=world.rank, local_rank=world.placement.local_rank, barrier=world.barrier)


def _specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every component in a value, the outer ones first."""
    if is_spec(value):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _specs(item)


def _read_weights(weights: str, config: Config, world: World | None) -> Any:
    """What is at `transfer.weights`: torchvision's, a file, or a run's final weights (a checkpoint's where it has none yet)."""
    location = expand_path(weights)
    if is_torchvision_name(weights) and not os.path.exists(weights):
        builder = str(config.model["_target_"]).rpartition(".")[2] if is_spec(config.model) else ""
        return _in_turns(lambda: read_torchvision(weights, builder), world)
    if not is_folder(location):
        return read_file(location)
    storage = open_storage(location)
    try:
        return read_file(storage.join("model.pt")) if storage.exists("model.pt") else find_at(location).load("model")
    except (CheckpointError, StorageError) as error:
        message = f"{weights} holds neither a model.pt nor a whole checkpoint: {error}"
        raise ConfigError.single("transfer.weights", message) from error
