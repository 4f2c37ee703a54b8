"""The layers of a model: as a table, observed during a forward, switched between train and eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.text import aligned

_MOST = 12


def layer_table(
    model: nn.Module, *, full: bool = False, shapes: dict[str, str] | None = None, flops: dict[str, int] | None = None
) -> list[str]:
    """Aligned lines, one per layer: name, class, shape, parameters, operations.

    Args:
        model: any module; of one that only wraps another one, that one's layers are shown.
        full: every layer; else at most twelve of the first level that have parameters.
        shapes: of layers by name (see `output_shapes`); by default that of a layer's weight.
        flops: operations of layers by name (see `flops.forward_flops`); by default none are shown.
    """
    place = ""
    while not full and len(children := list(model.named_children())) == 1 and not list(model.parameters(recurse=False)):
        place, model = f"{place}{children[0][0]}.", children[0][1]
    rows = []
    for name, module in model.named_modules() if full else model.named_children():
        parameters = list(module.parameters(recurse=not full))
        if not parameters and (not full or any(module.children())):
            continue
        # Not by getattr, which computes a parametrized weight (spectral_norm) and updates its buffers.
        weight = module._parameters.get("weight", vars(module).get("weight"))
        shape = str(tuple(weight.shape)) if isinstance(weight, Tensor) else ""
        shape = shapes.get(name, "") if shapes is not None else shape
        frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
        count = sum(parameter.numel() for parameter in parameters)
        state = "frozen" if frozen and frozen == count else f"{frozen:,} frozen" if frozen else ""
        operations = f"{flops[name]:,} FLOPs" if flops is not None and flops.get(name) else ""
        state = ", ".join(filter(None, (operations, state)))
        rows.append((place + name or "(itself)", type(module).__name__, shape, f"{count:,}" if count else "", state))
    if full or len(rows) <= _MOST:
        return aligned(rows, right=3)
    return [*aligned(rows[:_MOST], right=3), f"and {len(rows) - _MOST} more; debug.layers=true shows all"]


def output_shapes(model: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """The output shape of each layer while `run()` calls the model, in eval mode."""
    shapes: dict[str, str] = {}

    def note(name: str, output: Any) -> None:
        shapes.setdefault(name, str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__)

    watch(model, run, note)
    return shapes


def begin_training(model: nn.Module) -> None:
    """Call `train()`, as every loop does: some models freeze parts of themselves in it.

    Modules in eval mode inside a model in train mode stay so: its `__init__` has chosen that. A model that is in eval mode
    itself (as from transformers' from_pretrained) trains as a whole.
    """
    left = [module for module in model.modules() if not module.training] if model.training else []
    model.train()
    for module in left:
        module.training = False


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode; afterwards each module is in the mode that it was in before.

    The mode is restored by each module's `train`: some do more in it than store the mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # the outer ones first
            if module.training != training:
                module.train(training)


@torch.no_grad()
def watch(model: nn.Module, run: Callable[[], object], note: Callable[[str, Any], None]) -> None:
    """Call `note(name, output)` after each layer's forward while `run()` calls the model, in eval mode.

    Of several outputs the first is passed. The model is left as it was.
    """
    names = {module: name for name, module in model.named_modules()}

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        note(names[module], output[0] if isinstance(output, tuple | list) and output else output)

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(evaluating(model))
        run()
