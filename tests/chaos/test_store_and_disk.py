"""Whole runs on stores and disks that fail, are damaged, are full, or belong to somebody else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import ONE, Kill, assert_each_sample_once, assert_equal_runs, assert_killed
from runs import run, start, uploads_below

from dist_train.checkpoint.store import CheckpointStore
from dist_train.main import main
from dist_train.runtime.storage import open_storage


def flip_a_bit(path: Path) -> None:
    """Damage that only a hash finds."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def copy_of(whole: Path, name: str) -> Path:
    """The finished run once more, as if it had been killed right before its end."""
    place = whole.parent / name
    shutil.copytree(whole, place)
    (place / "result.json").unlink()
    return place


def test_a_run_whose_newest_checkpoint_is_corrupted_takes_the_one_before_and_ends_with_the_same_bits(
    alone: Path,
) -> None:
    place = copy_of(alone / "runs" / "whole", "damaged")
    flip_a_bit(place / "checkpoints" / "step-00000024" / "optimizer.pt")
    done = run(alone, 1, *ONE, "run.name=damaged")
    assert "step-00000024 is corrupted (optimizer.pt: its sha256" in done.stdout
    assert "quarantined as damaged-step-00000024-1" in done.stdout
    assert "resuming from step 20" in " ".join(done.stdout.split())
    assert_equal_runs(place, alone / "runs" / "whole")


def test_a_run_without_an_intact_checkpoint_says_so_each_time_and_never_starts_over(alone: Path) -> None:
    place = copy_of(alone / "runs" / "whole", "lost")
    for path in (place / "checkpoints").glob("step-*/model.pt"):
        flip_a_bit(path)
    for _ in range(2):
        done = run(alone, 1, *ONE, "run.name=lost", expect=1)
        assert "no intact checkpoint is left" in done.stderr
    assert json.loads((place / "status.json").read_text())["state"] == "failed"
    assert not list((place / "checkpoints").glob("step-*"))


def test_a_second_job_on_a_live_run_is_refused_and_names_the_owner(alone: Path) -> None:
    options = (*ONE, "run.name=busy", "trainer.duration=100000step", "trainer.stop_at=1h")
    first = start(alone, 1, *options)
    try:
        place = alone / "runs" / "busy"
        while not (place / "checkpoints").exists() or not list((place / "checkpoints").glob("step-*")):
            assert first.poll() is None, first.communicate()
        second = run(alone, 1, *options, expect=2)
        assert f"is being trained by process {first.pid} on {socket.gethostname()}, for " in second.stderr
        assert "run.name" in second.stderr
        assert len(list((place / "trace" / ".attempts").iterdir())) == 1, "the second one left a trace"
    finally:
        first.send_signal(signal.SIGTERM)
        out, err = first.communicate(timeout=180)
    assert first.returncode == 75, out + err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint, but not for two."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=880k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.decode()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_ends_the_run_with_file_and_cause_and_leaves_the_last_good_checkpoint(
    alone: Path, small_disk: Path
) -> None:
    options = (*ONE, f"run.dir={small_disk}", "run.name=full", "debug.trace_samples=false")
    done = run(alone, 1, *options, expect=1)
    assert "No space left on device" in done.stderr
    assert ".pt: cannot write" in done.stderr
    assert "step 4 is untouched" in done.stderr
    found = CheckpointStore(open_storage(small_disk / "full" / "checkpoints")).find("last")
    assert found.step == 4
    status = json.loads((small_disk / "full" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left" in status["error"]

    done = run(alone, 1, *options, "checkpoint.on_error=warn")
    assert "resuming from step 4" in " ".join(done.stdout.split())
    assert "training continues, as checkpoint.on_error says" in done.stderr
    assert [found.step for found in CheckpointStore(open_storage(small_disk / "full" / "checkpoints")).published()] == [
        4
    ]
    whole = json.loads((alone / "runs" / "whole" / "result.json").read_text())
    result = json.loads((small_disk / "full" / "result.json").read_text())
    assert (result["state"], result["weights_sha256"]) == ("completed", whole["weights_sha256"])


@pytest.mark.parametrize("store", ["s3", pytest.param("gs", marks=pytest.mark.chaos)])
def test_a_run_lives_in_a_store_from_start_to_end(
    alone: Path,
    store: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed on one host, finished on another, evaluated on a third: each has a cache of its own."""
    request.getfixturevalue({"s3": "s3_port", "gs": "gs_server"}[store])
    url = f"{store}://bucket/life"
    options = (*ONE, f"run.dir={url}", "run.name=life")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    assert_killed(alone, 1, Kill("unpublished", 12), *options)
    storage = open_storage(f"{url}/life")
    before = CheckpointStore(storage.sub("checkpoints")).find("last").step
    assert before in (6, 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    done = run(alone, 1, *options)
    assert f"resuming from step {before}" in " ".join(done.stdout.split())
    if store == "s3":
        assert uploads_below(storage) == []

    there = tmp_path / "there"
    storage.fs.get(f"{url}/life", str(there), recursive=True)  # type: ignore[attr-defined]
    # The trace was uploaded before each manifest: the lines that the kill has lost are of steps that were trained again.
    assert_equal_runs(there, alone / "runs" / "whole")
    assert_each_sample_once(there)
    published = [found.step for found in CheckpointStore(storage.sub("checkpoints")).published()]
    best = json.loads((there / "result.json").read_text())["kept_step"]
    assert set(published) == {24, 20, best}, "the newest two and the best"
    assert (there / "logs" / "rank-0.log").exists()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    assert main(["evaluate", "--run", f"{url}/life"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["checkpoint"] == f"step-{best:08d}"
    told = json.loads((there / "result.json").read_text())["metrics"]["test"]
    assert figures["metrics"] == {name: value for name, value in told.items() if not name.startswith("raw_")}
    assert main(["verify", "--run", f"{url}/life"]) == 0
    assert main(["config", "--config", str(alone / "chaos.yaml"), "--get", "run.path", *options[2:]]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{url}/life"
