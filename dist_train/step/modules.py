"""Everything of a run that has parameters, buffers or counters: the model, and a loss or task with state of its own."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.step.buffers import take_from_rank_zero

if TYPE_CHECKING:
    from dist_train.runtime.world import World

DEPTH = 3  # objects inside objects in which a task's modules are looked for
MOST_ITEMS = 1000  # of a list that are looked at: longer ones are data
Mark = tuple[Any, ...]
_OF_EVERY_MODULE = vars(nn.Module()).keys()


@dataclass(eq=False)
class Slot:
    """Where a buffer or a number is: looked up by name each time, since a forward may replace it (`self.n = self.n + 1`).

    Attributes:
        name: as `model.named_buffers()` says it, behind `loss.` or `task.` where it is theirs.
        owner, key: it is `owner[key]`.
        persistent: it is in its module's state_dict.
    """

    name: str
    owner: dict[str, Any]
    key: str
    persistent: bool = False

    @property
    def value(self) -> Any:
        """The tensor (or None) or the number that is there now."""
        return self.owner.get(self.key)

    @value.setter
    def value(self, value: Any) -> None:
        self.owner[self.key] = value


class Modules(nn.Module):
    """The one place that names all parameters, buffers and counters of a run.

    The model's parts are called as the model calls them; those of its loss and its task begin with `loss.` and `task.`. A
    task or a loss that is no `nn.Module` is searched for modules, parameters, tensors and numbers.

    Attributes:
        model: the model itself. called: its class, for messages.
        buffers_at: registered buffers, and tensors that are plain attributes. numbers_at: ints and floats among the attributes.

    Raises:
        ConfigError: two parameters have one name.
    """

    def __init__(self, model: nn.Module, **others: Any):
        super().__init__()
        self.model = model
        self.called = type(model).__name__
        known = set(model.modules())
        for name, other in others.items():
            self.add_module(name, other if isinstance(other, nn.Module) else _holder(other, known))
        self._others = others
        self._told_apart()
        self.buffers_at: list[Slot] = []
        self.numbers_at: list[Slot] = []
        self._memory = {p.untyped_storage()._cdata for p in self.parameters() if p.layout == torch.strided}
        for place, module in self.named_modules():
            self._look_at(module, f"{place}." if place else "")
        for name, other in others.items():
            if not isinstance(other, nn.Module) and hasattr(other, "__dict__"):
                self._look_at(other, f"{name}.")
        give_own_memory(self.buffers_at)
        self._first: dict[str, Mark] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Modules:
        """A copy whose slots lead to its own buffers and numbers."""
        other = Modules(copy.deepcopy(self.model, memo), **copy.deepcopy(self._others, memo))
        other._first = dict(self._first)
        return other

    def take_in(self, optimizer: torch.optim.Optimizer) -> None:
        """Numbers and tensors among an optimizer's attributes, which its `state_dict` leaves out (a counter of steps, say)."""
        self._look_at(optimizer, "optimizer.")

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, with the model's own names; parameters and buffers are named by it."""
        memo = set() if memo is None else memo
        for name, child in self.named_children():
            yield from child.named_modules(memo, "" if name == "model" else name, remove_duplicate)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def agree(self, world: World) -> None:
        """Everything is built: make parameters and buffers on every rank those of rank 0, and note what they are.

        Raises:
            ValueError: the processes have built different models.
        """
        shapes = {name: [list(p.shape), str(p.dtype), p.requires_grad] for name, p in self.named_parameters()}
        if world.size > 1 and shapes != world.broadcast(shapes):
            raise ValueError("the model's parameters differ from rank 0's: every process must build the same model")
        take_from_rank_zero(self.parameters(), world)
        take_from_rank_zero((slot.value for slot in self.buffers_at), world)
        self._first = self._marks()

    # What a checkpoint holds beside the model's state_dict.

    def task_state(self) -> dict[str, Tensor]:
        """Parameters and registered buffers of loss and task, by name."""
        own = {id(parameter) for parameter in self.model.parameters()}
        state = {name: parameter.detach() for name, parameter in self.named_parameters() if id(parameter) not in own}
        models = {id(module._buffers) for module in self.model.modules()}
        slots = [slot for slot in self.buffers_at if slot.persistent and id(slot.owner) not in models]
        return state | {slot.name: slot.value.detach() for slot in slots if slot.value is not None}

    def constants(self) -> list[str]:
        """Names in `task_state` of what doesn't train and is as it was built: the config's, not the run's."""
        now, trained = self._marks(), self.trained()
        return [name for name in self.task_state() if name not in trained and now[name] == self._first.get(name)]

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor], keep: Collection[str] = ()) -> None:
        """Put back what `task_state` gave, but not the names in `keep`.

        Raises:
            ConfigError: it doesn't fit this loss or task.
        """
        own = self.task_state()
        wrong = [name for name in {**own, **state} if name not in own or name not in state]
        wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
        if wrong:
            message = f"its parameters and buffers aren't those of the checkpoint: {', '.join(sorted(wrong)[:5])}"
            raise ConfigError.single(wrong[0].partition(".")[0], message)
        for name, tensor in own.items():
            if name not in keep:
                tensor.copy_(state[name])

    def unsaved(self) -> dict[str, Any]:
        """What isn't as it was built and no state_dict can put back, by name: buffers that aren't persistent, or have
        another shape by now, and numbers."""
        first, now = self._first, self._marks()
        slots = [slot for slot in (*self.buffers_at, *self.numbers_at) if now[slot.name] != first.get(slot.name)]
        hidden = [s for s in slots if not s.persistent or now[s.name][:2] != first.get(s.name, ())[:2]]
        return {slot.name: _plain(slot.value) for slot in hidden}

    def every_value(self) -> dict[str, Any]:
        """All buffers and numbers, by name: what ranks may differ in."""
        return {slot.name: _plain(slot.value) for slot in (*self.buffers_at, *self.numbers_at)}

    @torch.no_grad()
    def put(self, values: dict[str, Any]) -> None:
        """Put buffers and numbers into their places, as `unsaved` and `every_value` give them."""
        for slot in (*self.buffers_at, *self.numbers_at):
            if slot.name not in values:
                continue
            value, there = values[slot.name], slot.value
            if isinstance(value, Tensor) and isinstance(there, Tensor) and value.shape == there.shape:
                there.copy_(value)
            elif isinstance(value, Tensor):  # it had another size, or wasn't there, when the model was built
                device = there.device if there is not None else next(self.parameters()).device
                slot.value = value.to(device, copy=True)
            else:
                slot.value = type(there)(value) if isinstance(there, np.number | Enum) else value

    def _marks(self) -> dict[str, Mark]:
        """What tells whether a tensor or a number has changed, without a copy of it."""
        found = {name: _mark(tensor) for name, tensor in self.task_state().items()}
        return found | {slot.name: _mark(slot.value) for slot in (*self.buffers_at, *self.numbers_at)}

    def _told_apart(self) -> None:
        seen: set[str] = set()
        for name, _ in self.named_parameters():
            if name in seen:
                message = f"its parameter {name} has the name of one of the model's; call one of them differently"
                raise ConfigError.single(name.partition(".")[0], message)
            seen.add(name)

    def _look_at(self, owner: Any, prefix: str) -> None:
        if isinstance(owner, nn.Module):
            hidden = owner._non_persistent_buffers_set
            for key, buffer in owner._buffers.items():
                if buffer is None or buffer.layout == torch.strided:
                    self.buffers_at.append(Slot(prefix + key, owner._buffers, key, persistent=key not in hidden))
        for key, value in vars(owner).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                if value.layout == torch.strided and not value.requires_grad and not self._is_of_parameter(value):
                    self.buffers_at.append(Slot(prefix + key, vars(owner), key))
            elif isinstance(value, int | float | np.number) and not (isinstance(value, bool) and _is_mode(owner, key)):
                self.numbers_at.append(Slot(prefix + key, vars(owner), key))

    def _is_of_parameter(self, tensor: Tensor) -> bool:
        """A view of a parameter, as the `weight` that torch.nn.utils.spectral_norm makes before its first forward."""
        return tensor.numel() > 0 and tensor.untyped_storage()._cdata in self._memory


def give_own_memory(slots: list[Slot]) -> None:
    """Buffers made by `expand`, several of whose elements share memory, can't be written to: they get memory of their own."""
    for slot in slots:
        buffer = slot.value
        if buffer is not None and any(n > 1 and s == 0 for n, s in zip(buffer.shape, buffer.stride(), strict=True)):
            slot.value = buffer.clone(memory_format=torch.contiguous_format)


def _is_mode(owner: Any, key: str) -> bool:
    """A flag that every module or torch's own have, like `training`: not one that a forward sets (`self.initialized`)."""
    return key in _OF_EVERY_MODULE or type(owner).__module__.startswith("torch.")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Enum):
        return value.value
    return value.item() if isinstance(value, np.number) else value


@torch.no_grad()
def _mark(value: Any) -> Mark:
    if not isinstance(value, Tensor):
        return (value,)
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    numbers = value.detach().reshape(-1).double()
    ramp = torch.arange(1, len(numbers) + 1, device=value.device, dtype=torch.float64)
    return tuple(value.shape), str(value.dtype), *torch.stack([numbers.sum(), numbers @ ramp]).tolist()


def _holder(value: Any, known: set[nn.Module]) -> nn.Module:
    """A module with all modules and parameters inside an object that is none itself."""
    holder = nn.Module()
    seen: set[int] = set()

    def look(value: Any, name: str, depth: int) -> None:
        if id(value) in seen or (isinstance(value, nn.Module) and value in known):
            return
        seen.add(id(value))
        if isinstance(value, nn.Parameter):
            holder.register_parameter(name, value)
        elif isinstance(value, nn.Module):
            holder.add_module(name, value)
        elif depth:
            for key, item in _inside(value):
                inner = str(key).replace(".", "_")
                look(item, f"{name}_{inner}" if name else inner, depth - 1)

    look(value, "", DEPTH)
    return holder


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """What an object holds, with its names."""
    if isinstance(value, functools.partial):
        return [("function", value.func), *enumerate(value.args), *value.keywords.items()]
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return list(items) if len(value) <= MOST_ITEMS else []
    if inspect.ismethod(value):
        return [("self", value.__self__)]
    return list(vars(value).items()) if hasattr(value, "__dict__") and not isinstance(value, type) else []
