"""Which generators of random numbers a training step can draw from, where that is known exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import _has_any_global_hook

from dist_train.config.fields import live_objects
from dist_train.task.task import Supervised

if TYPE_CHECKING:
    from torch import nn

    from dist_train.config.schema import Config
    from dist_train.objective.modules import Modules

_KNOWN = ("torch.nn.", "torch.optim.", "torchvision.models.", "torchvision.ops.", "dist_train.")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def draws_from_torch_alone(config: Config, modules: Modules, task: Any) -> bool:
    """Whether all that runs between two seedings is torch's, torchvision's or ours, none of which draws from numpy or `random`.

    Any other code may draw from them in any step, also where it hasn't before; so they are seeded for it in each.
    """
    if config.callbacks or type(task) is not Supervised or _has_any_global_hook():
        return False
    if not _is_known(task.loss.function) or not all(map(_is_known, _targets(config.scheduler))):
        return False
    return all(map(_plain, modules.modules())) and not any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in modules.parameters()
    )


def _plain(module: nn.Module) -> bool:
    """A module of a known class, to which nobody has added anything."""
    return _is_known(module) and "forward" not in vars(module) and not any(getattr(module, name) for name in _HOOKS)


def _is_known(value: Any) -> bool:
    """By where its class, or the function itself, is defined."""
    home = value if isinstance(value, str) else getattr(value, "__module__", None) or type(value).__module__
    return f"{home}.".startswith(_KNOWN)


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
