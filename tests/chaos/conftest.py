"""The run that nobody disturbed, shared by the tests that need one of a single process."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import ONE, assert_each_sample_once, prepare
from runs import run


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and the finished run `whole` of one process."""
    folder = tmp_path_factory.mktemp("alone")
    prepare(folder)
    run(folder, 1, *ONE, "run.name=whole")
    assert_each_sample_once(folder / "runs" / "whole")
    return folder
