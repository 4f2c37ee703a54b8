"""The block that a start prints first, and the facts that every manifest holds."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import dist_train
from dist_train.config.components import build_callable
from dist_train.config.errors import mask
from dist_train.config.fields import to_json
from dist_train.data.reading import make_batch
from dist_train.data.stream import is_stream, stream_length
from dist_train.models.flops import forward_flops
from dist_train.models.layers import layer_table, output_shapes
from dist_train.optim.groups import Grouping
from dist_train.pages.notebook import shell
from dist_train.step.several import Optimizers
from dist_train.task.entries import MetricEntry, misnamed
from dist_train.task.task import SeveralLosses, WholeBatchTask

if TYPE_CHECKING:
    from dist_train.config.schema import Config
    from dist_train.training.parts import Parts
    from dist_train.training.trainer import Trainer

Lines = list[tuple[str, str]]
LIVE = (
    "parts of this config are Python objects: the run can be resumed only from Python, with the same objects. For more devices "
    "name them in a file: torchrun --nproc_per_node=N -m dist_train.main --config FILE"
)


def start_lines(trainer: Trainer) -> Lines:
    """Model, world, precision, data, batch arithmetic, run directory."""
    parts, config, world, plan = trainer.parts, trainer.config, trainer.world, trainer.plan
    parameters = list(parts.model.parameters())
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    model = f"{type(parts.model).__name__}, {sum(parameter.numel() for parameter in parameters):,} parameters"
    data = ", ".join(
        f"{split} (a stream)" if is_stream(dataset) and stream_length(dataset) is None else f"{split} {len(dataset):,}"
        for split, dataset in parts.datasets.items()
    )
    data += f"; {plan.steps_per_epoch:,} steps an epoch"
    if plan.weights is not None:
        data += f", {plan.samples_per_epoch:,} samples each, drawn with replacement: weights {plan.weights.origin}"
    elif plan.samples_per_epoch < plan.length:
        data += f", {plan.length - plan.samples_per_epoch} samples of each epoch left out (data.drop_last)"
    total = f" = {trainer.due.end:,} steps" if trainer.due.end else ""
    lines = [
        ("run", trainer.run.location + (f", resuming from step {trainer.step:,}" if trainer.step else "")),
        ("model", model + (f", {frozen:,} of them frozen" if frozen else "")),
        ("transfer", "\n".join(parts.notes)),
        ("layers", "\n".join(layer_lines(parts))),
        ("layer lr", layer_lr(parts)),
        ("saved", parts.frozen.describe() if parts.frozen is not None else ""),
        ("world", _world(parts)),
        ("task", _task(parts)),
        ("precision", parts.precision.name),
        ("data", data),
        ("placement", parts.placement),
        ("batch", batch_arithmetic(parts)),
        ("training", f"{config.trainer.duration}{total}"),
        *(("note", note) for note in parts.train_loader.notes),
        ("note", LIVE if config.has_live_objects else ""),
        ("note", parts.precision.note or ""),
        ("note", _left_in_eval_mode(parts)),
        ("note", parts.schedule.note if parts.schedule is not None else ""),
    ]
    count = torch.cuda.device_count() if world.size == 1 and world.device.type == "cuda" else 1
    if count > 1:
        command = f"torchrun --nproc_per_node={count} -m dist_train.main"
        lines.append(("note", f"{count} GPUs are here: {command} uses them all"))
    return [(label, text) for label, text in lines if text]


def _task(parts: Parts) -> str:
    """What a step costs or does more than a forward and a backward, by what the task declares."""
    if isinstance(parts.task, WholeBatchTask):
        return "a loss of the whole batch: two forwards of each micro-batch, and every rank gathers the outputs of all"
    if isinstance(parts.task, SeveralLosses):
        own = "as the task's moves(step) says" if hasattr(parts.task.task, "moves") else "in this order"
        return f"optimizers {', '.join(parts.task.names)}, {own}"
    if callable(getattr(parts.task, "weights", None)):
        return "losses with weights of their own: one small all-gather before the backward of each step"
    return ""


def _left_in_eval_mode(parts: Parts) -> str:
    """The outermost modules that the model's own code has put into eval mode, as transformers' from_pretrained does."""
    left = [name for name, module in parts.modules.named_modules() if not module.training]
    left = [name for name in left if name.rpartition(".")[0] not in left]
    if not left or parts.config.transfer.freeze:
        return ""
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return f"in eval mode, as the model's own code left them, and so they stay in training: {shown}"


def layer_lines(parts: Parts) -> list[str]:
    """The top layers, or with `debug.layers` all with output shapes and operations of a sample, which rank 0 runs for that."""
    model, config = parts.model, parts.config
    if not config.debug.layers or not parts.world.is_main:
        return layer_table(model)
    try:
        collate = build_callable(config.data.collate) if config.data.collate is not None else make_batch
        batch = parts.move(collate([parts.datasets["train"][0]]))
        with parts.evaluator.serving(ema=False), parts.precision.autocast():
            shapes = output_shapes(model, lambda: parts.task.predict(model, batch))
            flops = forward_flops(model, lambda: parts.task.predict(model, batch))
    except Exception as error:  # a stream, or a model that can't take one sample: no reason not to train
        note = f"(shapes are those of the weights: one sample couldn't be run: {error})"
        return [*layer_table(model, full=True), note]
    return layer_table(model, full=True, shapes=shapes, flops=flops)


def layer_lr(parts: Parts) -> str:
    """With `optimizer.layer_decay`: the lr of the first and last layers."""
    spec, optimizer = parts.config.optimizer, parts.optimizer
    if isinstance(optimizer, Optimizers):
        notes = (Grouping(parts.modules, spec[name]).note(one) for name, one in optimizer.by_name.items())
        return "; ".join(filter(None, notes))
    return Grouping(parts.modules, spec).note(optimizer)


def _world(parts: Parts) -> str:
    world = parts.world
    place = f"{world.size} process" + ("es" if world.size > 1 else "")
    nodes = world.placement.nodes
    if nodes > 1:
        place += f" on {nodes} nodes"
    if world.backend is not None:
        place += f", {'nccl' if world.device.type == 'cuda' else 'gloo'}"
    if world.device.type == "cuda":
        return f"{place}, {torch.cuda.get_device_name(world.device)}"
    return f"{place}, CPU, {torch.get_num_threads()} thread(s) each"


def batch_arithmetic(parts: Parts) -> str:
    """`64 = 4 ranks x 16; for 64 a GPU: data.global_batch_size=256, and raise lr`."""
    size, ranks, micro = parts.plan.global_batch_size, parts.world.size, parts.micro_batch_size
    text = str(size)
    if parts.plan.leaf_size is not None:
        counts = sorted({*parts.micro_batch_counts(size)})
        text += f" = {parts.plan.leaves(size)} micro-batches of {micro}, {' or '.join(map(str, counts))} a process"
    elif ranks > 1:
        text += f" = {ranks} ranks x {size // ranks}" + (f" or {size // ranks + 1}" if size % ranks else "")
    if parts.plan.leaf_size is None and micro < -(-size // ranks):
        text += f", in micro-batches of {micro} at most"
    if ranks > 1:
        unit = "GPU" if parts.world.device.type == "cuda" else "process"
        text += f"; for {size} a {unit}: data.global_batch_size={size * ranks}, and raise lr"
    return text


def run_facts(config: Config, metrics: Sequence[MetricEntry] = ()) -> dict[str, Any]:
    """What a run is trained with, for every manifest and the report: config, command, versions, host, state of the code."""
    versions = {"dist_train": dist_train.__version__, "torch": torch.__version__, "python": platform.python_version()}
    facts: dict[str, Any] = {"config": to_json(config.to_dict()), "versions": versions, "host": socket.gethostname()}
    facts["command"] = _command()
    facts |= {"better": better} if (better := misnamed(metrics)) else {}
    for folder in config.run.code_paths[:1]:
        if git := _git(folder):
            facts |= {"commit": git["commit"], "git": git}
    return facts


def _command() -> str:
    """The command line of this process, secrets masked."""
    if shell() is not None:
        return "a notebook or an interactive session"
    command = sys.orig_argv if sys.orig_argv[-len(sys.argv[1:]) :] == sys.argv[1:] else [sys.executable, *sys.argv]
    return mask(shlex.join([os.path.basename(command[0]), *command[1:]]))


def _git(folder: str) -> dict[str, Any]:
    """The commit of a folder's repository, its branch, and the tracked files that differ from it; {} without a repository."""
    command = ["git", "-C", folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}  # not a repository, or no git
    head = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
    changed = [line.split(" ", 8)[-1].partition("\t")[0] for line in lines if not line.startswith("#")]
    commit, branch = head.get("branch.oid", ""), head.get("branch.head", "")
    return {"commit": commit, "branch": branch, "changed": changed} if commit != "(initial)" else {}
