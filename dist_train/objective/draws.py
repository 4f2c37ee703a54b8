"""Which generators of random numbers a training step can draw from, where that is known exactly."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import _has_any_global_hook

from dist_train.config.fields import live_objects
from dist_train.task.task import Supervised

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from dist_train.config.schema import Config
    from dist_train.objective.modules import Modules

_KNOWN = ("torch.nn.", "torch.optim.", "torch.utils.data.", "torchvision.models.", "torchvision.ops.", "dist_train.")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ANY_OBJECT = "dist_train.config.components.locate"  # a component that is whatever its argument names


def draws_from_torch_alone(config: Config, modules: Modules, task: Any, between: Iterable[Any]) -> bool:
    """Whether all that runs between two seedings is torch's, torchvision's or ours, none of which draws from numpy or `random`.

    Any other code may draw from them in any step, also where it hasn't before; so they are seeded for it in each.

    Args:
        between: what else runs there: of each optimizer the function that its step is (None where there is more around it), and
            what reads the dataset.
    """
    if config.callbacks or type(task) is not Supervised or _has_any_global_hook():
        return False
    if not _is_known(task.loss.function) or not all(map(_is_known, _targets(config.scheduler))):
        return False
    if not all(map(_is_known, between)):
        return False
    return all(map(_plain, modules.modules())) and all(
        _is_known(p) and not (p._backward_hooks or p._post_accumulate_grad_hooks) for p in modules.parameters()
    )


def _plain(module: nn.Module) -> bool:
    """A module of a known class, to which nobody has added anything, and given no function (an activation, say)."""
    called = [value for value in vars(module).values() if callable(value)]
    return all(map(_is_known, [module, type(module).forward, *called])) and not any(
        getattr(module, name) for name in _HOOKS
    )


def _is_known(value: Any) -> bool:
    """By where the function itself, or all that its class inherits from, is defined."""
    if isinstance(value, str):
        return value.startswith(_KNOWN) and value != _ANY_OBJECT
    if isinstance(value, types.FunctionType):  # functools.wraps copies __module__
        return f"{value.__globals__.get('__name__')}.".startswith(_KNOWN)
    kind = value if isinstance(value, type) else type(value)
    # torch.nn.utils.parametrize makes a class of its own of anybody's
    homes = {base.__module__ for base in kind.__mro__} - {"builtins", "torch", "torch._C", "torch._tensor", "typing"}
    return bool(homes) and all(f"{home}.".startswith(_KNOWN) for home in homes)


def _targets(spec: Any) -> list[Any]:
    """Every `_target_` in a component, and whatever in it isn't plain."""
    if isinstance(spec, str):
        return [spec]
    if isinstance(spec, dict):
        own = [spec["_target_"]] if "_target_" in spec else []
        return own + [target for value in spec.values() for target in _targets(value) if not isinstance(value, str)]
    if isinstance(spec, list | tuple):
        return [target for value in spec for target in _targets(value) if not isinstance(value, str)]
    return [spec] if next(live_objects(spec), None) is not None else []
