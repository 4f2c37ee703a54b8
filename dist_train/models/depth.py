"""The depth of each parameter in its model, for layer-wise lr decay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

# The lists of blocks of transformers, timm and torchvision: encoder.layer.3, h.3, layers.3, blocks.3, encoder_layer_3.
_BLOCK = re.compile(r"(?:^|\.)(?:encoder_layer_|(?:layers?|h|blocks?)\.)(\d+)\.")
# Blocks in stages, as of Swin and ConvNeXt: layers.0.blocks.1, stages.0.layers.1.
_STAGE = re.compile(r"(?:^|\.)(?:stages?|layers)\.(\d+)\.(?:(?:blocks|layers)\.(\d+)\.)?")
_NUMBER = re.compile(r"\d+")
_STEM = re.compile(r"(?:^|\.)(?:embeddings|embed_tokens|patch_embed|pos_embed|cls_token|wte|wpe)(?:\.|$)")


def depths(model: nn.Module) -> tuple[dict[str, int], str]:
    """The layer of each parameter, by name, from 0 (the inputs' side) to the head, and what it was found by.

    By timm's `group_matcher` where the model's class has one; else by the numbers in the names of its blocks: what comes
    before them is layer 0, each block is one more, and what comes after them is the last; else each module that holds
    parameters is a layer, in the model's order.
    """
    names = [name for name, _ in model.named_parameters()]
    if hasattr(type(model), "group_matcher"):  # not that of a model inside, whose names are others
        from timm.models import group_parameters

        matcher = cast(Any, model).group_matcher(coarse=False)
        return dict(group_parameters(model, matcher, reverse=True)), "timm's group_matcher"
    blocks = _blocks(names)
    if blocks:
        order = {block: number for number, block in enumerate(sorted(set(blocks.values())), start=1)}
        end = len(order) + 1
        scalars = {name for name, parameter in model.named_parameters() if parameter.ndim == 0}  # a temperature
        found = {name: 0 if stem and name not in scalars else end for name, stem in _sides(names, blocks)}
        return found | {name: order[block] for name, block in blocks.items()}, "the numbers in the names of its blocks"
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    places = {owner: number for number, owner in enumerate(owners)}
    return {name: places[name.rpartition(".")[0]] for name in names}, "the order of its modules"


def _blocks(names: list[str]) -> dict[str, tuple[int, int]]:
    """(stage, block) of the parameters in blocks; what a stage holds besides belongs to the block before it, or its first."""
    stages = {name: match for name in names if (match := _STAGE.search(name)) is not None}
    if not any(match[2] for match in stages.values()):
        found = {name: match for name in names if (match := _BLOCK.search(name)) is not None}
        lists = {match.string[: match.start(1)] for match in found.values()}
        if len({_NUMBER.sub("#", place) for place in lists}) < len(lists):  # numbers inside of numbered blocks
            return {}
        return {name: (0, int(match[1])) for name, match in found.items()}
    placed: dict[str, tuple[int, int]] = {}
    last: dict[int, int] = {}
    for name, match in stages.items():
        stage = int(match[1])
        last[stage] = int(match[2]) if match[2] else last.get(stage, 0)
        placed[name] = stage, last[stage]
    return placed


def _sides(names: list[str], blocks: dict[str, tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """Each name, and whether it belongs before the blocks: it is an embedding, or nearer to the next block than to the last."""
    before: str | None = None
    for index, name in enumerate(names):
        if name in blocks:
            before = name
        after = next((other for other in names[index:] if other in blocks), None)
        nearer = after is not None and (before is None or _shared(name, after) > _shared(name, before))
        yield name, nearer or _STEM.search(name) is not None


def _shared(one: str, other: str) -> int:
    """How many parts two dotted names have in common at their beginning."""
    count = 0
    for mine, theirs in zip(one.split("."), other.split("."), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
