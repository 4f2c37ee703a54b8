"""All parameters, buffers and counters of a run: those of the model, and of a loss or task with state of its own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.runtime.world import broadcast_from_rank_zero
from dist_train.task.task import modules_in

if TYPE_CHECKING:
    from dist_train.runtime.world import World

Fingerprint = tuple[Any, ...]
_OF_EVERY_MODULE = vars(nn.Module()).keys()


@dataclass(eq=False)
class Slot:
    """Where a buffer or number is: looked up by name each time, since a forward may replace it (`self.n = self.n + 1`).

    Attributes:
        name: as in `model.named_buffers()`, behind `loss.` or `task.` for theirs.
        owner, key: its place is `owner[key]`.
        persistent: it is in its module's state_dict.
    """

    name: str
    owner: dict[str, Any]
    key: str
    persistent: bool = False

    @property
    def value(self) -> Any:
        """The current tensor (or None) or number."""
        return self.owner.get(self.key)

    @value.setter
    def value(self, value: Any) -> None:
        self.owner[self.key] = value


class Modules(nn.Module):
    """The one place that names all parameters, buffers and counters of a run.

    The model's have the names that the model gives them; those of its loss and task begin with `loss.` and `task.`. A task or
    loss that isn't an `nn.Module` is searched for modules, parameters, tensors and numbers.

    Attributes:
        model: the model itself. display_name: its class, for messages.
        buffers_at: registered buffers, and tensors that are plain attributes. numbers_at: ints and floats among the attributes.

    Raises:
        ConfigError: two parameters have the same name.
    """

    def __init__(self, model: nn.Module, **others: Any):
        super().__init__()
        self.model = model
        self.display_name = type(model).__name__
        for name, other in others.items():
            self.add_module(name, other if isinstance(other, nn.Module) else _container(other, set(model.modules())))
        self._others = others
        for name, count in Counter(name for name, _ in self.named_parameters()).items():
            if count > 1:
                message = f"its parameter {name} has the same name as one of the model's; rename one of them"
                raise ConfigError.single(name.partition(".")[0], message)
        self.buffers_at: list[Slot] = []
        self.numbers_at: list[Slot] = []
        self._memory = {p.untyped_storage()._cdata for p in self.parameters() if p.layout == torch.strided}
        for place, module in self.named_modules():
            self._collect(module, f"{place}." if place else "")
        for name, other in others.items():
            if not isinstance(other, nn.Module) and hasattr(other, "__dict__"):
                self._collect(other, f"{name}.")
        for slot in self.buffers_at:
            if slot.value is not None and 0 in slot.value.stride():  # made by `expand`: its elements share memory
                slot.value = slot.value.clone(memory_format=torch.contiguous_format)
        self._initial: dict[str, Fingerprint] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Modules:
        """A copy whose slots refer to its own buffers and numbers."""
        other = Modules(copy.deepcopy(self.model, memo), **copy.deepcopy(self._others, memo))
        other._initial = dict(self._initial)
        return other

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Include numbers and tensors among an optimizer's attributes, which its `state_dict` leaves out (a step counter)."""
        self._collect(optimizer, "optimizer.")

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

    def synchronize(self, world: World) -> None:
        """Everything is built: copy rank 0's parameters and buffers to every rank, and note their initial values.

        Raises:
            ValueError: the processes have built different models.
        """
        shapes = {name: [list(p.shape), str(p.dtype), p.requires_grad] for name, p in self.named_parameters()}
        if world.size > 1 and shapes != world.broadcast(shapes):
            raise ValueError("the model's parameters differ from rank 0's: every process must build the same model")
        broadcast_from_rank_zero(self.parameters(), world)
        self.broadcast_buffers(world)
        self._initial = self._fingerprints()

    def broadcast_buffers(self, world: World) -> None:
        """Copy rank 0's buffers to every rank; all ranks call it."""
        broadcast_from_rank_zero((slot.value for slot in self.buffers_at), world)

    # What a checkpoint holds besides the model's state_dict.

    def task_state(self) -> dict[str, Tensor]:
        """Parameters and registered buffers of loss and task, by name."""
        own = {id(parameter) for parameter in self.model.parameters()}
        state = {name: parameter.detach() for name, parameter in self.named_parameters() if id(parameter) not in own}
        models = {id(module._buffers) for module in self.model.modules()}
        slots = [slot for slot in self.buffers_at if slot.persistent and id(slot.owner) not in models]
        return state | {slot.name: slot.value.detach() for slot in slots if slot.value is not None}

    def constants(self) -> list[str]:
        """Names in `task_state` of what doesn't train and has its initial value: it comes from the config, not from training."""
        now, trained = self._fingerprints(), self.trained()
        return [name for name in self.task_state() if name not in trained and now[name] == self._initial.get(name)]

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor], keep: Collection[str] = ()) -> None:
        """Restore what `task_state` returned, except the names in `keep`.

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
        """What has changed since the start and no state_dict can restore, by name: numbers, and buffers that aren't persistent
        or have another shape now."""
        initial, now = self._initial, self._fingerprints()
        slots = [slot for slot in self._slots if now[slot.name] != initial.get(slot.name)]
        hidden = [s for s in slots if not s.persistent or now[s.name][:2] != initial.get(s.name, ())[:2]]
        return {slot.name: _plain(slot.value) for slot in hidden}

    def values(self) -> dict[str, Any]:
        """All buffers and numbers, by name: what may differ between ranks."""
        return {slot.name: _plain(slot.value) for slot in self._slots}

    @torch.no_grad()
    def load_values(self, values: dict[str, Any]) -> None:
        """Restore buffers and numbers, as `unsaved` and `values` return them."""
        for slot in self._slots:
            if slot.name not in values:
                continue
            value, present = values[slot.name], slot.value
            if isinstance(value, Tensor) and isinstance(present, Tensor) and value.shape == present.shape:
                present.copy_(value)
            elif isinstance(value, Tensor):  # it had another size, or didn't exist, when the model was built
                device = present.device if present is not None else next(self.parameters()).device
                slot.value = value.to(device, copy=True)
            else:
                slot.value = type(present)(value) if isinstance(present, np.number | Enum) else value

    @property
    def _slots(self) -> tuple[Slot, ...]:
        return (*self.buffers_at, *self.numbers_at)

    def _fingerprints(self) -> dict[str, Fingerprint]:
        """What shows whether a tensor or number has changed, without a copy of it."""
        found = {name: _fingerprint(tensor) for name, tensor in self.task_state().items()}
        return found | {slot.name: _fingerprint(slot.value) for slot in self._slots}

    def _collect(self, owner: Any, prefix: str) -> None:
        if isinstance(owner, nn.Module):
            hidden = owner._non_persistent_buffers_set
            for key, buffer in owner._buffers.items():
                if buffer is None or buffer.layout == torch.strided:
                    self.buffers_at.append(Slot(prefix + key, owner._buffers, key, persistent=key not in hidden))
        for key, value in vars(owner).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                if value.layout == torch.strided and not value.requires_grad and not self._is_view(value):
                    self.buffers_at.append(Slot(prefix + key, vars(owner), key))
            elif isinstance(value, int | float | np.number) and not (isinstance(value, bool) and _is_mode(owner, key)):
                self.numbers_at.append(Slot(prefix + key, vars(owner), key))

    def _is_view(self, tensor: Tensor) -> bool:
        """Of a parameter, as the `weight` that torch.nn.utils.spectral_norm makes before its first forward."""
        return tensor.numel() > 0 and tensor.untyped_storage()._cdata in self._memory


class BufferSnapshot:
    """The values of all buffers and numbers at one moment, in one flat copy per dtype and device.

    With `frozen` also those of parameters that don't train, which a forward may update (a momentum encoder); they may be large,
    so they are copied to the host.
    """

    @torch.no_grad()
    def __init__(self, modules: Modules, frozen: bool = False):
        self.modules = modules
        self._buffers = [(slot, slot.value) for slot in modules.buffers_at]
        self._numbers = [(slot, slot.value) for slot in modules.numbers_at]
        kinds: dict[Any, dict[int, tuple[Slot, Tensor]]] = {}
        for slot, buffer in self._buffers:
            if buffer is not None:
                kinds.setdefault((buffer.device, buffer.dtype), {}).setdefault(id(buffer), (slot, buffer))
        self._kept = [(list(kind.values()), _flat(buffer for _, buffer in kind.values())) for kind in kinds.values()]
        still = [parameter for parameter in modules.parameters() if frozen and not parameter.requires_grad]
        self._frozen = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in still]

    def frozen_changed(self) -> bool:
        """Whether a parameter that doesn't train has another value now."""
        return any(not torch.equal(parameter.detach().cpu(), value) for parameter, value in self._frozen)

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Restore everything; with `where`, a bool on the device, only if it is true, without waiting for it.

        Numbers, and tensors on the host, are left as they are in that case: the host doesn't know the outcome.
        """
        if where is not None and any(
            getattr(slot.value, "shape", None) != getattr(buffer, "shape", None) for slot, buffer in self._buffers
        ):
            if not where:  # a buffer has another size now: this does wait
                return
            where = None
        for kept, values in self._kept:
            if where is not None and values.device != where.device:
                continue
            if where is not None:
                values = torch.where(where, values, _flat(slot.value for slot, _ in kept))
            buffers = [buffer for _, buffer in kept]
            parts = values.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
        for slot, buffer in self._buffers:
            if where is None or buffer is None or buffer.device == where.device:
                slot.value = buffer
        for slot, number in self._numbers if where is None else ():
            slot.value = number
        for parameter, value in self._frozen:
            parameter.data.copy_(value)  # not counted as a write: see building/frozen.py


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _is_mode(owner: Any, key: str) -> bool:
    """A flag that every module or torch's own has, like `training`, not one that a forward sets (`self.initialized`)."""
    return key in _OF_EVERY_MODULE or type(owner).__module__.startswith("torch.")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Enum):
        return value.value
    return value.item() if isinstance(value, np.number) else value


@torch.no_grad()
def _fingerprint(value: Any) -> Fingerprint:
    if not isinstance(value, Tensor):
        return (value,)
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    numbers = value.detach().reshape(-1).double()
    ramp = torch.arange(1, len(numbers) + 1, device=value.device, dtype=torch.float64)
    return tuple(value.shape), str(value.dtype), *torch.stack([numbers.sum(), numbers @ ramp]).tolist()


def _container(value: Any, known: set[nn.Module]) -> nn.Module:
    """A module that holds what `modules_in` finds."""
    container = nn.Module()
    for name, found in modules_in(value, known).items():
        if isinstance(found, nn.Parameter):
            container.register_parameter(name, found)
        else:
            container.add_module(name, found)
    return container
