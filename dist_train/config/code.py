"""The user's own source files that a config names, and those that these import: with them a run is trained, beside its config.

Nothing is imported here: files are found below the code paths and their `import` lines are read.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .schema import Config

_OURS = Path(__file__).parents[1]


def source_files(config: Config) -> dict[str, str]:
    """The first digits of each file's sha256, by its path below the code path that holds it; sorted.

    A module that is imported by other means than an `import` statement isn't seen, nor is anything outside the code paths
    (what is installed has a version).
    """
    paths = [Path(path) for path in config.run.code_paths]
    roots = paths + [Path(entry) for entry in map(os.path.abspath, sys.path) if _below(Path(entry), paths)]
    found: dict[str, str] = {}
    todo, seen = list(_named(config.to_dict())), set[str]()
    while todo:
        module = todo.pop()
        above, _, _ = module.rpartition(".")
        if module in seen:
            continue
        seen.add(module)
        todo += [above] if above else []
        file = _find(module, roots)
        if file is None or _OURS in file.parents:
            continue
        holder = next(path for path in (*paths, *roots) if path in file.parents)
        content = file.read_bytes()
        found[file.relative_to(holder).as_posix()] = hashlib.sha256(content).hexdigest()[:16]
        todo += _imported(content, module if file.name == "__init__.py" else above)
    return dict(sorted(found.items()))


def _below(entry: Path, paths: list[Path]) -> bool:
    return entry not in paths and any(path in entry.parents for path in paths) and "-packages" not in str(entry)


def _named(value: Any) -> Iterator[str]:
    """Every import path in a plain config, of specs and of the classes of live objects."""
    if isinstance(value, dict):
        yield from (str(value[name]) for name in ("_target_", "_live_") if name in value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _named(inner)


def _find(module: str, roots: list[Path]) -> Path | None:
    for root in roots:
        base = root.joinpath(*module.split("."))
        for file in (base / "__init__.py", base.with_name(base.name + ".py")):
            if file.is_file():
                return file
    return None


def _imported(content: bytes, package: str) -> Iterator[str]:
    """The modules (or names in modules) that a source imports, wherever in it; `package` is what relative ones count from."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*filter(None, above), *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
