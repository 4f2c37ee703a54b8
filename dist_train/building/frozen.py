"""`checkpoint.what: trained`: frozen weights aren't saved, they come from the config again and are known by their hash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.data.digest import content_digest
from dist_train.task.batch import HALF


class Frozen:
    """The parameters of a model that don't train from the start, with the values that the config gives them.

    One that trains later, or changes (a momentum encoder), is saved from then on.

    Args:
        hashed: take the hashes too, which the rank that saves needs; reads all of them once.
    """

    def __init__(self, model: nn.Module, hashed: bool):
        self._model = model
        self._parameters = {
            name: parameter for name, parameter in _parameters(model).items() if not parameter.requires_grad
        }
        self._digests = {name: content_digest(p) for name, p in self._parameters.items()} if hashed else {}
        self._marks = dict(zip(self._parameters, _marks(self._parameters.values()), strict=True))
        self._kept: dict[str, Tensor] = {}

    def compare(self, left_out: Mapping[str, Any], location: str) -> None:
        """Before anything is written: whether these are what a checkpoint leaves out, where the hashes are known.

        Raises:
            ConfigError: names the first one that isn't the same.
        """
        _compare(self._digests, left_out, location)

    def keep_unfrozen(self) -> None:
        """Copy those that train from now on to the host: an earlier checkpoint doesn't hold their values."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and name not in self._kept:
                self._kept[name] = parameter.detach().to("cpu", copy=True)

    @torch.no_grad()
    def make_way(self, state: Mapping[str, Any]) -> None:
        """Before a checkpoint's `state` is loaded: those in it are copied to the host, the others have their values again."""
        for name, parameter in self._parameters.items():
            if name in state and name not in self._kept:
                self._kept[name] = parameter.detach().to("cpu", copy=True)
            elif name not in state and name in self._kept:
                parameter.copy_(self._kept[name])

    def describe(self) -> str:
        """For the user: how much isn't saved."""
        count = sum(parameter.numel() for parameter in {id(p): p for p in self._parameters.values()}.values())
        whole = sum(parameter.numel() for parameter in self._model.parameters())
        return f"without {count:,} frozen parameters of {whole:,}, which are compared by their hash" if count else ""

    def split(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """A state_dict without those that have not changed, and their hashes by name."""
        same = []
        for (name, parameter), mark in zip(self._parameters.items(), _marks(self._parameters.values()), strict=True):
            if (
                mark != self._marks[name]
                and mark[0] == self._marks[name][0]
                and content_digest(parameter) == self._digests[name]
            ):
                self._marks[name] = mark  # written over with the same value, or moved
            if mark == self._marks[name] and not parameter.requires_grad:
                same.append(name)
        digests = {name: self._digests[name] for name in same}
        return {name: value for name, value in state.items() if name not in digests}, digests


def load_trained(model: nn.Module, state: Mapping[str, Any], left_out: Mapping[str, Any], location: str) -> None:
    """Load a state_dict that leaves frozen weights out, once the model is seen to hold the same ones.

    Args:
        left_out: `sha256`, their hashes by name, and `from`, the key that gives the model these weights.
        location: what they were saved in, for messages.

    Raises:
        ConfigError: names the first one that isn't the same.
        RuntimeError: the rest doesn't fit the model.
    """
    own, wanted = _parameters(model), left_out["sha256"]
    _compare({name: content_digest(own[name]) for name in wanted if name in own}, left_out, location)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if wrong := [name for name in missing if name not in wanted] + unexpected:
        raise RuntimeError(f"missing or unexpected: {', '.join(wrong[:5])}")


def _compare(found: Mapping[str, str], left_out: Mapping[str, Any], location: str) -> None:
    key = left_out["from"]
    for name, digest in left_out["sha256"].items():
        if found.get(name) != digest:
            raise ConfigError.single(
                key,
                f"{location} holds trained weights only (checkpoint.what=trained), to be put on the frozen ones that the run was "
                f"trained with, but {name} is another one: expected the hash {digest}, found {found.get(name, 'none')}. Give "
                f"{key} the weights of then (files as they were, the same versions of the packages that make the model)",
            )


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters in a model's state_dict, by each of their names there (tied ones have several)."""
    ids = {id(parameter) for parameter in model.parameters() if parameter.layout is torch.strided}
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) in ids}


@torch.no_grad()
def _marks(tensors: Iterable[Tensor]) -> list[tuple[float, int, int]]:
    """What shows whether a tensor has changed, without a copy and with one wait for the device: its norm, which writes behind
    autograd's back (`.data`) change too, the count of all others, and its memory."""
    tensors = [tensor.detach() for tensor in tensors]
    norms = []
    for tensor in tensors:
        plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # quantized
        plain = plain if plain.is_floating_point() or plain.is_complex() else plain.double()
        # Float64 is slow on the CPU.
        wide = torch.float64 if plain.is_cuda else torch.float32 if plain.dtype in HALF else None
        norms.append(torch.linalg.vector_norm(plain, dtype=wide if plain.is_floating_point() else None).double())
    values = torch.stack(norms).tolist() if norms else []
    return [(norm, tensor._version, tensor.data_ptr()) for norm, tensor in zip(values, tensors, strict=True)]
