"""The layers of a model as a table: name, class, shape, parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def layer_table(
    model: nn.Module, *, full: bool = False, shapes: dict[str, str] | None = None, most: int = 12
) -> list[str]:
    """Aligned lines, one a layer.

    Args:
        model: any module; one that holds a single other one is looked into.
        full: every layer; else the first level, without what has no parameters, and `most` lines of it.
        shapes: what to show as a layer's shape (see `output_shapes`); by default that of its weight.
    """
    place = ""
    while not full and len(children := list(model.named_children())) == 1 and not _own(model):
        place, model = f"{place}{children[0][0]}.", children[0][1]
    rows = []
    for name, module in model.named_modules() if full else model.named_children():
        inside = any(module.children())
        parameters = _own(module) if full else list(module.parameters())
        if (full and inside and not parameters) or (not full and not parameters):
            continue
        weight = getattr(module, "weight", None)
        shape = str(tuple(weight.shape)) if isinstance(weight, Tensor) else ""
        shape = shapes.get(name, "") if shapes is not None else shape
        frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
        count = sum(parameter.numel() for parameter in parameters)
        state = "frozen" if frozen and frozen == count else f"{frozen:,} frozen" if frozen else ""
        rows.append((place + name or "(itself)", type(module).__name__, shape, f"{count:,}" if count else "", state))
    more = [] if full or len(rows) <= most else [f"and {len(rows) - most} more; debug.layers=true shows all"]
    rows = rows if full else rows[:most]
    widths = [max((len(row[k]) for row in rows), default=0) for k in range(4)]
    form = "{0:<{4}}  {1:<{5}}  {2:<{6}}  {3:>{7}}  "
    return [(form.format(*row[:4], *widths) + row[4]).rstrip() for row in rows] + more


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


@torch.no_grad()
def output_shapes(model: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """The shape that each layer gives while `run()` calls the model, in eval mode."""
    shapes: dict[str, str] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            shapes.setdefault(name, str(tuple(first.shape)) if isinstance(first, Tensor) else type(first).__name__)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    training = model.training
    model.eval()
    try:
        run()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return shapes
