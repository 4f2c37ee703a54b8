"""Between a config and its model and datasets: what is fetched once per node, and what is changed before training."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import find_at
from dist_train.config.components import build, is_spec, locate, reserved
from dist_train.config.errors import ConfigError
from dist_train.data.download import downloads, expected_files, missing_data, once_per_node
from dist_train.models import transfer
from dist_train.models.weights import is_folder, is_torchvision_name, read_file, read_torchvision
from dist_train.runtime.storage import Storage, StorageError

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.runtime.world import World

T = TypeVar("T")


def in_turns(make: Callable[[], T], world: World | None) -> T:
    """`make()` in one process per node while the others wait, and then in these, which find on disk what was fetched."""
    if world is None or world.size == 1:
        return make()
    return once_per_node(make, rank=world.rank, local_rank=world.placement.local_rank, barrier=world.barrier)


def fetch_model(spec: Any, world: World | None) -> Any:
    """The model of a spec; one of torchvision's that brings `weights` of its own is built by one process per node first."""
    fetches = is_spec(spec) and str(spec["_target_"]).startswith("torchvision.") and spec.get("weights") is not None
    return in_turns(lambda: build(spec), world) if fetches else build(spec)


def fetch_dataset(spec: Any, split: str, world: World | None) -> Any:
    """The dataset of a split; one that says `download: true` is downloaded by one process per node.

    Raises:
        DataError: its files aren't there, with their names and place.
        Exception: what else its class raises.
    """
    try:
        return in_turns(lambda: build(spec), world) if downloads(spec) else build(spec)
    except (OSError, RuntimeError) as error:
        for inner in _specs(spec):
            root = inner.get("root")
            if isinstance(root, str):
                dataset = locate(inner["_target_"])
                if not os.path.isdir(root) or any(not os.path.exists(file) for file in expected_files(dataset, root)):
                    raise missing_data(split, dataset, root, error) from error
        raise


def _specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every component in a value, the outer ones first."""
    if is_spec(value):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _specs(item)


def prepare_model(model: nn.Module, config: Config, world: World | None) -> list[str]:
    """Apply `transfer` and `model_init` to a new model, in place: weights, head, appended module, first values, freezing.

    Args:
        world: None where the weights come from a checkpoint later: `transfer.weights` isn't read then.

    Returns:
        Lines for the person.

    Raises:
        ConfigError: something doesn't fit this model.
    """
    wanted, notes = config.transfer, []
    head = transfer.find_head(model, wanted.head.at) if wanted.head is not None else None
    if wanted.weights is not None and world is not None:
        content = _read_weights(wanted.weights, config, world)
        notes += transfer.load_weights(model, content, wanted.weights, strict=wanted.strict, replaced=head)
    if head is not None and wanted.head is not None:
        notes.append(transfer.replace_head(model, head, wanted.head.classes))
    if wanted.append is not None:
        try:
            module = build(wanted.append.module)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError.single("transfer.append.module", f"could not be built: {error}") from error
        notes.append(transfer.append_module(model, wanted.append.at, wanted.append.name, module))
    for index, rule in enumerate(config.model_init):
        fill, extra = reserved(rule, {"match"})
        patterns = [extra["match"]] if isinstance(extra["match"], str) else extra["match"]
        transfer.initialise(model, patterns, functools.partial(build, fill), f"model_init.{index}")
    if wanted.freeze:
        transfer.freeze(model, wanted.freeze)
    return notes


def _read_weights(weights: str, config: Config, world: World) -> Any:
    if is_folder(weights):
        return _read_run(weights)
    if is_torchvision_name(weights) and not os.path.exists(weights):
        builder = str(config.model["_target_"]).rpartition(".")[2] if is_spec(config.model) else ""
        return in_turns(lambda: read_torchvision(weights, builder), world)
    return read_file(os.path.expanduser(weights))


def _read_run(location: str) -> Any:
    """The final weights of a run, or those of a checkpoint where it has none yet or is one."""
    storage = Storage(os.path.expanduser(location))
    try:
        if storage.exists("model.pt"):
            return read_file(storage.join("model.pt"))
        return find_at(storage.location).load("model")
    except (CheckpointError, StorageError) as error:
        message = f"{location} holds neither a model.pt nor a whole checkpoint: {error}"
        raise ConfigError.single("transfer.weights", message) from error
