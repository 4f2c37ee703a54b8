"""`export`: a run's weights in a form that others read, and which was read back before it is handed out."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import Parser, whole_file, with_run

if TYPE_CHECKING:
    from torch import nn

    from dist_train.engine.restore import Restored

ENDINGS = {"state_dict": ".pt", "module": ".module.pt", "safetensors": ".safetensors", "torch_export": ".pt2"}


def main(arguments: Sequence[str]) -> int:
    """Write one file; one process is enough, and any others leave at once."""
    parser = Parser("export", "A run's weights, with the average of the weights where it has one.")
    parser.add_argument("--format", choices=tuple(ENDINGS), default="state_dict", help="by default state_dict")
    parser.add_argument("--output", metavar="FILE", help="by default the run's name, in this directory")
    options = with_run(parser, arguments)
    from dist_train.runtime.world import read_placement

    if read_placement(os.environ).rank != 0:
        return 0
    from dist_train.engine.restore import open_run

    plain = ["trainer.compile=false", "trainer.channels_last=false", "distributed.device=cpu"]
    with open_run(options.run, options.checkpoint, [*plain, *options.overrides], alone=True) as restored:
        output = options.output or restored.run.name + ENDINGS[options.format]
        with whole_file(output) as path:
            notes = WRITERS[options.format](restored, path)
        print(f"{output}: {restored.found.name} of {restored.run.location} as {options.format}, read back and compared")
        for note in notes:
            print(note, file=sys.stderr)
    return 0


def _state_dict(restored: Restored, path: Path) -> list[str]:
    """model.load_state_dict(torch.load(FILE, weights_only=True)) is all that its user needs."""
    import torch

    state = _plain_state(restored.evaluator.model)
    torch.save(state, path)
    _compare(torch.load(path, weights_only=True), state)
    return []


def _module(restored: Restored, path: Path) -> list[str]:
    """The whole module, pickled."""
    import torch

    model = restored.evaluator.model
    torch.save(model, path)
    _compare(_plain_state(torch.load(path, weights_only=False)), _plain_state(model))
    home = type(model).__module__
    return [
        f"warning: this is a pickle: loading it (torch.load(..., weights_only=False)) runs code that the file names, so take it "
        f"from nobody you don't trust; it needs the code of {home} as it is now. state_dict and safetensors need neither"
    ]


def _safetensors(restored: Restored, path: Path) -> list[str]:
    from safetensors.torch import load_file, save

    state = _plain_state(restored.evaluator.model)
    path.write_bytes(save(state, metadata={"format": "pt"}))
    _compare(load_file(path), state)
    return []


def _torch_export(restored: Restored, path: Path) -> list[str]:
    """The graph with its weights, for any batch size where the model allows that; run against the module itself."""
    import torch
    from torch.utils.data import default_collate

    from dist_train.config.components import build_callable
    from dist_train.engine.build import build_dataset

    config, model = restored.config, restored.evaluator.model
    dataset = build_dataset(config, restored.split(None))
    collate = build_callable(config.data.collate) if config.data.collate is not None else default_collate

    def inputs(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = collate([dataset[k % len(dataset)] for k in range(count)])
        value = batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else batch
        if isinstance(value, dict):
            return (), value
        return (tuple(value) if isinstance(value, list | tuple) else (value,)), {}

    args, kwargs = inputs(2)
    notes: list[str] = []
    sizes: tuple[int, ...] = (2, 3, 1)
    size = torch.export.Dim("batch", min=1)
    shapes = tuple(_batched(arg, size) for arg in args) or {name: _batched(arg, size) for name, arg in kwargs.items()}
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        notes.append(f"note: exported for batches of 2 samples only: {type(error).__name__}: {reason}")
        program = torch.export.export(model, args, kwargs)
        sizes = (2,)
    content = io.BytesIO()  # by name, torch wants an ending of its own
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())
    reread = torch.export.load(io.BytesIO(path.read_bytes())).module()
    for count in sizes:
        args, kwargs = inputs(count)
        with torch.no_grad():
            torch.testing.assert_close(reread(*args, **kwargs), model(*args, **kwargs))
    return notes


def _batched(value: Any, size: Any) -> Any:
    return {0: size} if hasattr(value, "dim") else None


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict with memory of its own for each entry."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def _compare(read: dict[str, Any], state: dict[str, Any]) -> None:
    """Raises RuntimeError where a file doesn't hold what was written."""
    import torch

    wrong = [name for name in state if name not in read or not torch.equal(read[name], state[name])]
    if wrong or len(read) != len(state):
        raise RuntimeError(f"the file that was written doesn't read back to the same weights: {', '.join(wrong[:5])}")


WRITERS: dict[str, Callable[[Restored, Path], list[str]]] = {
    "state_dict": _state_dict,
    "module": _module,
    "safetensors": _safetensors,
    "torch_export": _torch_export,
}
