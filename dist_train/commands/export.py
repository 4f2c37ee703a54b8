"""`export`: a run's weights (the EMA weights where it has them) for other programs, read back and compared first."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import CHECKPOINT, output, parse_run, writable
from dist_train.commands.usage import Usage
from dist_train.files import replacing

if TYPE_CHECKING:
    from torch import nn

    from dist_train.run.open import Restored

ENDINGS = {"state_dict": ".pt", "module": ".module.pt", "safetensors": ".safetensors", "torch_export": ".pt2"}
USAGE = Usage(
    "export",
    "A run's weights (the EMA weights where it has them) for other programs, read back and compared first.",
    """\
dist-train export runs/digits
dist-train export runs/digits --format safetensors --output digits.safetensors""",
    (
        CHECKPOINT,
        ("--format", {"choices": tuple(ENDINGS), "default": "state_dict", "help": "by default state_dict"}),
        output("FILE", "by default the run's name, in this directory"),
    ),
    takes="run and keys",
)
PICKLE = (
    "warning: this is a pickle: loading it (torch.load(..., weights_only=False)) runs code that the file names, so load only "
    "files that you trust; it needs the code of {home} as it is now. state_dict and safetensors need neither"
)


def main(arguments: Sequence[str]) -> int:
    """Write one file, on rank 0; other ranks exit at once."""
    options = parse_run(USAGE, arguments)
    from dist_train.runtime.launch import read_placement

    if read_placement(os.environ).rank != 0:
        return 0
    from dist_train.run.open import open_run

    plain = ["trainer.compile=false", "trainer.channels_last=false", "distributed.device=cpu"]
    with open_run(options.run, options.checkpoint, [*plain, *options.overrides], alone=True) as restored:
        model, note = restored.evaluator.model, ""
        name = options.output or restored.run.name + ENDINGS[options.format]
        with replacing(writable(name)) as path:
            if options.format == "torch_export":
                note = _export_graph(restored, path)
            else:
                _write_weights(options.format, model, path)
        print(f"{name}: {restored.found.name} of {restored.run.location} as {options.format}, read back and compared")
        note = PICKLE.format(home=type(model).__module__) if options.format == "module" else note
        if note:
            print(note, file=sys.stderr)
    return 0


def _write_weights(form: str, model: nn.Module, path: Path) -> None:
    """Write and read back. Raises RuntimeError where the weights that are read differ from those that were written."""
    import torch
    from safetensors.torch import load_file, save_file

    # Each entry with memory of its own: safetensors refuses shared memory, and a view would be saved with its entire base.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    if form == "state_dict":
        torch.save(state, path)
        read = torch.load(path, weights_only=True)
    elif form == "module":
        torch.save(model, path)
        read = torch.load(path, weights_only=False).state_dict()
    else:
        save_file(state, path, metadata={"format": "pt"})
        read = load_file(path)
    wrong = [name for name in state if name not in read or not torch.equal(read[name], state[name])]
    if wrong or len(read) != len(state):
        raise RuntimeError(f"the weights read back differ from those written: {', '.join(wrong[:5])}")


def _export_graph(restored: Restored, path: Path) -> str:
    """Export the graph with its weights, for any batch size if the model allows it, and compare its outputs with the module's.

    Returns:
        A note for the user ("" for none).
    """
    import torch
    from torch.utils import _pytree as pytree

    from dist_train.building.prepare import build_dataset
    from dist_train.config.errors import ConfigError
    from dist_train.task.batch import tensors_in

    model = restored.evaluator.model
    dataset = build_dataset(restored.config, restored.split(None))
    args, kwargs = _inputs(restored, dataset, 2)
    size = {0: torch.export.Dim("batch", min=1)}
    shapes = pytree.tree_map(lambda value: size if isinstance(value, torch.Tensor) else None, kwargs or args)
    note, counts = "", [2, 3, 1]
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        note, counts = f"note: exported for batches of 2 samples only: {_first_line(error)}", [2]
        try:
            program = torch.export.export(model, args, kwargs)
        except Exception as inner:
            reason = f"torch.export can't make a graph of {type(model).__name__}: {_first_line(inner)}"
            raise ConfigError.single("--format", f"{reason}. state_dict, safetensors and module need none") from inner
    with open(path, "w+b") as file:  # given a path, torch insists on its own suffix
        torch.export.save(program, file)
        file.seek(0)
        reread = torch.export.load(file).module()
    for count in counts:
        args, kwargs = _inputs(restored, dataset, count)
        with torch.no_grad():
            found, expected = (list(tensors_in(module(*args, **kwargs))) for module in (reread, model))
        torch.testing.assert_close(found, expected)
    return note


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _inputs(restored: Restored, dataset: Any, count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the task calls the model with, for a prediction of the first `count` samples.

    Raises:
        ConfigError: it calls parts of the model only.
    """
    import torch

    from dist_train.building.prepare import first_samples
    from dist_train.config.errors import ConfigError
    from dist_train.task.batch import clone_batch

    evaluator, calls = restored.evaluator, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(clone_batch((args, kwargs)))

    hook = evaluator.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            batch = evaluator.prepare(first_samples(restored.config, dataset, count), labeled=False)
            evaluator.task.predict(evaluator.model, batch)
    finally:
        hook.remove()
    if not calls:
        raise ConfigError.single(
            "--format",
            "torch_export needs the model's inputs, but the task's predict calls parts of the model only; export state_dict or "
            "module, and the part that you want from there",
        )
    return calls[0]
