"""The table under "Tasks" in docs/coming-from.md: our lines are counted in files that tests run, theirs in lines.yaml."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import yaml
from runs import ROOT

COUNTED = yaml.safe_load((ROOT / "tests/docs/lines.yaml").read_text())
TASKS = COUNTED["tasks"]
PAGE = (ROOT / "docs/coming-from.md").read_text()
OTHERS = ("lightning", "trainer", "accelerate")


def lines_of(text: str, key: str) -> int:
    """The lines of a dotted key in a file of YAML, which all its nested keys are part of; comments don't count."""
    *outer, last = [node.value for node, _ in path_to(text, key)]
    node_key, node = path_to(text, key)[-1]
    assert outer == key.split(".")[:-1], last
    end = node.end_mark.line + (node.end_mark.column > 0)
    lines = text.splitlines()[node_key.start_mark.line : max(end, node_key.start_mark.line + 1)]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


def path_to(text: str, key: str) -> list[tuple[Any, Any]]:
    """The (key, value) nodes on the way to a dotted key."""
    node, found = yaml.compose(text, yaml.SafeLoader), []
    for name in key.split("."):
        found.append(next(pair for pair in node.value if pair[0].value == name))
        node = found[-1][1]
    return found


def statements_of(text: str, name: str) -> int:
    """The statements of a variable, function or class at the top of a file of Python, without docstrings."""

    def named(node: ast.stmt) -> bool:
        targets = node.targets if isinstance(node, ast.Assign) else []
        return getattr(node, "name", None) == name or any(getattr(target, "id", None) == name for target in targets)

    found = next(node for node in ast.parse(text).body if named(node))
    return sum(1 for node in ast.walk(found) if isinstance(node, ast.stmt) and not is_docstring(node))


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def ours(task: str) -> int:
    total = 0
    for part in TASKS[task]["here"]:
        text = (ROOT / part["file"]).read_text()
        total += sum(lines_of(text, key) for key in part.get("keys", []))
        total += sum(statements_of(text, name) for name in part.get("names", []))
    return total


def theirs(task: str, other: str) -> int | None:
    parts = TASKS[task][other]
    return None if parts is None else sum(len(part.get("lines", part.get("counted"))) for part in parts)


def table() -> dict[str, list[str]]:
    """The rows below the heading, by their first column."""
    section = PAGE[PAGE.index("\n## Tasks\n") :]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", section, re.M)]
    header, _, *body = rows[: next((k for k, row in enumerate(rows[2:], 2) if row[0] == ""), len(rows))]
    assert header == ["task", "Lightning", "HF Trainer", "accelerate", "here"]
    return {row[0]: row[1:] for row in body if row[0] in TASKS}


def test_the_table_has_the_numbers_that_are_counted() -> None:
    shown = table()
    assert list(shown) == list(TASKS)
    for task, cells in shown.items():
        counts = [theirs(task, other) for other in OTHERS]
        plain = [re.sub(r"\[\^\w+\]|\W", "", cell) for cell in cells]
        assert plain == ["" if count is None else str(count) for count in counts] + [str(ours(task))], task


@pytest.mark.parametrize("task", [task for task in TASKS if "LoRA" not in task])
def test_ours_is_never_longer(task: str) -> None:
    """But for LoRA, of which the page says so."""
    assert (
        ours(task) <= min(count for other in OTHERS if (count := theirs(task, other)) is not None)
        if any(theirs(task, other) for other in OTHERS)
        else ours(task) > 0
    )


def test_every_count_of_others_names_its_source() -> None:
    known = set(COUNTED["sources"])
    for task in TASKS.values():
        for other in OTHERS:
            for part in task[other] or []:
                assert part["file"].split("/")[0] in known or part["file"].startswith("https://")


def test_the_users_configs_have_the_lines_that_the_page_says_and_no_code() -> None:
    """Python of theirs is the model, the dataset, and a tokenizer that belongs to these."""
    shown = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \+ 0 \|$", PAGE, re.M)
    assert len(shown) == 13
    for user, count in shown:
        text = (ROOT / f"tests/zoo/{user}.yaml").read_text()
        own = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "extends:"))]
        assert len(own) == int(count), user
        config = yaml.safe_load(text)
        for key in ("task", "loss", "val_loss", "metrics", "optimizer", "scheduler"):
            assert "zoo_" not in str(config.get(key)), (user, key)


def test_lines_are_counted_with_what_is_nested_in_them() -> None:
    text = "a: 1\nb:\n  c: {d: 1,\n    e: 2}\n  # not this\n  f: [1]\n\ng: 3\n"
    assert [lines_of(text, key) for key in ("a", "b", "b.c", "b.f", "g")] == [1, 4, 2, 1, 1]
    assert statements_of('X = [1,\n 2]\ndef f():\n    """Say."""\n    if X:\n        return 1\n', "f") == 3
