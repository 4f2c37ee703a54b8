"""Transfer learning: pretrained weights, another head, frozen parameters, initialization by name.

Every mistake is a `ConfigError` for its key of the config, with the names that the model has.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dist_train.config.errors import ConfigError, describe
from dist_train.text import aligned

_SHOWN_ROWS = 12


# --- weights ---------------------------------------------------------------------------------------------------------


def load_weights(
    model: nn.Module, content: object, source: str, *, strict: bool = True, replaced: str | None = None
) -> list[str]:
    """Copy the weights of a file into a model, by name.

    Args:
        model: its parameters and buffers are overwritten.
        content: for a model of peft also that of its base model, which gets no weights for the adapters;
            a state_dict, or a dict with one inside (`model`, `state_dict`, ...), as torch.load or safetensors give
            it. A prefix that all of its names have (`module.` of DDP, `model.` of Lightning) is dropped if no name matches.
        source: what the file is called in messages.
        strict: every tensor must match by name and shape.
        replaced: name of a layer that need not match, as it will be replaced.

    Returns:
        Lines for the log: how many tensors were loaded, and a table of those that weren't.

    Raises:
        ConfigError: it holds no state_dict, a tensor doesn't match (strict), or none does.
    """
    own = model.state_dict()
    bases, adapters = _in_base(model, own)
    state = _state_dict(content, source, own | bases)
    if bases and not own.keys() & state.keys():
        state = {bases.get(name, name): value for name, value in state.items()}
    matching = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    rows = []
    for name in dict.fromkeys([*own, *state]):
        ours, theirs = (str(tuple(held[name].shape)) if name in held else "-" for held in (own, state))
        ignored = name in adapters or (replaced is not None and name.startswith(replaced + "."))
        if ours != theirs and not ignored and not (theirs == "-" and name.endswith("num_batches_tracked")):
            wrong = "not in the file" if theirs == "-" else "not in the model" if ours == "-" else "different shape"
            rows.append((f"  {name}", ours, theirs, wrong))
    table = aligned([("  name", "in the model", "in the file", ""), *rows[:_SHOWN_ROWS]]) if rows else []
    if len(rows) > _SHOWN_ROWS:
        table.append(f"  and {len(rows) - _SHOWN_ROWS} more")
    if not matching or (strict and rows):
        hint = "give the model the arguments that it was trained with, or load what matches with transfer.strict=false"
        hint = hint if matching else "these are the weights of another model"
        count = f"{len(matching)} of the model's {len(own)} tensors match one in {source}"
        raise ConfigError.single("transfer.weights", "\n".join([f"{count}; {hint}", *table]))
    model.load_state_dict(matching, strict=False)
    return [f"{len(matching)} of {len(own)} tensors from {source}", *table]


def _in_base(model: nn.Module, own: Mapping[str, Tensor]) -> tuple[dict[str, str], set[str]]:
    """For a model of peft: its names by those that they have in the model that it wraps, and the names of its adapters."""
    if not hasattr(model, "peft_config"):
        return {}, set()
    prefix = adapter_prefix(model)
    adapters = {name for name in own if prefix in name or ".modules_to_save." in name}
    bases = {}
    for name in own.keys() - adapters:
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        bases[plain] = name
    return bases, adapters


def adapter_prefix(model: nn.Module) -> str:
    """What the names of adapters have in them, in a model of peft (`.lora_`)."""
    return f".{getattr(getattr(model, 'base_model', None), 'prefix', 'lora_')}"


def _state_dict(content: object, source: str, own: Mapping[str, object]) -> dict[str, Tensor]:
    """The state_dict in the content of a file, without prefixes that the model's names don't have."""
    for name in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = describe(dict(content) if isinstance(content, Mapping) else content)
        message = f"expected a state_dict (names and tensors) in {source}, found {found}"
        raise ConfigError.single("transfer.weights", f"{message}; save one with torch.save(model.state_dict(), FILE)")
    state = {str(name): value for name, value in content.items()}
    while not own.keys() & state.keys():
        prefix = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in state):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


# --- layers ----------------------------------------------------------------------------------------------------------


def find_head(model: nn.Module, at: str | None = None) -> str:
    """The name of the layer that determines the number of outputs: `at`, or the last linear layer (or convolution).

    Raises:
        ConfigError: there is none, or `at` is another kind of layer.
    """
    layer = model if at is None else _layer(model, at, "transfer.head.at")
    if at is not None and isinstance(layer, nn.Linear | nn.Conv2d):
        return at
    names = [(name, module) for name, module in layer.named_modules() if name]
    if hasattr(model, "peft_config"):  # layers of its adapters are none of the model
        names = [(name, module) for name, module in names if adapter_prefix(model) not in f".{name}"]
    inside = [[name for name, module in names if isinstance(module, kind)] for kind in (nn.Linear, nn.Conv2d)]
    last = next((names[-1] for names in inside if names), None)
    if at is not None:
        hint = f"; did you mean {at}.{last}?" if last else ""
        message = f"expected a Linear or Conv2d layer, but {at} is a {type(layer).__name__}{hint}"
        raise ConfigError.single("transfer.head.at", message)
    if last is None:
        message = f"{type(model).__name__} has no linear layer or convolution to replace; use transfer.append"
        raise ConfigError.single("transfer.head", message)
    return last


def replace_head(model: nn.Module, name: str, classes: int) -> str:
    """Replace layer `name` by one with `classes` outputs, otherwise like the old one; returns a line for the log."""
    old: Any = model.get_submodule(name)
    like = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, classes, **like)
    else:
        size = (old.kernel_size, old.stride, old.padding, old.dilation)
        new = nn.Conv2d(old.in_channels, classes, *size, **like)
    model.set_submodule(name, new)
    return f"head {name}: {len(old.weight)} -> {classes} outputs"


def append_module(model: nn.Module, at: str, name: str, module: nn.Module) -> str:
    """Append `module` to the Sequential `at`; returns a line for the log.

    Raises:
        ConfigError: no such layer, not a Sequential, the name is taken, or the last layer's outputs aren't its inputs.
    """
    holder = _layer(model, at, "transfer.append.at")
    if not isinstance(holder, nn.Sequential):
        known = ", ".join(n for n, part in model.named_modules() if isinstance(part, nn.Sequential) and n)
        message = f"expected a Sequential, which calls what is appended to it, but {at} is a {type(holder).__name__}"
        raise ConfigError.single("transfer.append.at", f"{message}; those of this model are {known or 'none'}")
    if not name.isidentifier() or name in holder._modules:
        message = f"expected a new name, found {describe(name)}; {at} holds {', '.join(holder._modules)}"
        raise ConfigError.single("transfer.append.name", message)
    last = [part.out_features for part in holder.modules() if isinstance(part, nn.Linear)][-1:]
    first = [part.in_features for part in module.modules() if isinstance(part, nn.Linear)][:1]
    if last and first and last != first:
        message = f"the last linear layer of {at} has {last[0]} outputs, but this takes {first[0]} inputs"
        raise ConfigError.single("transfer.append.module", message)
    holder.add_module(name, module)
    return f"appended {at}.{name}: {type(module).__name__}"


def _layer(model: nn.Module, name: str, key: str) -> nn.Module:
    known = dict(model.named_modules())
    if name not in known or not name:
        message = f"{type(model).__name__} has no layer {name!r}; names look like {_near(name, known)}"
        raise ConfigError.single(key, message)
    return known[name]


def _near(word: str, known: Iterable[str]) -> str:
    names = [name for name in known if name]
    return ", ".join(difflib.get_close_matches(word, names, n=3, cutoff=0.4) or names[:5])


# --- parameters and modules by name ----------------------------------------------------------------------------------


def match_parameters(model: nn.Module, patterns: Sequence[str], key: str) -> list[str]:
    """Names of the parameters that match a pattern, in the model's order; of a tied one the first, whichever matches.

    A shell pattern may match the parameter's name, that of a module around it, its module's class, or class and
    parameter: `features.*`, `layer[1-3]`, `BatchNorm2d`, `Conv2d.weight`.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    words: dict[str, list[str]] = {}  # each parameter's name, and all that a pattern may match
    names: dict[nn.Parameter, str] = {}
    for place, module in model.named_modules():
        kind = type(module).__name__
        around = list(itertools.accumulate(place.split("."), "{}.{}".format))
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{place}.{leaf}" if place else leaf
            first = names.setdefault(parameter, name)
            words.setdefault(first, []).extend([name, *around, kind, f"{kind}.{leaf}"])
    return _match(words, patterns, key, f"parameter of {getattr(model, 'display_name', type(model).__name__)}")


def match_modules(model: nn.Module, patterns: Sequence[str], key: str) -> list[str]:
    """Names of the modules that match a pattern by name or class, in the model's order.

    Raises:
        ConfigError: a pattern matches no module.
    """
    words = {name: [name, type(module).__name__] for name, module in model.named_modules() if name}
    return _match(words, patterns, key, f"module of {type(model).__name__}")


def _match(words: Mapping[str, list[str]], patterns: Sequence[str], key: str, what: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatch.filter(found, pattern) for found in words.values()):
            near = _near(pattern, dict.fromkeys(word for found in words.values() for word in found))
            raise ConfigError.single(key, f"{pattern} matches no {what}; names look like {near}")
    return [name for name, found in words.items() if any(fnmatch.filter(found, pattern) for pattern in patterns)]


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that match; normalization layers without a trainable parameter keep their statistics as well.

    Raises:
        ConfigError: a pattern matches no parameter, or every parameter is frozen.
    """
    for name in match_parameters(model, patterns, "transfer.freeze"):
        model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        message = f"{', '.join(patterns)} freezes every parameter: nothing is left to train"
        raise ConfigError.single("transfer.freeze", message)
    # An attribute of the instance, so that every caller finds it first. A bound method is copied and pickled with its
    # object; unpickled it is the class's own `train`, so that a file with the whole module needs torch alone.
    model.__dict__["train"] = types.MethodType(_train, model)
    model.train(model.training)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    type(self).train(self, mode)
    for module in self.modules():
        if isinstance(module, _NormBase) and module.affine and not any(p.requires_grad for p in module.parameters()):
            module.training = False
    return self


_train.__name__ = "train"  # what pickle looks for in the class


def initialize(model: nn.Module, patterns: Sequence[str], fill: Callable[[Tensor], object], key: str) -> None:
    """Initialize the parameters that match by `fill(parameter)`, in the model's order.

    Raises:
        ConfigError: a pattern matches no parameter, or `fill` fails for one.
    """
    wanted = set(match_parameters(model, patterns, f"{key}.match"))
    for name, parameter in model.named_parameters():  # a shared one once
        if name in wanted:
            try:
                with torch.no_grad():
                    fill(parameter)
            except Exception as error:  # whatever the function says about this tensor
                wrong = f"it can't initialize {name} {tuple(parameter.shape)}: {error}"
                raise ConfigError.single(key, f"{wrong}; match others, like Conv2d.weight") from error
