"""torch's compiler where nothing is compiled: importing torch._dynamo takes as long as importing torch, so it isn't imported.

torch's optimizers import it when they are constructed and in each step, but only to tell the compiler to leave them alone: its
`disable` and `graph_break` do nothing outside of compiled code, and code is compiled by importing torch._dynamo first.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def is_imported() -> bool:
    """Whether anything in this process can have been compiled."""
    return "torch._dynamo" in sys.modules


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """A context in which compiled functions run as they were written."""
    return torch.compiler.set_stance("force_eager") if is_imported() else contextlib.nullcontext()


def defer_compiler(kind: Any) -> None:
    """Let torch's optimizers, and the class `kind` if it is one or a dispatch mode, import torch._dynamo only to compile.

    What a torch of another version does in another way stays as it is.
    """
    classes = kind.__mro__ if isinstance(kind, type) else ()
    for owner in (torch.optim.Optimizer, *classes):
        if is_imported():
            return
        for name, function in list(vars(owner).items()):
            code, inner = getattr(function, "__code__", None), getattr(function, "__wrapped__", None)
            if code is None or inner is None:
                continue
            if code.co_name == "inner" and code.co_filename.endswith("_compile.py"):
                if not hasattr(inner, "__dynamo_disable"):  # where torch keeps what its own first call has made
                    inner.__dynamo_disable = _undisabled(function, inner)
            elif code.co_name == "_use_grad" and "_dynamo" in code.co_names:
                setattr(owner, name, _with_gradients_as_asked(function, inner))


def _undisabled(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner` until something is compiled, then what torch's `_disable_dynamo` makes of it."""

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_imported():
            return inner(*args, **kwargs)
        with contextlib.suppress(AttributeError):
            del inner.__dynamo_disable  # type: ignore[attr-defined]
        return function(*args, **kwargs)

    return call


def _with_gradients_as_asked(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's `_use_grad_for_differentiable`: an optimizer's step in the grad mode that `differentiable` says."""

    @functools.wraps(inner)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_imported():
            return function(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return inner(self, *args, **kwargs)

    return step
