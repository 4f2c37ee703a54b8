"""Objects named by import path: `{_target_: package.module.Name, argument: value}`.

A spec is such a dict, or a live object handed over from Python. This module itself imports no torch and no user code.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from .schema import Config


def add_code_paths(paths: Iterable[str]) -> None:
    """Look for user code in `paths` first, in their order. Done twice, it changes nothing."""
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
    if not all(part.isidentifier() for part in parts):
        hint = f"; write {path.replace(':', '.')}" if ":" in path else ""
        raise ConfigError.single("", f"{path!r} is not an import path like package.module.Name{hint}")
    if len(parts) == 1:
        raise ConfigError.single("", f"{path!r} names no module; write module.{path}" + _beside(path))
    module, depth = _import_longest(parts)
    found: Any = module
    for index, part in enumerate(parts[depth:], start=depth):
        try:
            found = getattr(found, part)
        except AttributeError:
            holder = ".".join(parts[:index])
            kind = "module" if isinstance(found, types.ModuleType) else "object"
            hint = did_you_mean(part, (name for name in dir(found) if not name.startswith("_")), prefix=holder + ".")
            where = getattr(found, "__file__", None)
            note = f" ({_short(where)})" if where and kind == "module" and not hint else ""
            raise ConfigError.single("", f"{kind} {holder}{note} has no {part}{hint}") from None
    return found


def _import_longest(parts: list[str]) -> tuple[types.ModuleType, int]:
    """The deepest of the modules a, a.b, a.b.c that exists, and how many parts it takes."""
    module: types.ModuleType | None = None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if module is not None and (not hasattr(module, "__path__") or hasattr(module, parts[depth - 1])):
            loaded = sys.modules.get(name)
            if loaded is None or getattr(module, parts[depth - 1], None) is not loaded:
                return module, depth - 1
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                if module is not None:
                    return module, depth - 1
                raise ConfigError.single("", f"no module named {name}" + _nearest_module(name)) from None
            raise ConfigError.single("", _import_failure(name, error)) from error
        except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` exits
            raise ConfigError.single("", _import_failure(name, error)) from error
    assert module is not None
    return module, len(parts)


def _import_failure(name: str, error: BaseException) -> str:
    """A failure inside a module: the last line of it that isn't Python's import machinery or this file."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and file != __file__ and os.sep + "importlib" + os.sep not in file:
            place = f" at {_short(file)}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, SyntaxError) and error.filename:
        place, text = f" at {_short(error.filename)}:{error.lineno}", error.msg
    return f"importing {name} failed{place}: {type(error).__name__}: {text}"


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _nearest_module(name: str) -> str:
    import pkgutil

    hint = did_you_mean(name, {module.name for module in pkgutil.iter_modules()})
    places = [_short(path or ".") for path in sys.path[:2]]
    return hint or f"; looked in {', '.join(places)} and among what is installed (run.code_paths adds directories)"


def _beside(name: str) -> str:
    """The likely full path of a bare class name, for those that people use most."""
    for module in ("torch.nn", "torch.optim", "torch.optim.lr_scheduler", "dist_train.data", "dist_train.models"):
        loaded = sys.modules.get(module)
        if loaded is not None and hasattr(loaded, name):
            return f", for example {module}.{name}"
    return ""


def is_spec(value: Any) -> bool:
    """Whether a value is written as a component."""
    return isinstance(value, dict) and "_target_" in value


def reserved(spec: Any, names: Iterable[str]) -> tuple[Any, dict[str, Any]]:
    """The spec without the keys `names`, and those keys; a live object has none."""
    if not isinstance(spec, dict):
        return spec, {}
    taken = set(names)
    return (
        {key: value for key, value in spec.items() if key not in taken},
        {key: value for key, value in spec.items() if key in taken},
    )


def build(spec: Any, *args: Any, **kwargs: Any) -> Any:
    """The instance that a spec describes; `args` come before its `_args_`, `kwargs` win over its arguments.

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
    if isinstance(target, type) or _has_all(target, given, keywords):
        return typing.cast(Callable[..., Any], target(*given, **keywords))
    return functools.partial(target, *given, **keywords) if given or keywords else target


def _has_all(target: Any, given: Sequence[Any], keywords: dict[str, Any]) -> bool:
    form = signature(target)
    if form is None:
        return False
    try:
        form.bind(*given, **keywords)
    except TypeError:
        return False
    return True


def signature(target: Any) -> inspect.Signature | None:
    """The call signature, or None for builtins that don't tell."""
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def arguments(target: Any, spec: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The built positional and keyword arguments of a spec: nested specs first, lists as tensors where wanted."""
    keywords = {key: _value(item) for key, item in spec.items() if key not in ("_target_", "_args_")}
    given = [_value(item) for item in spec.get("_args_", [])]
    form = signature(target)
    if form is None:
        return given, keywords
    parameters = form.parameters
    for key, value in keywords.items():
        if isinstance(value, list) and key in parameters and wants_tensor(parameters[key].annotation):
            keywords[key] = _tensor(value)
    for index, (value, parameter) in enumerate(zip(given, parameters.values(), strict=False)):
        if isinstance(value, list) and wants_tensor(parameter.annotation):
            given[index] = _tensor(value)
    return given, keywords


def _value(value: Any) -> Any:
    if is_spec(value):
        return build(value)
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_value(item) for item in value]
    return value


def wants_tensor(annotation: Any) -> bool:
    """Whether an annotation is Tensor, or a union with it; a sequence of tensors is not."""
    if isinstance(annotation, str):
        text = annotation.strip()
        if text.startswith(("Optional[", "typing.Optional[")) and text.endswith("]"):
            text = text[text.index("[") + 1 : -1]
        return any(part.strip().rpartition(".")[2] == "Tensor" for part in text.split("|"))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(wants_tensor(part) for part in typing.get_args(annotation))
    return getattr(annotation, "__name__", "") == "Tensor" and annotation.__module__.split(".")[0] == "torch"


def _tensor(value: list[Any]) -> Any:
    import torch

    return torch.tensor(value)


def check_components(config: Config) -> list[Problem]:
    """Every problem of every component, with its place: not found, wrong arguments, wrong kind for its slot.

    Imports what the config names (and torch); builds nothing.
    """
    from .slots import check

    return check(config)
