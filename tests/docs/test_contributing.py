"""CONTRIBUTING.md: its picture is the floors that the imports keep, and its walks lead through code that exists."""

from __future__ import annotations

import ast
import re

import pytest
from runs import ROOT
from test_house import FLOORS, PACKAGE

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
STATIONS = re.findall(r"^\d+\. `(\S+\.py)` `(\S+)`: ", TEXT, flags=re.M)


def defined(path: str) -> set[str]:
    """`function`, `Class` and `Class.method` of a file of the package."""
    tree = ast.parse((PACKAGE / path).read_text())
    functions = (ast.FunctionDef, ast.ClassDef)
    inside = {
        f"{node.name}.{item.name}"
        for node in tree.body if isinstance(node, ast.ClassDef)
        for item in node.body if isinstance(item, functions)
    }  # fmt: skip
    return inside | {node.name for node in tree.body if isinstance(node, functions)}


def test_the_picture_shows_the_floors() -> None:
    (picture,) = re.findall(r"```\n(main .*?)```", TEXT, flags=re.S)
    rows = [set(re.split(r"\s{3}(?=\S)", line[:30].strip())) for line in picture.strip().splitlines()]
    assert rows == FLOORS[::-1]


@pytest.mark.parametrize(("path", "name"), STATIONS, ids=[f"{path} {name}" for path, name in STATIONS])
def test_a_walk_leads_through_code_that_exists(path: str, name: str) -> None:
    assert name in defined(path)


def test_there_are_four_walks() -> None:
    walks = re.findall(r"^### .*?(?=^##)", TEXT, flags=re.M | re.S)
    stations = [len(re.findall(r"^\d+\. `", walk, flags=re.M)) for walk in walks]
    assert stations == [10, 8, 8, 4, 0, 0, 0]  # the last three are recipes
    assert "Plan.nothing" not in defined("data/plan.py")
