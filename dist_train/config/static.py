"""The signature of a class or function from its source alone, without importing it (torch takes seconds).

Used where a config is wrong anyway, so that its components' wrong arguments are told in the same go. Answers only what
the source says plainly: anything decorated, inherited, assigned or generated is left to the check that imports.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from .components import no_module
from .errors import did_you_mean


def read_signature(path: str, search: Sequence[str]) -> tuple[inspect.Signature, bool] | None:
    """The call signature at an import path and whether it is a class's; None where the source doesn't tell.

    `search` are directories that come before those of sys.path. Defaults other than constants are shown as `...`.
    """
    module, _, name = path.rpartition(".")
    for _ in range(6):  # re-exports of re-exports
        body, package = _source(module, (*search, *sys.path))
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return _signature(node)
        imports = [(node, alias) for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
        named = [(node, alias.name) for node, alias in imports if (alias.asname or alias.name) == name]
        found = named or [(node, name) for node, alias in imports if alias.name == "*"]
        if len(found) != 1:
            return None
        node, name = found[0]
        # Relative: one dot is the package itself, each further one the package above.
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
    return None


def missing(path: str, search: Sequence[str]) -> str | None:
    """What isn't there of an import path, in the words of `components.locate`; None where the source doesn't tell.

    Of what is installed only torch and its like are judged: others may make their names while they are imported.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    places = (*search, *sys.path, str(Path(__file__).parents[2]))
    if PathFinder.find_spec(parts[0], places) is None:
        try:
            there = importlib.util.find_spec(parts[0]) is not None  # builtins, and what is installed by a hook
        except ValueError:
            there = True
        if not there:
            return no_module(parts[0])
    judged = places if parts[0] in _JUDGED else tuple(search)
    for depth in range(len(parts) - 1, 0, -1):
        holder, name = ".".join(parts[:depth]), parts[depth]
        body, package = _source(holder, judged)
        if body:
            inner = package == holder and _source(f"{holder}.{name}", judged)[1]
            names = _defined(holder, judged)
            if inner or names is None or name in names:
                return None
            near = did_you_mean(name, (known for known in sorted(names) if known[:1] != "_"), prefix=holder + ".")
            return f"module {holder} has no {name}{near}"
    return None


_JUDGED = ("torch", "torchvision", "torchmetrics", "dist_train")


@cache
def _defined(module: str, search: tuple[str, ...]) -> frozenset[str] | None:
    """The names that a module's statements define; None where they may define others as they run."""
    found: set[str] = set()
    body, package = _source(module, search)
    if not body:
        return None
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            more = _defined(".".join([*above, *([node.module] if node.module else [])]), search)
            if more is None:
                return None
            found |= more
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Name) and node.id in ("globals", "setattr", "exec", "vars"):
            return None
    return None if "__getattr__" in found else frozenset(found)


@cache
def _source(module: str, search: tuple[str, ...]) -> tuple[list[ast.stmt], str]:
    """The statements of a module (none, if it isn't found or isn't Python), and the package that it counts from."""
    places: Sequence[str] | None = search
    spec = None
    for depth in range(1, module.count(".") + 2):
        spec = PathFinder.find_spec(".".join(module.split(".")[:depth]), places) if places is not None else None
        places = spec.submodule_search_locations if spec is not None else None
    if spec is None or not str(spec.origin).endswith(".py"):
        return [], ""
    try:
        body = ast.parse(Path(str(spec.origin)).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        body = []
    return body, module if places is not None else module.rpartition(".")[0]


def _signature(node: ast.ClassDef | ast.FunctionDef) -> tuple[inspect.Signature, bool] | None:
    is_class = isinstance(node, ast.ClassDef)
    if isinstance(node, ast.ClassDef):
        makers = [item for item in node.body if getattr(item, "name", "") in ("__init__", "__new__")]
        maker = makers[0] if len(makers) == 1 and not node.keywords and not node.decorator_list else None
        if not isinstance(maker, ast.FunctionDef) or maker.name != "__init__":
            return None
        node = maker
    if node.decorator_list:
        return None
    # A lambda with the same parameters; nothing of the user's is evaluated, since constants stand for defaults.
    args = node.args
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    args.defaults = [_constant(default) for default in args.defaults]
    args.kw_defaults = [default and _constant(default) for default in args.kw_defaults]
    body = ast.copy_location(ast.Constant(None), node)
    code = compile(ast.fix_missing_locations(ast.Expression(ast.Lambda(args, body))), "<signature>", "eval")
    form = inspect.signature(eval(code))
    return form.replace(parameters=list(form.parameters.values())[is_class:]), is_class


def _constant(default: ast.expr) -> ast.expr:
    return default if isinstance(default, ast.Constant) else ast.Constant(...)
