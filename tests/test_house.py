"""The structure of the package, read from its imports: floors, no circle, nothing heavy at the top of a file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import runs

PACKAGE = runs.ROOT / "dist_train"
# From the ground up: a room imports from rooms below its own floor only (CONTRIBUTING.md has the picture).
FLOORS = [
    {"config", "text", "files"},
    {"tracking"},  # below the tasks: a metric may not be named like a field of its records
    {"watch", "task"},
    {"runtime"},
    {"checkpoint"},
    {"models", "data"},
    {"library"},
    {"vision"},
    {"objective", "optim"},
    {"reduction", "building"},
    {"step", "evaluation"},
    {"training"},
    {"pages"},
    {"views", "listing"},
    {"run"},
    {"doctor"},
    {"commands"},
    {"main"},
]
# They define nothing that other rooms need, or hand names on only when these are asked for.
FACES = {"__init__", "data/__init__", "models/__init__", "callbacks", "metrics", "schedules", "tasks"}
HEAVY = {"torchvision", "wandb", "tensorboard", "matplotlib", "sklearn", "accelerate", "pandas", "PIL", "jinja2"}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    """Files of the package, without those that `dist-train new` copies."""
    return sorted(path for path in PACKAGE.rglob("*.py") if "templates" not in path.parts)


def name_of(path: Path) -> str:
    """`room/file` without its suffix."""
    return str(path.relative_to(PACKAGE).with_suffix(""))


def imported(path: Path, nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Names of modules that these statements import, dotted."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(dotted: str) -> str | None:
    """The file of the package that a dotted name leads to, as `room/file`; None for what isn't the package's."""
    parts = dotted.split(".")
    if parts[0] != "dist_train":
        return None
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        if path.with_suffix(".py").exists():
            return name_of(path.with_suffix(".py"))
        if path.is_dir():
            return name_of(path / "__init__.py")
    return "__init__"


def arrows() -> dict[str, set[str]]:
    """For each file, the files that it imports anywhere: inside functions and for type checkers too."""
    found = {}
    for path in modules():
        targets = {own(name) for name in imported(path, ast.walk(ast.parse(path.read_text())))}
        found[name_of(path)] = {target for target in targets if target is not None} - {name_of(path)}
    return found


def room_of(name: str) -> str:
    """`config` of `config/load`, `text` of `text`."""
    return name.split("/")[0]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of files that import each other in a loop."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set[str](), [start]
        while todo:
            for target in graph.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        reach[start] = seen
    loops = ({other for other in reach[name] if name in reach[other]} for name in graph if name in reach[name])
    return list({frozenset(loop): loop for loop in loops}.values())


def test_every_room_stands_on_a_floor() -> None:
    assert {room_of(name_of(path)) for path in modules()} - {"__init__", *FACES} == set(FLOOR)


def test_arrows_run_downward() -> None:
    upward = [
        f"{name} -> {target}"
        for name, targets in arrows().items()
        for target in targets
        if name not in FACES
        and target not in FACES
        and room_of(name) != room_of(target)
        and FLOOR[room_of(name)] <= FLOOR[room_of(target)]
    ]
    assert sorted(upward) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: targets - FACES for name, targets in arrows().items() if name not in FACES}
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]  # a negative control


def test_heavy_packages_are_imported_inside_functions_only() -> None:
    for path in modules():
        at_the_top = {name.split(".")[0] for name in imported(path, ast.parse(path.read_text()).body)}
        heavy = HEAVY | {"torch", "numpy"} if room_of(name_of(path)) == "config" else HEAVY
        assert not at_the_top & heavy, name_of(path)


def test_a_config_is_read_without_torch() -> None:
    code = "import sys; import dist_train.config.load; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-P", "-c", code]  # an option: not forked from one that has imported torch
    assert subprocess.run(command, env=runs.environment()).returncode == 0


def sizes() -> Iterator[tuple[str, int, int]]:
    """Of each function and constructor: place, lines, parameters besides self."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(argument.arg not in ("self", "cls") for argument in named)
                yield f"{name_of(path)}.{node.name}", (node.end_lineno or 0) - node.lineno + 1, count


# What a config names has as many parameters as it has settings.
NAMED_BY_CONFIGS = {"library", "vision", "models"}


def test_files_functions_and_constructors_are_small() -> None:
    assert [name_of(path) for path in modules() if len(path.read_text().splitlines()) > 400] == []
    assert [(place, lines) for place, lines, _ in sizes() if lines > 60] == []
    many = [(place, count) for place, _, count in sizes() if place.endswith(".__init__") and count > 6]
    assert [entry for entry in many if room_of(entry[0]) not in NAMED_BY_CONFIGS] == []
