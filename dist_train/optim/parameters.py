"""Which parameters can be trained, and which are refused by name before anything is written."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dist_train.config.errors import ConfigError

TAKE_SPARSE = (torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad)


def check_parameters(model: nn.Module) -> None:
    """Refuse what would be trained wrongly, or not at all.

    Raises:
        ConfigError: parameters have no shape yet, share memory, or hold an element twice; or the model is a compiled wrapper.
    """
    if hasattr(model, "_orig_mod"):
        raise ConfigError.single(
            "model",
            "it is the result of torch.compile(module), which names every weight _orig_mod.*: give the module itself, and set "
            "trainer.compile=true",
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ConfigError.single(
                "model",
                f"{name} has no shape yet: a lazy module takes it from the first batch, which is too late for the optimizer and "
                "the other processes. Give the sizes (in_features, in_channels), or name a function that makes the model, calls "
                "it once on an example and returns it",
            )
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.layout is torch.strided and parameter.numel():
            storages.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter.detach()))
    for group in storages.values():
        if (len(group) > 1 or not is_dense(group[0][1])) and _overlap([tensor for _, tensor in group]):
            names = " and ".join(name for name, _ in group)
            raise ConfigError.single(
                "model",
                f"{names}: elements of it share memory, so that one update would change several, each in its own way. Make "
                "it a parameter with its own memory (.clone()), or tie modules by giving them the same nn.Parameter",
            )


def takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` must be called with a closure, as those of torch.optim.LBFGS and of sharpness-aware minimization."""
    arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:2]
    return hasattr(optimizer, "first_step") or any(
        argument.name == "closure" and argument.default is argument.empty for argument in arguments
    )


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    device: torch.device,
    *,
    world_size: int,
    skips: bool,
    scaled: bool,
) -> None:
    """Refuse an optimizer that can't train these parameters here.

    Args:
        skips: steps may be skipped by a flag on the device. scaled: fp16, with a loss scale.

    Raises:
        ConfigError: names what doesn't fit, and what to do.
    """
    _check_closure(optimizer, skips=skips, scaled=scaled)
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if scaled and id(parameter) in trained and parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigError.single(
                "trainer.precision",
                f"fp16 scales gradients of float32 weights, but {name} is {str(parameter.dtype).removeprefix('torch.')}: set "
                "trainer.precision=bf16 or fp32, or make its weights float32",
            )
    for group in optimizer.param_groups:
        gaps = [trained.get(id(parameter)) for parameter in group["params"] if not is_dense(parameter)]
        if group.get("fused") and gaps:
            message = f"a fused kernel follows memory order, but {gaps[0]} has gaps: remove `fused`, or clone it"
            raise ConfigError.single("optimizer.fused", message)
        dampened = isinstance(optimizer, torch.optim.SGD) and group["momentum"] and group["dampening"]
        if group.get("fused") and dampened and device.type == "cuda" and (skips or scaled):
            message = (
                "torch's fused SGD with dampening loses its momentum where its first step is skipped: set fused: false"
            )
            raise ConfigError.single("optimizer.fused", message)
    sparse = {id(parameter): name for name, parameter in sparse_parameters(model) if id(parameter) in trained}
    if sparse:
        _check_sparse(optimizer, sparse, trained, device, world_size)
    elif isinstance(optimizer, torch.optim.SparseAdam):
        message = "SparseAdam takes only sparse gradients, but no module is `sparse`: use torch.optim.Adam"
        raise ConfigError.single("optimizer", message)


def _check_closure(optimizer: torch.optim.Optimizer, *, skips: bool, scaled: bool) -> None:
    kind, arguments = type(optimizer).__name__, [*inspect.signature(type(optimizer).step).parameters.values()][1:]
    required = [a for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if any(argument.name != "closure" for argument in required):
        names = ", ".join(argument.name for argument in required)
        message = (
            f"{kind}.step needs {names}, which isn't known here: use an optimizer whose step takes nothing or a closure"
        )
        raise ConfigError.single("optimizer", message)
    if takes_closure(optimizer) and (skips or scaled):
        key, value = ("trainer.precision", "fp32 or bf16") if scaled else ("trainer.on_nonfinite", "stop")
        message = (
            f"{kind} computes the gradient several times in a step, of which none can be left out: set it to {value}"
        )
        raise ConfigError.single(key, message)


def _check_sparse(
    optimizer: torch.optim.Optimizer,
    sparse: dict[int, str],
    trained: dict[int, str],
    device: torch.device,
    world_size: int,
) -> None:
    kind, name = type(optimizer).__name__, next(iter(sparse.values()))
    dense = next((other for key, other in trained.items() if key not in sparse), None)
    message = None
    if device.type == "cuda" and world_size > 1:
        message = "and NCCL adds up dense ones only"
    elif type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, TAKE_SPARSE):
        message = f"which {kind} doesn't take; SGD, SparseAdam and Adagrad do"
    elif any(group.get("fused") for group in optimizer.param_groups):
        message = "which a fused kernel doesn't take: remove `fused`"
    elif isinstance(optimizer, torch.optim.SparseAdam) and dense is not None:
        message = f"and that of {dense} is dense, which SparseAdam doesn't take"
    elif isinstance(optimizer, TAKE_SPARSE) and any(
        group.get("weight_decay") and any(id(parameter) in sparse for parameter in group["params"])
        for group in optimizer.param_groups
    ):
        message = f"with which {kind} can't decay weights: give it a group with weight_decay: 0"
    if message:
        raise ConfigError.single("optimizer", f"the gradient of {name} is sparse, {message}; or set sparse: false")


def sparse_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with a sparse gradient: the weights of embeddings with `sparse=True`."""
    for prefix, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            yield from module.named_parameters(prefix, recurse=False)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order (channels_last, transposed)."""
    return tensor.layout is not torch.strided or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give a loaded state the strides that the parameters have now: fused kernels go through both by memory order."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            strided = isinstance(value, Tensor) and value.layout is torch.strided
            if strided and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialize the momentum of fused SGD, which torch leaves uninitialized until the first step.

    If that step is skipped by the flag on the device, it would stay so. -0.0 + x has the bits of x.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            if group.get("fused") and group["momentum"] and not group["dampening"]:
                for parameter in group["params"]:
                    if optimizer.state[parameter].get("momentum_buffer") is None:
                        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter.detach(), -0.0)


def _overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether an element of their shared memory belongs to two of them, or twice to one."""
    places = []
    for tensor in tensors:
        every = torch.arange(tensor.untyped_storage().nbytes() // tensor.itemsize)
        places.append(every.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1))
    flat = torch.cat(places)
    return len(flat.unique()) < len(flat)
