"""Objects named by import path: `{_target_: package.module.Name, argument: value}`.

A spec is such a dict, or a live object from Python. This module itself imports neither torch nor user code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from .errors import ConfigError, did_you_mean
from .fields import expand_argument


def add_code_paths(paths: Iterable[str]) -> None:
    """Look for user code in `paths` first, in their order. Idempotent."""
    wanted = [os.path.abspath(path) for path in paths]
    rest = [path for path in sys.path if path not in wanted]
    if [*wanted, *rest] != sys.path:
        sys.path[:] = [*wanted, *rest]
        importlib.invalidate_caches()


def locate(path: Any) -> Any:
    """The class, function or object at an import path (`pkg.mod.Name`, `pkg.mod.Class.method`); a non-string as it is.

    Raises:
        ConfigError: no such module or name, with the nearest one; or the user's module fails while it is imported, with
            the file and line of that failure.
    """
    if not isinstance(path, str):
        return path
    parts = path.split(".")
    if len(parts) == 1 or not all(part.isidentifier() for part in parts):
        raise ConfigError.single("", f"{path!r} is not an import path like torch.nn.Linear")
    found: Any = _import(parts[0])
    if found is None:
        raise ConfigError.single("", no_module(parts[0]))
    for depth, part in enumerate(parts[1:], start=1):
        if hasattr(found, part):
            found = getattr(found, part)
        elif hasattr(found, "__path__") and (inner := _import(".".join(parts[: depth + 1]))) is not None:
            found = inner
        else:
            holder = ".".join(parts[:depth])
            kind = "module" if isinstance(found, types.ModuleType) else "object"
            hint = did_you_mean(part, (name for name in dir(found) if not name.startswith("_")), prefix=holder + ".")
            where = f" ({_short(found.__file__)})" if not hint and getattr(found, "__file__", None) else ""
            raise ConfigError.single("", f"{kind} {holder}{where} has no {part}{hint}")
    return found


def no_module(name: str) -> str:
    """The message for a module that doesn't exist."""
    places = f"{', '.join(map(_short, sys.path[:2]))} and among installed packages (run.code_paths adds directories)"
    hint = did_you_mean(name, {module.name for module in pkgutil.iter_modules()}) or f"; looked in {places}"
    return f"no module named {name}{hint}"


def _import(name: str) -> types.ModuleType | None:
    """A module, or None where there is none of this name."""
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` exits
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        raise ConfigError.single("", _import_failure(name, error)) from error


def _import_failure(name: str, error: BaseException) -> str:
    """The message for a module that raises: the last frame outside Python's import machinery and this file."""
    skipped = ("<frozen", os.sep + "importlib" + os.sep, __file__)
    at = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    at, text = [place for place in at if not any(part in place[0] for part in skipped)], str(error).partition("\n")[0]
    if isinstance(error, SyntaxError) and error.filename:
        at, text = [(error.filename, error.lineno)], error.msg
    place = f" at {_short(at[-1][0])}:{at[-1][1]}" if at else ""
    return f"importing {name} failed{place}: {type(error).__name__}: {text}"


def _short(path: str) -> str:
    relative = os.path.relpath(path or ".")
    return path if relative.startswith("..") else relative


def is_spec(value: Any) -> bool:
    """Whether a value is written as a component."""
    return isinstance(value, dict) and "_target_" in value


def reserved(spec: Any, names: Iterable[str]) -> tuple[Any, dict[str, Any]]:
    """The spec without the keys `names`, and those keys; a live object has none."""
    if not isinstance(spec, dict):
        return spec, {}
    taken = {key: spec[key] for key in names if key in spec}
    return {key: value for key, value in spec.items() if key not in taken}, taken


def build(spec: Any, *args: Any, **kwargs: Any) -> Any:
    """The instance that a spec describes; `args` come before its `_args_`, `kwargs` take precedence over its arguments.

    A live object is returned as it is; but with `args` or `kwargs`, a live factory (a class, function or partial) is
    called with them. Raises ConfigError where the target isn't found; what the target itself raises goes through.
    """
    if not is_spec(spec):
        factory = isinstance(spec, type | types.FunctionType | types.BuiltinFunctionType | functools.partial)
        return spec(*args, **kwargs) if (args or kwargs) and factory else spec
    target = locate(spec["_target_"])
    given, keywords = arguments(target, spec)
    return target(*args, *given, **{**keywords, **kwargs})


def build_callable(spec: Any) -> Callable[..., Any]:
    """For a loss or a collate function: a class is built; a function whose required parameters are all given is called,
    as a factory; any other function gets the arguments of the spec as a partial. A live object is returned as it is.
    """
    if not is_spec(spec):
        return typing.cast(Callable[..., Any], spec() if isinstance(spec, type) else spec)
    target = locate(spec["_target_"])
    given, keywords = arguments(target, spec)
    whole = isinstance(target, type)
    with contextlib.suppress(TypeError, ValueError):
        whole = whole or inspect.signature(target).bind(*given, **keywords) is not None
    maker = functools.partial(target, *given, **keywords) if given or keywords else target
    return typing.cast(Callable[..., Any], maker() if whole else maker)


def signature(target: Any) -> inspect.Signature | None:
    """The call signature, or None for builtins without one."""
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def arguments(target: Any, spec: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The built positional and keyword arguments of a spec: nested specs are built, lists become tensors where annotated."""
    form = signature(target)
    parameters = form.parameters if form is not None else {}
    keywords = {k: _value(item, parameters.get(k)) for k, item in spec.items() if k not in ("_target_", "_args_")}
    args = spec.get("_args_", [])
    given = itertools.zip_longest(args, list(parameters.values())[: len(args)])
    return [_value(item, parameter) for item, parameter in given], keywords


def _value(value: Any, parameter: inspect.Parameter | None = None) -> Any:
    if is_spec(value):
        return build(value)
    if isinstance(value, str):
        return expand_argument(value)
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items = [_value(item) for item in value]
    if parameter is not None and "Tensor" in type_names(parameter.annotation):
        import torch

        return torch.tensor(items)
    return items


def type_names(annotation: Any) -> set[str]:
    """The names of the types in an annotation or a union, as in the source; empty without one."""
    if annotation is inspect.Parameter.empty:
        return set()
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*map(type_names, typing.get_args(annotation)))
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if not isinstance(annotation, str | type):  # list[Tensor] is called list
        return {text}
    text = re.sub(r"^(typing\.)?Optional\[(.*)\]$", r"\2 | None", text.strip())
    return {part.strip().rpartition(".")[2] for part in text.split("|")}
