"""One walk over anything that holds tensors - batches, a model's inputs, its outputs - and what is done with it.

Lists, tuples, named tuples, mappings (UserDict, BatchEncoding, ModelOutput), dataclasses, registered pytree nodes, and objects
with tensors as attributes. Rebuilt containers keep their type; what doesn't change stays the same object.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

HALF = (torch.bfloat16, torch.float16)
_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, torch.Size, torch.device, torch.dtype, nn.Module)
Rebuild = Callable[[list[Any]], Any]


def map_parts(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change` applied to each of its direct parts; a value without parts as it is."""
    parts, rebuild = _open(value)
    changed = [change(part) for part in parts]
    return value if all(a is b for a, b in zip(parts, changed, strict=True)) else rebuild(changed)


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `change` applied to each tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    return map_parts(lambda part: map_tensors(change, part), value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _open(value)[0]:
            yield from tensors_in(part)


def _open(value: Any) -> tuple[list[Any], Rebuild]:
    """The direct parts of a container, and what builds one of the same type from other parts; no parts for anything else."""
    if isinstance(value, _LEAVES):
        return [], lambda _: value
    node = pytree.SUPPORTED_NODES.get(type(value))  # list, tuple, dict and what libraries have registered
    if node is not None:
        parts, context = node.flatten_fn(value)
        return list(parts), lambda parts: node.unflatten_fn(parts, context)
    if isinstance(value, PackedSequence):  # its lengths stay on the CPU
        return [value.data], lambda parts: value._replace(data=parts[0])
    if isinstance(value, Mapping):
        return list(value.values()), lambda parts: _with_items(value, dict(zip(value, parts, strict=True)))
    if isinstance(value, list | tuple):
        return list(value), getattr(value, "_make", type(value))
    return _open_object(value)


def _open_object(value: Any) -> tuple[list[Any], Rebuild]:
    """Fields of a dataclass; of any other object the attributes that are tensors or plain collections."""
    slots = [getattr(base, "__slots__", ()) for base in type(value).__mro__]
    names = [name for group in slots for name in ([group] if isinstance(group, str) else group)]
    names = [name for name in (*names, *getattr(value, "__dict__", ())) if not name.startswith("__")]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if not (dataclasses.is_dataclass(value) or hasattr(type(value), "__attrs_attrs__")):
        # An attribute may be anything, such as the dataset itself: don't look beyond collections.
        found = {name: part for name, part in found.items() if isinstance(part, Tensor | list | tuple | dict)}

    def rebuild(parts: list[Any]) -> Any:
        other = copy.copy(value)
        for name, part in zip(found, parts, strict=True):
            object.__setattr__(other, name, part)  # frozen dataclasses too
        return other

    return list(found.values()), rebuild


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type; ModelOutput, whose values are attributes too, changes both on item assignment."""
    try:
        other: Any = copy.copy(mapping)
        for key, part in items.items():
            other[key] = part
    except TypeError:  # an immutable one, such as a MappingProxyType
        return items
    return other


def batch_length(batch: Any) -> int:
    """The number of samples: the length of the first non-empty tensor; 0 if there is none."""
    lengths = (len(tensor) if tensor.dim() else 1 for tensor in tensors_in(batch))
    return next((length for length in lengths if length), 0)


def first_rows(batch: Any, count: int) -> Any:
    """The first `count` samples, copied so that the rest can be freed."""
    return map_tensors(lambda tensor: tensor[:count].clone() if tensor.dim() else tensor, batch)


def clone_batch(batch: Any) -> Any:
    """A copy for a trial run: a forward may write into its inputs, a loss into its targets, or remove items."""
    return map_tensors(torch.clone, batch)


def in_full_precision(outputs: Any) -> Any:
    """`outputs` with bf16 and fp16 as float32."""
    return map_tensors(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor, outputs)


def move_batch(batch: Any, device: torch.device, memory_format: torch.memory_format | None = None) -> Any:
    """The batch on the device (without waiting), its images (4-dim tensors) in the memory format.

    Pinned tensors are copied on a stream of their own, beside the kernels of the step before. The current stream waits for it,
    and their memory isn't used again before that is done with it.
    """
    if device.type == "cpu" and memory_format is None:
        return batch
    copied = False

    def move(tensor: Tensor) -> Tensor:
        nonlocal copied
        form = memory_format if memory_format is not None and tensor.dim() == 4 else torch.preserve_format
        if device.type != "cuda" or tensor.is_cuda or not tensor.is_pinned():
            return tensor.to(device, non_blocking=True, memory_format=form)
        copied = True
        with torch.cuda.stream(_copy_stream(device)):
            moved = tensor.to(device, non_blocking=True, memory_format=form)
        moved.record_stream(torch.cuda.current_stream(device))
        return moved

    moved = map_tensors(move, batch)
    if copied:
        torch.cuda.current_stream(device).wait_stream(_copy_stream(device))
    return moved


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def squeeze_column(values: Tensor) -> Tensor:
    """(n, 1) as (n,); other shapes unchanged."""
    return values.squeeze(1) if values.dim() == 2 and values.shape[1] == 1 else values


def is_pair(batch: Any) -> bool:
    """Whether a batch is (inputs, target)."""
    return isinstance(batch, list | tuple) and len(batch) == 2


def split_batch(batch: Any) -> tuple[Any, Any]:
    """A batch as (inputs, target).

    Raises:
        ValueError: it isn't a pair.
    """
    if is_pair(batch):
        return batch[0], batch[1]
    kind = f"a {type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else f"a {type(batch).__name__}"
    if names := _names_in(batch):
        likely = next((name for name in names if name in ("labels", "label", "targets", "target", "y")), names[-1])
        others = [name for name in names if name != likely]
        raise ValueError(
            f"a batch of (inputs, target) was expected, but the dataset's samples collate to {kind} with "
            f"{', '.join(names)}: say which go to the model and which one to the loss, as data.inputs: "
            f"[{', '.join(others) or likely}] (by name; a single string: by position) and data.target: {likely}, or "
            "name a `task` with step(model, batch) and predict(model, batch)"
        )
    raise ValueError(
        f"a batch of (inputs, target) was expected, but the dataset's samples collate to {kind}; return "
        "(inputs, target) from __getitem__, or name a `task` with step(model, batch) and predict(model, batch)"
    )


class NamedParts:
    """Makes (inputs, target) of a batch whose parts have names: a mapping, a dataclass, any object with attributes.

    A path is a dotted string: each part is a key of a mapping, the index of a sequence or an attribute.

    Args:
        inputs: one path, whose value is the model's only argument, or several, whose values it gets by their last parts.
        target: the path of what the loss gets.
    """

    def __init__(self, inputs: str | list[str], target: str):
        self.inputs, self.target = inputs, target

    def __call__(self, batch: Any, *, labeled: bool = True) -> tuple[Any, Any]:
        """(inputs, target) of a batch.

        Args:
            labeled: the batch must have a target; otherwise one that it lacks is None.

        Raises:
            ValueError: the batch has no part of such a name; says which there are.
        """
        if isinstance(self.inputs, str):
            inputs = self._part(batch, self.inputs, "data.inputs")
        else:
            inputs = {path.rpartition(".")[2]: self._part(batch, path, "data.inputs") for path in self.inputs}
        try:
            return inputs, self._part(batch, self.target, "data.target")
        except ValueError:
            if labeled:
                raise
            return inputs, None

    def _part(self, batch: Any, path: str, key: str) -> Any:
        value = batch
        for number, part in enumerate(path.split(".")):
            names = _names_in(value)
            index = int(part) if part.isdigit() else -1
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list | tuple) and 0 <= index < len(value):
                value = value[index]
            elif part in names and not isinstance(value, Mapping):
                value = getattr(value, part)
            else:
                above = ".".join(path.split(".")[:number])
                holder = f"{above} of the batch" if above else "the batch"
                found = f"has {', '.join(names)}" if names else f"is {shapes_of(value)}"
                raise ValueError(f"{key}: {path}: {holder} has no {part}; it {found}")
        return value


def _names_in(value: Any) -> list[str]:
    """The keys of a mapping; of a dataclass or a named tuple the fields; of any other object its public attributes."""
    if isinstance(value, Mapping):
        return list(map(str, value))
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(value._fields)
    if isinstance(value, (Tensor, list, tuple, *_LEAVES)):
        return []
    return [name for name in getattr(value, "__dict__", ()) if not name.startswith("_")]


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model on its inputs: a tuple or list is spread, a mapping is passed by name, anything else is the one argument."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def logits_of(outputs: Any) -> Any:
    """The entry `logits` of outputs that are a mapping (transformers' ModelOutput), if it is a tensor; else the outputs."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    return logits if isinstance(logits, Tensor) else outputs


def shapes_of(value: Any, most: int = 8) -> str:
    """What a value holds, for messages: dtype and shape of its tensors, in their containers; the first `most` of many."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
        items = value.items() if isinstance(value, Mapping) else vars(value).items()
        shown = [f"{key}: {shapes_of(item, most)}" for key, item in list(items)[:most]]
        kind = "" if type(value) is dict else type(value).__name__
        return f"{kind}{{{', '.join(shown)}{', ...' if len(items) > most else ''}}}"
    if isinstance(value, list | tuple):
        shown = [shapes_of(item, most) for item in value[:2]]
        more = f", ... ({len(value)} in all)" if len(value) > 2 else ""
        return f"{type(value).__name__}[{', '.join(shown)}{more}]"
    return repr(value) if isinstance(value, bool | int | float | type(None)) else f"a {type(value).__name__}"
