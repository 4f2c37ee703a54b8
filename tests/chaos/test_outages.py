"""A store that goes away under a whole run: for ten seconds, and for good (make chaos: it takes the store's whole patience)."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from killing import ONE, assert_each_sample_once, assert_equal_runs
from runs import run, start

from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import open_storage

URL = "s3://bucket/outages"


def started(alone: Path, cable: Any, name: str) -> tuple[subprocess.Popen[str], CheckpointStore]:
    """A run at the far end of the cable, which has published a checkpoint, and what reads its checkpoints past the cable."""
    store = CheckpointStore(open_storage(f"{URL}/{name}/checkpoints"))
    process = start(alone, 1, *ONE, f"run.dir={URL}", f"run.name={name}", env={"AWS_ENDPOINT_URL": cable.url})
    while not list(store.published()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process, store


def assert_as_if_undisturbed(alone: Path, name: str, there: Path) -> None:
    """The records in the store are those of the run that nobody disturbed."""
    open_storage(f"{URL}/{name}").fs.get(f"{URL}/{name}", str(there), recursive=True)
    assert_equal_runs(there, alone / "runs" / "whole")
    assert_each_sample_once(there)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run under a URL keeps on its host, apart for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.chaos
def test_a_store_that_is_away_for_ten_seconds_is_waited_for_by_a_run(alone: Path, cable: Any, tmp_path: Path) -> None:
    process, store = started(alone, cable, "short")
    cable.cut()
    time.sleep(10)
    assert process.poll() is None, process.communicate()
    before = [found.step for found in store.published()]
    assert before[0] < 24, "the run was over before the outage"
    assert {row.state for row in store.verify_all()} == {"good"}
    cable.heal()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert_as_if_undisturbed(alone, "short", tmp_path / "there")


@pytest.mark.chaos
def test_a_store_that_stays_away_ends_a_run_with_place_and_cause_and_it_resumes_later(
    alone: Path, cable: Any, tmp_path: Path
) -> None:
    process, store = started(alone, cable, "long")
    cable.cut()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 1, out + err
    assert f"{URL}/long" in err
    assert "onnect" in err, "the cause"
    assert {row.state for row in store.verify_all()} == {"good"}
    last = store.find("last").step
    assert last < 24
    done = run(alone, 1, *ONE, f"run.dir={URL}", "run.name=long")
    assert f"resuming from step {last}" in " ".join(done.stdout.split())
    assert_as_if_undisturbed(alone, "long", tmp_path / "there")
