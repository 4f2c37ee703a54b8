"""A folder as a user has it: a base config, and modules of the user's own beside it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

USER = Path(__file__).with_name("user")
# Modules that can't be imported: one for a reason of its own, one that needs another, a script, one that isn't Python.
FAILING = {
    "broken.py": '"""User code."""\n\nimport json\n\nLIMITS = json.loads("{}")["limits"]\n',
    "lacking.py": "\n\nimport a_package_that_is_not_installed\n",
    "exits.py": "import sys\n\nsys.exit(3)\n",
    "unreadable.py": "class Net\n    pass\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of tests/config/user as the working directory; what is imported from it is forgotten afterwards."""
    for file in USER.glob("*.*"):
        shutil.copy(file, tmp_path)
    for name, text in FAILING.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]
