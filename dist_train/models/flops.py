"""Floating-point operations of a model, by torch's FlopCounterMode, and what devices can do of them in a second.

Model FLOPs utilization (Chowdhery et al., 2022, PaLM, appendix B) is the share of a device's peak that a model's own
operations use: one forward, and for each layer that trains twice as much for the backward (the gradients of its inputs and of
its weights). What is computed again (activation checkpointing) or beside the model (the optimizer) doesn't count.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from dist_train.runtime.compiler import defer_compiler

_BRANDS = r"(?:NVIDIA |AMD |Tesla |GeForce |Instinct )*"
# torch.cuda.get_device_name -> dense TFLOP/s: of the tensor cores in bf16 and fp16 (accumulated in fp32), in tf32, and of fp32
# without them. From the vendors' data sheets and architecture white papers; what they state with sparsity is halved.
_TERA: list[tuple[str, tuple[float, float, float]]] = [
    (r"V100-SXM[23]-\d+GB(-LS)?", (125, 15.7, 15.7)),
    (r"V100-PCIE-\d+GB", (112, 14, 14)),
    (r"V100S-PCIE-\d+GB", (130, 16.4, 16.4)),
    (r"T4", (65, 8.1, 8.1)),
    (r"A100([ -](SXM4|SXM|PCIE|PCIe|PG5\w*))?([ -]\d+GB)?( PCIe)?", (312, 156, 19.5)),
    (r"A800([ -](SXM4|PCIE))?([ -]\d+GB)?( PCIe)?", (312, 156, 19.5)),
    (r"A30", (165, 82, 10.3)),
    (r"A40", (149.7, 74.8, 37.4)),
    (r"A10", (125, 62.5, 31.2)),
    (r"L4", (121, 60, 30.3)),
    (r"L40", (181, 90.5, 90.5)),
    (r"L40S", (362, 183, 91.6)),
    (r"RTX 3090", (71, 35.6, 35.6)),
    (r"RTX 3090 Ti", (80, 40, 40)),
    (r"RTX 4090", (165.2, 82.6, 82.6)),
    (r"RTX 5090", (209.5, 104.8, 104.8)),
    (r"RTX A6000", (154.8, 77.4, 38.7)),
    (r"RTX 6000 Ada Generation", (364.2, 182.1, 91.1)),
    (r"(H100|H800) 80GB HBM3|H100 SXM\w*|GH200 \w+|H200", (989.4, 494.7, 66.9)),
    (r"(H100|H800) PCIe", (756, 378, 51.2)),
    (r"(H100|H200) NVL", (835.5, 417.5, 60)),
    (r"B200", (2250, 1125, 75)),
    (r"MI300X( OAM)?", (1307.4, 653.7, 163.4)),
]
_NO_BF16 = re.compile(_BRANDS + r"(V100.*|T4)")  # it is emulated there


def peak_flops(device: str, precision: str) -> float | None:
    """Dense FLOP/s of a whole device at its best; None where it isn't known (laptop and MIG variants, say).

    Args:
        device: as `torch.cuda.get_device_name` names it.
        precision: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    if precision == "bf16" and _NO_BF16.fullmatch(device):
        return None
    column = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}[precision]
    return next((tera[column] * 1e12 for name, tera in _TERA if re.fullmatch(_BRANDS + f"(?:{name})", device)), None)


def forward_flops(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Operations of each module, with those inside it, by its name, while `run()` calls the model; all of them as "".

    A multiplication and an addition are two. Counted are what torch has formulas for: matrix products, convolutions, attention.
    """
    from torch.utils import flop_counter

    defer_compiler(getattr(flop_counter, "_FlopCounterMode", None))
    mode: Any = flop_counter.FlopCounterMode
    known = inspect.signature(mode).parameters  # torch 2.11 hasn't the last one
    with mode(display=False, **({"skip_unsupported": True} if "skip_unsupported" in known else {})) as counter:
        run()
    counts = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    above = f"{type(model).__name__}."
    inner = {name.removeprefix(above): count for name, count in counts.items() if name.startswith(above)}
    return {**inner, "": counts.get("Global", 0)}


def training_flops(model: nn.Module, run: Callable[[], object]) -> int:
    """Of a training step in which `run()` is the forward: 3 for each operation in it, but 1 for those of frozen modules."""
    counts = forward_flops(model, run)
    return 3 * counts[""] - 2 * sum(counts.get(name, 0) for name in frozen_modules(model))


def frozen_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules with parameters of which none trains."""
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if parameters and not inside and not any(parameter.requires_grad for parameter in parameters):
            found.append(name)
    return found
