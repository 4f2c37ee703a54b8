"""Runs that the tests of this folder share: each config is trained once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from comparing import trained
from oracle_configs import CONFIGS


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a config, by its name."""
    return cache(lambda name: trained(tmp_path_factory.mktemp(name), CONFIGS[name]))
