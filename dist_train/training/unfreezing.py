"""Parameters that begin or cease to train in the middle of a run: what follows from it, what is saved of it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _NormBase

from dist_train.optim.groups import Grouping, Home, add_group, add_to_group
from dist_train.optim.parameters import fill_momentum
from dist_train.step.several import Optimizers, SeveralSteppers

if TYPE_CHECKING:
    from dist_train.step.step import Stepper
    from dist_train.training.parts import Parts


class Trainable:
    """Notices that a callback has called `requires_grad_` or `optimizer.add_param_group`, and makes everything else follow."""

    def __init__(self, parts: Parts, stepper: Stepper | SeveralSteppers):
        self.parts, self.stepper = parts, stepper
        self._parameters = list(parts.modules.parameters())
        self._seen = self._now()

    def follow(self) -> None:
        """After callbacks: if other parameters train now, gradients are cleared; optimizer, schedule, EMA and reducer follow.

        Raises:
            ValueError: nothing trains any more, the ranks train different parameters, or the optimizer has a foreign one.
        """
        if self._now() == self._seen:
            return
        parts = self.parts
        if isinstance(parts.optimizer, Optimizers):
            raise ValueError(
                "a callback lets other parameters train, which is for one optimizer: of several each has its own from the start"
            )
        for parameter in self._parameters:
            parameter.grad = None
        _complete_groups(parts)
        _unfreeze_norms(parts)
        if parts.frozen is not None:
            parts.frozen.keep_unfrozen()
        mine = trainable_state(parts)
        for rank, theirs in enumerate(parts.world.all_gather(mine)):
            if theirs != mine:
                raise ValueError(
                    f"a callback lets rank {rank} train other parameters than rank {parts.world.rank}: on every rank it must do "
                    "the same at the same step"
                )
        assert not isinstance(self.stepper, SeveralSteppers)
        fill_momentum(parts.optimizer)
        _extend(parts)
        self.stepper.renew_reducer()
        gc.collect()  # DDP refers to itself: until it is collected, its hooks stay on the parameters
        self._seen = self._now()

    def check_known(self) -> None:
        """Raises ValueError: there are parameters that weren't there when the optimizer was built, or others train than then."""
        names = {id(parameter): name for name, parameter in self.parts.modules.named_parameters()}
        known = {id(parameter) for parameter in self._parameters}
        new = [name for key, name in names.items() if key not in known]
        if new:
            raise ValueError(
                f"{', '.join(new[:5])}: made in the middle of a run (by a forward, say), which the optimizer and the other ranks "
                "don't know. Make every parameter in __init__, and change it in place"
            )
        for parameter, trained in zip(self._parameters, self._seen[0], strict=True):
            if parameter.requires_grad != trained:
                name = names.get(id(parameter), "a parameter")
                raise ValueError(
                    f"{name}: requires_grad was set to {not trained} outside of a callback (by a forward, say), where optimizer, "
                    "schedule and the other ranks don't notice: do it in a callback (dist_train.callbacks.Unfreeze, or your own)"
                )

    def _now(self) -> Any:
        groups = self.parts.optimizer.param_groups
        return [parameter.requires_grad for parameter in self._parameters], [len(group["params"]) for group in groups]


def trainable_state(parts: Parts) -> dict[str, Any]:
    """Which parameters there are and which train, those of each of the optimizer's groups, and the modules in eval mode."""
    names = {id(parameter): name for name, parameter in parts.modules.named_parameters()}
    return {
        "parameters": list(names.values()),
        "trained": list(parts.modules.trained()),
        "groups": [[names.get(id(p)) for p in group["params"]] for group in parts.optimizer.param_groups],
        "evaluating": [name for name, module in parts.modules.named_modules() if not module.training],
    }


def load_trainable_state(parts: Parts, saved: dict[str, Any]) -> bool:
    """Restore what `trainable_state` returned; False, and nothing is changed, where the parameters are others."""
    parameters = dict(parts.modules.named_parameters())
    if saved["parameters"] != list(parameters):
        return False
    trained, evaluating = set(saved["trained"]), set(saved["evaluating"])
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    for index, names in enumerate(saved["groups"]):
        if None in names:  # an optimizer of the user's own, which trains something else as well
            continue
        members = {name: parameters[name] for name in names}
        if index < len(parts.optimizer.param_groups):
            group = parts.optimizer.param_groups[index]
            group |= {"params": list(members.values())} | ({"param_names": names} if "param_names" in group else {})
        else:
            add_group(parts.optimizer, members, {})  # type: ignore[arg-type]  # several have no groups of callbacks
    for name, module in parts.modules.named_modules():
        if module.training == (name in evaluating):
            module.training = name not in evaluating
    _extend(parts)
    return True


def _extend(parts: Parts) -> None:
    if parts.schedule is not None:
        parts.schedule.extend()
    if parts.ema is not None:
        parts.ema.follow()


def _complete_groups(parts: Parts) -> None:
    """Put every parameter that trains into the group that the config gives it; those that it names nowhere into the first."""
    optimizer, trained = parts.optimizer, parts.modules.trained()
    assert not isinstance(optimizer, Optimizers)
    if not trained:
        raise ValueError("a callback has frozen every parameter: nothing is left to train")
    names = {id(parameter): name for name, parameter in parts.modules.named_parameters()}
    known = [names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    if None in known:
        raise ValueError(
            "the optimizer was given a parameter that belongs neither to the model nor to its loss or task"
        )
    grouping = Grouping(parts.modules, parts.config.optimizer)
    own = _own_groups(optimizer, grouping, names)
    new: dict[Home, dict[str, Any]] = {}
    for name, parameter in trained.items():
        home = grouping.home[name]
        if name not in known and home in own:
            add_to_group(own[home], name, parameter)
        elif name not in known:
            new.setdefault(home, {})[name] = parameter
    first, base = optimizer.param_groups[0], optimizer.defaults.get("lr")
    for home, members in new.items():
        options = grouping.options(home)
        if base is not None:  # as if it had followed the schedule from the beginning, as the first group has
            mine = options.get("lr", base)
            theirs = grouping.options(next(iter(own), home)).get("lr", base)
            options["lr"] = first["lr"] if mine == theirs else first["lr"] * mine / (theirs or 1.0)
        add_group(optimizer, members, options)


def _own_groups(optimizer: Any, grouping: Grouping, names: dict[int, str]) -> dict[Home, dict[str, Any]]:
    """The optimizer's groups that are the config's, by the home of their parameters; callbacks add theirs behind them."""
    groups = optimizer.param_groups
    if grouping.decay is not None:
        groups = [group for group in groups if "lr_scale" in group]
    else:
        first = groups[0]["params"]
        has_default = not first or grouping.home[names[id(first[0])]].group is None
        groups = groups[: len(grouping.groups) + has_default]
    homes = [grouping.home[names[id(group["params"][0])]] if group["params"] else Home(None, 0) for group in groups]
    return dict(zip(homes, groups, strict=True))


def _unfreeze_norms(parts: Parts) -> None:
    """Norms that `transfer.freeze` has put into eval mode train again together with their parameters."""
    for module in parts.modules.modules() if parts.config.transfer.freeze else ():
        if isinstance(module, _NormBase) and any(p.requires_grad for p in module.parameters(recurse=False)):
            module.train()
