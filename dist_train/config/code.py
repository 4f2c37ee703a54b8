"""Source code read without importing it: which files of the user's a config uses, what a module defines, signatures.

Importing torch takes seconds. So where a config is wrong anyway, its components are checked by their source, and all
mistakes are reported at once. Only what the source says plainly counts: what is decorated, inherited, assigned or generated
is left to the check that imports (`slots.check_components`).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from .components import no_module
from .errors import did_you_mean
from .fields import leaves
from .schema import Config

_OURS = Path(__file__).parents[1]
# Of what is installed only these are judged: other packages may make names while they are imported.
_JUDGED = ("torch", "torchvision", "torchmetrics", "dist_train")


def source_files(config: Config) -> dict[str, str]:
    """The user's source files that a config names, and those that these import: with them a run is trained.

    Files outside the code paths aren't listed (what is installed has a version), nor are modules that are imported
    otherwise than by an `import` statement.

    Returns:
        The first 16 digits of each file's sha256, by its path below the code path that holds it; sorted.
    """
    importlib.invalidate_caches()  # files may have been written a moment ago
    paths = [Path(path) for path in config.run.code_paths]
    roots = list(paths)
    for entry in map(Path, map(os.path.abspath, sys.path)):
        if entry not in paths and any(path in entry.parents for path in paths) and "-packages" not in str(entry):
            roots.append(entry)
    # The import paths of specs, and of the classes of live objects.
    todo = [str(value) for key, value in leaves(config.to_dict()) if key[-1] in ("_target_", "_live_")]
    found: dict[str, str] = {}
    seen = {""}
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        todo.append(module.rpartition(".")[0])
        file, package = _find(module, roots)
        if file is None or _OURS in file.parents:
            continue
        content = file.read_bytes()
        holder = next(root for root in roots if root in file.parents)
        found[file.relative_to(holder).as_posix()] = hashlib.sha256(content).hexdigest()[:16]
        for node in (inner for statement in _parse(content) for inner in ast.walk(statement)):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                todo += [f"{_origin(node, package)}.{alias.name}".lstrip(".") for alias in node.names]
    return dict(sorted(found.items()))


def read_signature(path: str, search: Sequence[str]) -> tuple[inspect.Signature, bool] | None:
    """The call signature at an import path and whether it is a class's; None where the source doesn't show it.

    `search` are directories that come before those of sys.path. Defaults other than constants are shown as `...`."""
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
        module = _origin(node, package)
    return None


def missing(path: str, search: Sequence[str]) -> str | None:
    """What an import path names that doesn't exist, as `components.locate` reports it; None where the source doesn't show it."""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    with contextlib.suppress(ValueError):  # a module without a spec, such as __main__
        if importlib.util.find_spec(parts[0]) is None:
            return no_module(parts[0])
    judged = (*search, *sys.path) if parts[0] in _JUDGED else tuple(search)
    for depth in range(len(parts) - 1, 0, -1):
        holder, name = ".".join(parts[:depth]), parts[depth]
        body, package = _source(holder, judged)
        if body:
            is_module = package == holder and _source(f"{holder}.{name}", judged)[1]
            names = _definitions(holder, judged)
            if is_module or names is None or name in names:
                return None
            near = did_you_mean(name, (known for known in sorted(names) if known[:1] != "_"), prefix=holder + ".")
            return f"module {holder} has no {name}{near}"
    return None


@cache
def _definitions(module: str, search: tuple[str, ...]) -> frozenset[str] | None:
    """The names that a module's statements define; None where it may define others while it runs."""
    found: set[str] = set()
    body, package = _source(module, search)
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            more = _definitions(_origin(node, package), search)
            if more is None:
                return None
            found |= more
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Name) and node.id in ("globals", "setattr", "exec", "vars"):
            return None
    # Our own lazy re-exports show type checkers all that there is.
    lazy = "__getattr__" in found and not module.startswith("dist_train.")
    return frozenset(found) if body and not lazy else None


@cache
def _source(module: str, search: tuple[str, ...]) -> tuple[list[ast.stmt], str]:
    """The statements of a module (none, if it isn't found or isn't Python), and the package of its relative imports."""
    file, package = _find(module, search)
    with contextlib.suppress(OSError):
        return _parse(file.read_bytes()) if file is not None else [], package
    return [], package


def _find(module: str, search: Sequence[str | Path]) -> tuple[Path | None, str]:
    """The source file of a module, None if it isn't found or isn't Python; and the package of its relative imports."""
    places: Sequence[str] | None = list(map(str, search))
    spec = None
    for depth in range(1, module.count(".") + 2):
        spec = PathFinder.find_spec(".".join(module.split(".")[:depth]), places) if places is not None else None
        places = spec.submodule_search_locations if spec is not None else None
    if spec is None or not str(spec.origin).endswith(".py"):
        return None, ""
    return Path(str(spec.origin)), module if places is not None else module.rpartition(".")[0]


def _parse(content: bytes) -> list[ast.stmt]:
    """The statements of a source; none if it isn't Python."""
    body: list[ast.stmt] = []
    with contextlib.suppress(SyntaxError, ValueError):
        body = ast.parse(content).body
    shown = [node for node in body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    return [*body, *(statement for node in shown for statement in node.body)]


def _origin(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names; `package` is that of relative imports."""
    with contextlib.suppress(ImportError):  # more dots than packages
        return importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return ""


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
    # A lambda with the same parameters; no code of the user's is evaluated, since constants replace the defaults.
    args = node.args
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    args.defaults = [value if isinstance(value, ast.Constant) else ast.Constant(...) for value in args.defaults]
    args.kw_defaults = [
        value if value is None or isinstance(value, ast.Constant) else ast.Constant(...) for value in args.kw_defaults
    ]
    body = ast.copy_location(ast.Constant(None), node)
    code = compile(ast.fix_missing_locations(ast.Expression(ast.Lambda(args, body))), "<signature>", "eval")
    form = inspect.signature(eval(code))
    return form.replace(parameters=list(form.parameters.values())[is_class:]), is_class
