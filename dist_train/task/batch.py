"""One walk over whatever holds tensors: batches, a model's inputs and its outputs.

Lists, tuples, named tuples, mappings (UserDict, BatchEncoding, ModelOutput), dataclasses, whatever is registered as a pytree,
and objects that carry tensors as attributes. What is rebuilt keeps its type; what doesn't change stays the same object.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

HALF = (torch.bfloat16, torch.float16)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.Size, torch.device, torch.dtype, nn.Module)
Rebuild = Callable[[list[Any]], Any]


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `change` done to each tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    parts, rebuild = _open(value)
    changed = [map_tensors(change, part) for part in parts]
    return value if all(a is b for a, b in zip(parts, changed, strict=True)) else rebuild(changed)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _open(value)[0]:
            yield from tensors_in(part)


def batch_length(batch: Any) -> int:
    """The number of samples in a batch: the length of the first tensor found in it."""
    lengths = (len(tensor) if tensor.dim() else 1 for tensor in tensors_in(batch))
    return next((length for length in lengths if length), 0)


def first_rows(batch: Any, count: int) -> Any:
    """The first samples of a batch: a copy, so that the rest isn't kept."""
    return map_tensors(lambda tensor: tensor[:count].clone() if tensor.dim() else tensor, batch)


def copied(batch: Any) -> Any:
    """A batch that a try may be given: a forward may write into its inputs, or a loss into its targets, or take items out."""
    return map_tensors(torch.clone, batch)


def in_full_precision(outputs: Any) -> Any:
    """bf16 and fp16 as float32."""
    return map_tensors(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor, outputs)


def move_batch(batch: Any, device: torch.device, memory_format: torch.memory_format | None = None) -> Any:
    """The batch on the device (without waiting), its images, which have four dimensions, in the memory format."""
    if device.type == "cpu" and memory_format is None:
        return batch

    def move(tensor: Tensor) -> Tensor:
        form = memory_format if memory_format is not None and tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device, non_blocking=True, memory_format=form)

    return map_tensors(move, batch)


def _open(value: Any) -> tuple[list[Any], Rebuild]:
    """The parts of a container, and what makes one of the same type of other parts; no parts for anything else."""
    if isinstance(value, _PLAIN):
        return [], lambda _: value
    if isinstance(value, PackedSequence):  # its lengths stay on the CPU
        return [value.data], lambda parts: value._replace(data=parts[0])
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return list(value), value._make
    if type(value) in (list, tuple):
        return list(value), type(value)
    if isinstance(value, Mapping):
        return list(value.values()), lambda parts: _with_items(value, dict(zip(value, parts, strict=True)))
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is not None:
        parts, context = node.flatten_fn(value)
        return list(parts), lambda parts: node.unflatten_fn(parts, context)
    if isinstance(value, list | tuple):
        return list(value), type(value)
    return _open_object(value)


def _open_object(value: Any) -> tuple[list[Any], Rebuild]:
    """Fields of a dataclass; of any other object the attributes that are tensors or plain collections of some."""
    known = dataclasses.is_dataclass(value) or hasattr(type(value), "__attrs_attrs__")
    slots = [getattr(base, "__slots__", ()) for base in type(value).__mro__]
    names = [name for group in slots for name in ([group] if isinstance(group, str) else group)]
    names = [name for name in (*names, *getattr(value, "__dict__", ())) if not name.startswith("__")]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if not known:  # an attribute may be anything, the dataset itself for one: look no further than into collections
        kinds = (Tensor, list, tuple, dict)
        found = {name: part for name, part in found.items() if isinstance(part, kinds)}

    def rebuild(parts: list[Any]) -> Any:
        other = copy.copy(value)
        for name, part in zip(found, parts, strict=True):
            object.__setattr__(other, name, part)  # frozen dataclasses too
        return other

    return list(found.values()), rebuild


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type; ModelOutput, whose values are attributes too, changes both by an item's assignment."""
    if type(mapping) is dict:
        return items
    try:
        other: Any = copy.copy(mapping)
        for key, part in items.items():
            other[key] = part
    except TypeError:  # a mapping that can't be changed, such as a MappingProxyType
        return items
    return other
