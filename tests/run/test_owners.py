"""A run has one owner, a completed one is trained no more, and nothing is written into what isn't one's own run."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CONFIGS, rows

import dist_train.run.start as engine_run
from dist_train import train
from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import CheckpointStore
from dist_train.config.errors import ConfigError
from dist_train.files import StorageError
from dist_train.main import main
from dist_train.runtime.lease import LeaseLostError
from dist_train.runtime.storage import Storage, open_storage
from dist_train.training.callbacks import Callback

QUICK = ["tracking.tensorboard=false", "tracking.report=false", "data.num_workers=0", "trainer.log_every=1step"]
ROWS = [("train", 1), ("train", 2), ("train", 3), ("val", 3), ("test", 3)]
SIDE_FILES = ("config.yaml", "status.json", "result.json", "attempts.jsonl", "micro_batches.json")


def start(where: Path | str, *overrides: str, **pieces: Any) -> dict[str, Any]:
    """Three steps of a small model, or what is left of them."""
    base = {"extends": str(CONFIGS / "digits_mlp.yaml"), "run": {"name": "a", "dir": str(where)}, **pieces}
    return train(base, *QUICK, "trainer.duration=3step", "checkpoint.every=[1step]", *overrides)


def everything(folder: Path) -> dict[str, Any]:
    """Each file with its bytes and the time of its last change."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run, `a`, that no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    with torch.inference_mode():  # as in a notebook whose cell before has switched gradients off
        start(folder)
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(finished / "a", tmp_path / "a")
    return tmp_path


def test_a_run_that_another_start_completed_meanwhile_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = []

    def meanwhile(*_: object) -> None:  # this start has seen an empty directory, and has no lease yet
        monkeypatch.undo()
        others.append(start(tmp_path))

    monkeypatch.setattr(engine_run, "check_shared", meanwhile)
    assert start(tmp_path) == others[0]
    assert [(row["split"], row["step"]) for row in rows(tmp_path / "a")] == ROWS
    events = [json.loads(line)["event"] for line in (tmp_path / "a" / "attempts.jsonl").read_text().splitlines()]
    assert events == ["start", "end"]


@pytest.mark.parametrize("duration", ["2step", "1s", "1step"])
def test_a_completed_run_that_is_to_be_shorter_says_so_and_writes_nothing(
    finished: Path, duration: str, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = json.loads((finished / "a" / "result.json").read_text())["seconds"]
    duration = f"{seconds / 2:.4f}s" if duration == "1s" else duration
    before = everything(finished)
    assert start(finished, f"trainer.duration={duration}")["step"] == 3
    assert everything(finished) == before
    assert "is completed, after 3 steps" in " ".join(capfd.readouterr().out.split())


def test_a_completed_run_whose_checkpoints_are_gone_is_neither_trained_again_nor_on(runs: Path) -> None:
    shutil.rmtree(runs / "a" / "checkpoints")
    before = everything(runs)
    assert start(runs)["step"] == 3
    with pytest.raises(ConfigError, match=r"its checkpoints are gone: it can't be trained further"):
        start(runs, "trainer.duration=5step")
    assert everything(runs) == before


class Gone(Callback):
    """Takes the run's directory away after step 3, as somebody who cleans up would, or begins another run there."""

    def __init__(self, take: Callable[[], object]) -> None:
        self.take = take

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step == 3:
            trainer.checkpoints.wait()
            self.take()


@pytest.mark.parametrize("way", ["rm", "mv", "another"])
def test_a_run_whose_directory_goes_stops_says_why_and_brings_nothing_back(tmp_path: Path, way: str) -> None:
    place, moved = tmp_path / "runs" / "a", tmp_path / "moved"
    other: dict[str, Any] = {}

    def take() -> None:
        place.rename(moved)
        if way == "rm":
            shutil.rmtree(moved)
        if way == "another":
            (place / ".lease").mkdir(parents=True)
            (place / ".lease" / "00000001.json").write_text('{"host": "node7", "nonce": "theirs", "pid": 7}')
            other.update(everything(place))

    with pytest.raises(LeaseLostError, match="another owner.*on node7" if way == "another" else "deleted or moved"):
        start(tmp_path / "runs", "trainer.duration=500step", callbacks=[Gone(take)])
    assert place.exists() == (way == "another")
    assert (everything(place) if way == "another" else {}) == other
    if way == "mv":
        assert [found.step for found in CheckpointStore(open_storage(moved / "checkpoints")).published()] == [2, 1]
        assert json.loads((moved / "status.json").read_text())["state"] == "running"


def test_a_run_whose_prefix_goes_stops_and_writes_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"memory://{uuid.uuid4().hex}"
    storage = open_storage(f"{url}/a")
    with pytest.raises(LeaseLostError, match="deleted or moved"):
        start(url, "trainer.duration=500step", callbacks=[Gone(lambda: storage.delete(""))])
    assert storage.walk() == {}


GARBAGE = {"empty": b"", "binary": bytes(range(256)) * 4, "a list": b"[1, 2]\n", "deep": b"[" * 4_000}


@pytest.mark.parametrize("file", SIDE_FILES)
def test_garbage_beside_the_checkpoints_is_named_and_the_run_stands(
    runs: Path, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In result.json, which tells that a run is completed, it costs one more start, in which nothing is trained."""
    whole = json.loads((runs / "a" / "result.json").read_text())
    for kind, garbage in GARBAGE.items():
        if (file, kind) == ("attempts.jsonl", "empty"):
            continue  # that isn't garbage
        (runs / "a" / file).write_bytes(garbage)
        if file in ("attempts.jsonl", "micro_batches.json"):  # read by a start that resumes
            (runs / "a" / "result.json").unlink(missing_ok=True)
        assert main(["verify", str(runs / "a")]) == 1
        assert file in capfd.readouterr().out
        again = start(runs)
        assert {**again, "seconds": 0} == {**whole, "seconds": 0}
        out, err = capfd.readouterr()
        assert file in out + err, (kind, out, err)
        assert [(row["split"], row["step"]) for row in rows(runs / "a")] == ROWS
    (runs / "a" / file).write_bytes(garbage)
    assert main(["report", str(runs / "a"), "data.test=null"]) == (2 if file == "config.yaml" else 0)
    assert main(["evaluate", str(runs / "a")]) == (2 if file == "config.yaml" else 0)
    err = capfd.readouterr().err
    assert file in err
    assert "Traceback" not in err


def test_checkpoints_whose_config_is_lost_everywhere_are_never_started_over(runs: Path) -> None:
    (runs / "a" / "config.yaml").unlink()
    (runs / "a" / "result.json").unlink()
    trained = rows(runs / "a", "train", clock=True)
    assert start(runs)["step"] == 3  # by the config in the newest manifest
    assert rows(runs / "a", "train", clock=True) == trained, "nothing was trained again"
    assert (runs / "a" / "config.yaml").exists()
    (runs / "a" / "config.yaml").write_text("optimizer: {lr: 0.1}\n")
    for path in (runs / "a" / "checkpoints").glob("*/manifest.json"):
        path.write_bytes(b"{}")
    before = everything(runs)
    with pytest.raises(ConfigError, match=r"config.yaml: truncated.*and no manifest has the config"):
        start(runs)
    assert everything(runs) == before


@pytest.mark.parametrize(
    "kind", ["a file", "a link to nothing", "too long", "a file inside", "a FIFO", "a file of a run", "the kernel's"]
)
def test_a_place_that_can_hold_no_run_is_named_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "runs"
    if kind == "a file":
        place.write_text("")
    elif kind == "a link to nothing":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "too long":
        place = place / ("x" * 300)
    elif kind == "a file inside":
        place.mkdir()
        (place / "a").write_text("")
    elif kind == "the kernel's":  # its permissions let root make directories there
        place = Path("/proc")
    else:
        (place / "a").mkdir(parents=True)
        os.mkfifo(place / "a" / "result.json") if kind == "a FIFO" else (place / "a" / "checkpoints").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"run\.dir: .*can't hold a run: "):
        start(place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["FIFO", "device", "directory", "loop"])
@pytest.mark.parametrize("file", ["model.pt", "manifest.json"])
def test_what_is_no_file_in_a_checkpoint_is_corruption_and_never_waited_for(
    runs: Path, file: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = runs / "a" / "checkpoints" / "step-00000003" / file
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    assert main(["verify", str(runs / "a")]) == 1
    assert "step-00000003            corrupted" in capfd.readouterr().out
    assert main(["evaluate", str(runs / "a"), "--checkpoint", "last"]) == 0
    (runs / "a" / "result.json").unlink()
    assert start(runs)["step"] == 3
    assert "quarantined as damaged-step-00000003-1" in " ".join(capfd.readouterr().out.split())


def test_a_run_whose_last_save_failed_is_failed_and_not_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Storage.write_stream

    def full(storage: Storage, name: str, produce: Any) -> Any:
        if "step-00000002" in name:
            raise StorageError(f"cannot write {name}: No space left on device")
        return real(storage, name, produce)

    monkeypatch.setattr(Storage, "write_stream", full)
    with pytest.raises(CheckpointError, match=r"saving step 2 .*No space left.*step 1 is untouched"):
        start(tmp_path, "trainer.stop_at=2step", "checkpoint.on_error=warn")
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2)
    assert "No space left" in status["error"]
    monkeypatch.undo()
    assert start(tmp_path, "trainer.stop_at=2step")["state"] == "preempted"
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "preempted"


def test_whoever_only_reads_takes_no_lease(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = everything(finished)
    for command in (["evaluate"], ["verify"], ["predict", "--output", os.devnull]):
        main([command[0], str(finished / "a"), *command[1:]])
    assert everything(finished) == before
