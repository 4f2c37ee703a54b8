"""The model's layers, for the block that a run begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import default_collate

from dist_train.config.components import build_callable
from dist_train.engine.build import move_batch
from dist_train.models.layers import layer_table, output_shapes

if TYPE_CHECKING:
    from dist_train.engine.build import Blueprint


def layer_lines(blueprint: Blueprint) -> list[str]:
    """The layers in short, or all of them with their output shapes (`debug.layers`; rank 0 runs one sample for it)."""
    model, config = blueprint.model, blueprint.config
    if not config.debug.layers or not blueprint.world.is_main:
        return layer_table(model)
    try:
        collate = build_callable(config.data.collate) if config.data.collate is not None else default_collate
        memory = torch.channels_last if blueprint.channels_last else None
        batch = move_batch(collate([blueprint.datasets["train"][0]]), blueprint.world.device, memory)
        with blueprint.precision.autocast():
            shapes = output_shapes(model, lambda: blueprint.task.predict(model, batch))
    except Exception as error:  # a stream, or a model that can't take one sample: no reason not to train
        note = f"(shapes are those of the weights: one sample couldn't be run: {error})"
        return [*layer_table(model, full=True), note]
    return layer_table(model, full=True, shapes=shapes)
