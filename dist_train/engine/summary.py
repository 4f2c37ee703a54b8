"""The block that a run begins with and the one it ends with: what a person wants to know, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dist_train.data.stream import is_stream, stream_notes
from dist_train.engine.layers import layer_lines
from dist_train.tracking.text import format_seconds

if TYPE_CHECKING:
    from dist_train.engine.build import Blueprint
    from dist_train.engine.rundir import RunDir
    from dist_train.engine.trainer import Trainer

Lines = list[tuple[str, str]]


def start_lines(blueprint: Blueprint, trainer: Trainer, run: RunDir, resumed: int) -> Lines:
    """Model, world, precision, data, batch arithmetic, run directory."""
    config, world, plan = blueprint.config, blueprint.world, blueprint.plan
    total = sum(parameter.numel() for parameter in blueprint.model.parameters())
    frozen = sum(parameter.numel() for parameter in blueprint.model.parameters() if not parameter.requires_grad)
    sizes = ", ".join(
        f"{split} {len(dataset):,}" if hasattr(dataset, "__len__") else f"{split} (a stream)"
        for split, dataset in blueprint.datasets.items()
    )
    batches = f"{plan.steps_per_epoch:,} steps an epoch"
    if plan.samples_per_epoch < plan.length:
        batches += f", {plan.length - plan.samples_per_epoch} samples of each epoch left out (data.drop_last)"
    lines = [
        ("run", f"{run.location}" + (f", going on from step {resumed:,}" if resumed else "")),
        (
            "model",
            f"{type(blueprint.model).__name__}, {total:,} parameters"
            + (f", {frozen:,} of them frozen" if frozen else ""),
        ),
        ("layers", "\n".join(layer_lines(blueprint))),
        ("world", _world(blueprint)),
        ("precision", blueprint.precision.name),
        ("data", f"{sizes}; {batches}"),
        ("batch", batch_arithmetic(blueprint)),
        (
            "training",
            f"{config.trainer.duration}" + (f" = {trainer.total_steps:,} steps" if trainer.total_steps else ""),
        ),
    ]
    if blueprint.notes:
        lines.insert(2, ("transfer", "\n".join(blueprint.notes)))
    lines += [
        ("note", note) for note in stream_notes(blueprint.datasets["train"]) if is_stream(blueprint.datasets["train"])
    ]
    if config.has_live_objects:
        lines.append(
            (
                "note",
                "parts of this config are Python objects: the run can be continued only from Python, with the same objects. For "
                "more devices name them in a file: torchrun --nproc_per_node=N -m dist_train.main --config FILE",
            )
        )
    if blueprint.precision.note:
        lines.append(("note", blueprint.precision.note))
    if world.size == 1 and world.device.type == "cuda" and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        lines.append(
            ("note", f"{count} GPUs are here: torchrun --nproc_per_node={count} -m dist_train.main uses them all")
        )
    return lines


def _world(blueprint: Blueprint) -> str:
    world = blueprint.world
    place = f"{world.size} process" + ("es" if world.size > 1 else "")
    nodes = -(-world.size // world.placement.local_size)
    if nodes > 1:
        place += f" on {nodes} nodes"
    if world.backend is not None:
        place += f", {'nccl' if world.device.type == 'cuda' else 'gloo'}"
    if world.device.type == "cuda":
        return f"{place}, {torch.cuda.get_device_name(world.device)}"
    return f"{place}, CPU, {torch.get_num_threads()} thread(s) each"


def batch_arithmetic(blueprint: Blueprint) -> str:
    """`64 = 4 ranks x 16; for 64 a GPU: data.global_batch_size=256, and raise lr`."""
    size, ranks, micro = blueprint.plan.global_batch_size, blueprint.world.size, blueprint.micro_batch_size
    if ranks == 1:
        text = f"{size}"
    elif size % ranks == 0:
        text = f"{size} = {ranks} ranks x {size // ranks}"
    else:
        text = f"{size} = {ranks} ranks x {size // ranks} or {size // ranks + 1}"
    share = -(-size // ranks)
    if micro < share:
        text += f", in micro-batches of {micro} at most"
    if ranks > 1:
        unit = "GPU" if blueprint.world.device.type == "cuda" else "process"
        text += f"; for {size} a {unit}: data.global_batch_size={size * ranks}, and raise lr"
    return text


def end_lines(result: dict[str, Any], run: RunDir, seconds: float | None = None) -> Lines:
    """How it ended, the figures, and where things lie."""
    lines = [("state", f"{result['state']} at step {result['step']:,}: {result['reason']}")]
    for split, metrics in result.get("metrics", {}).items():
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "eval_samples")
        lines.append((split, f"{figures}  ({metrics.get('eval_samples', 0):,} samples)"))
    if seconds is not None:
        lines.append(("time", format_seconds(seconds)))
    if result["state"] == "completed":
        lines.append(
            (
                "model",
                f"{run.location}/model.pt"
                + (f" (step {result['kept_step']:,})" if result["kept_step"] != result["step"] else ""),
            )
        )
        if run.path("report.html").exists():
            lines.append(("report", f"{run.location}/report.html"))
        lines.append(("curves", f"{run.location}/curves.png, and tensorboard --logdir {run.location}/tensorboard"))
    else:
        lines.append(("next", "the same command goes on from here"))
    return lines
