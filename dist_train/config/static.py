"""The signature of a class or function from its source alone, without importing it (torch takes seconds).

Used where a config is wrong anyway, so that its components' wrong arguments are told in the same go. Answers only what
the source says plainly: anything decorated, inherited, assigned or generated is left to the check that imports.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def read_signature(path: str, search: Sequence[str]) -> tuple[inspect.Signature, bool] | None:
    """The call signature at an import path and whether it is a class's; None where the source doesn't tell.

    `search` are directories that come before those of sys.path.
    """
    module, _, name = path.rpartition(".")
    for _ in range(6):  # re-exports of re-exports
        found = _module(module, (*search, *sys.path))
        if found is None:
            return None
        tree, is_package = found
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return _signature(node)
        source = _imported_from(tree, name)
        if source is None:
            return None
        level, target, name = source
        if level:  # relative: the package itself, or one above for each further dot
            parts = module.split(".")
            keep = len(parts) - level + (1 if is_package else 0)
            target = ".".join([*parts[:keep], *([target] if target else [])])
        module = target
    return None


def _imported_from(tree: ast.Module, name: str) -> tuple[int, str, str] | None:
    """Where a module takes a name from, by `from x import name` (or its one `import *`): (dots, x, its name there)."""
    stars = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return node.level, node.module or "", alias.name
                if alias.name == "*":
                    stars.append((node.level, node.module or "", name))
    return stars[0] if len(stars) == 1 else None


@cache
def _module(name: str, search: tuple[str, ...]) -> tuple[ast.Module, bool] | None:
    """The syntax tree of a module, and whether it is a package's __init__."""
    places: Sequence[str] | None = search
    spec: ModuleSpec | None = None
    done = ""
    for part in name.split("."):
        if places is None:
            return None
        done = f"{done}.{part}" if done else part
        spec = PathFinder.find_spec(done, list(places))
        if spec is None:
            return None
        places = spec.submodule_search_locations
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_bytes()), spec.submodule_search_locations is not None
    except (OSError, SyntaxError, ValueError):
        return None


def _signature(node: ast.ClassDef | ast.FunctionDef) -> tuple[inspect.Signature, bool] | None:
    if node.decorator_list:
        return None
    if isinstance(node, ast.FunctionDef):
        return _parameters(node.args, skip=0), False
    makers = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__new__")]
    if node.keywords or len(makers) != 1 or makers[0].name != "__init__" or makers[0].decorator_list:
        return None
    return _parameters(makers[0].args, skip=1), True


class _Source:
    """A default value as its source says."""

    def __init__(self, node: ast.expr) -> None:
        self.node = node

    def __repr__(self) -> str:
        return ast.unparse(self.node)


def _parameters(args: ast.arguments, skip: int) -> inspect.Signature:
    def parameter(arg: ast.arg, kind: inspect._ParameterKind, default: ast.expr | None) -> inspect.Parameter:
        empty = inspect.Parameter.empty
        annotation = ast.unparse(arg.annotation) if arg.annotation else empty
        return inspect.Parameter(arg.arg, kind, default=_Source(default) if default else empty, annotation=annotation)

    kinds = inspect.Parameter
    split = len(args.posonlyargs)
    positional = [
        (arg, kinds.POSITIONAL_ONLY if index < split else kinds.POSITIONAL_OR_KEYWORD)
        for index, arg in enumerate((*args.posonlyargs, *args.args))
    ]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    result = [parameter(arg, kind, default) for (arg, kind), default in zip(positional, defaults, strict=True)][skip:]
    result += [parameter(args.vararg, kinds.VAR_POSITIONAL, None)] if args.vararg else []
    keyword_only = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    result += [parameter(arg, kinds.KEYWORD_ONLY, default) for arg, default in keyword_only]
    result += [parameter(args.kwarg, kinds.VAR_KEYWORD, None)] if args.kwarg else []
    return inspect.Signature(result)
