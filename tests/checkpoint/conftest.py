"""States and stores for the tests of checkpoints."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from dist_train.checkpoint.manager import CheckpointManager, SavePolicy
from dist_train.runtime.storage import Storage, open_storage

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def lines() -> list[str]:
    """What managers log."""
    return []


@pytest.fixture
def manager_at(lines: list[str]) -> Callable[..., CheckpointManager]:
    """Makes managers as a fresh start of a run would."""

    def make(storage: Storage, **options: Any) -> CheckpointManager:
        policy = {name: options.pop(name) for name in vars(SavePolicy()) if name in options}
        return CheckpointManager(storage, SavePolicy(**{"keep_last": 2, **policy}), **{"log": lines.append, **options})

    return make


@pytest.fixture
def s3_url(s3_port: int) -> str:
    """A new prefix on the S3 server."""
    return f"s3://bucket/{uuid.uuid4().hex}/checkpoints"


@pytest.fixture
def gs_url(gs_server: None) -> str:
    """A new prefix on the server of Google Cloud Storage's kind."""
    return f"gs://bucket/{uuid.uuid4().hex}/checkpoints"


@pytest.fixture(params=["local", "memory", "s3", "gs"])
def storage(request: pytest.FixtureRequest, tmp_path: Any) -> Storage:
    """An empty directory of checkpoints, of each kind."""
    if request.param == "local":
        return open_storage(tmp_path / "run" / "checkpoints")
    if request.param == "memory":
        return open_storage(f"memory://{uuid.uuid4().hex}/checkpoints")
    return open_storage(request.getfixturevalue(f"{request.param}_url"))
