"""What is kept, what is deleted, and how failed saves are reported."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from checkpoint_states import assert_intact, save, save_and_wait, state_of

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.publish import OwnedStore
from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import Storage, open_storage

Make = Callable[..., CheckpointManager]


def steps(storage: Storage) -> list[int]:
    """Steps of the published ones."""
    return sorted(found.step for found in CheckpointStore(storage).published())


def test_an_empty_directory_has_no_newest(storage: Storage, manager_at: Make) -> None:
    assert manager_at(storage).newest() is None


def test_the_newest_and_the_best_are_kept(storage: Storage, manager_at: Make) -> None:
    manager = manager_at(storage, keep_last=2, keep_best=("val/loss", "min"))
    for step, loss in [(1, 0.5), (2, 0.2), (3, 0.2), (4, float("nan")), (5, 0.9)]:
        save(manager, step, **{"val/loss": loss})
    assert steps(storage) == [2, 4, 5]  # of equal ones the first is best; a NaN never is
    assert {name.split("/")[0] for name in storage.walk()} == {f"step-0000000{step}" for step in (2, 4, 5)}
    fresh = manager_at(storage, keep_last=1, keep_best=("val/loss", "min"))
    best = fresh.best()
    assert_intact(best, 2)
    save(fresh, 6, **{"val/loss": 0.3})
    assert steps(storage) == [2, 6]
    save(fresh, 7, **{"val/loss": 0.1})
    assert steps(storage) == [7]
    assert_intact(fresh.best(), 7)


def test_the_first_save_deletes_nothing_that_was_there_before_it_is_published(
    storage: Storage, manager_at: Make
) -> None:
    save(manager_at(storage, keep_last=3), 1, 2, 3)
    seen: list[list[int]] = []
    manager = manager_at(storage, keep_last=1)
    manager.newest()
    manager.save(4, state_of(4), {}, before_publish=lambda: seen.append(steps(storage)), wait=True)
    assert seen == [[1, 2, 3]]
    assert steps(storage) == [4]


def test_a_save_of_the_same_step_replaces_the_one_before(storage: Storage, manager_at: Make) -> None:
    manager = manager_at(storage)
    save(manager, 5, 10)
    save(manager, 10, f1=0.5)
    found = manager_at(storage).newest()
    assert_intact(found, 10)
    assert found is not None
    assert found.metrics == {"f1": 0.5}
    assert len(storage.list()) == 2
    assert len(storage.walk("step-00000010")) == 3  # nothing of the first is left


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(storage: Storage, manager_at: Make) -> None:
    manager = manager_at(storage)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'last' in .*; found: none"):
        manager.find("last")
    save(manager, 3, 4)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-7' in .*; found: step-00000004, step-00000003"):
        manager.find("step-7")
    assert manager_at(storage, keep_best=("f1", "max")).best() is None
    assert_intact(manager.find("step-3"), 3)
    assert_intact(manager.find("step-00000003"), 3)
    assert_intact(manager.find("last"), 4)


class Slow:
    """Holds up writing threads until `go` is set."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        real = storage.write_stream

        def write_stream(name: str, produce: Callable[[BinaryIO], object]) -> tuple[int, str]:
            self.reached.set()
            assert self.go.wait(20)
            return real(name, produce)

        monkeypatch.setattr(storage, "write_stream", write_stream)


def test_a_step_waits_only_for_the_copy_and_later_changes_are_not_saved(
    storage: Storage, manager_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, manager, state, meta = Slow(storage, monkeypatch), manager_at(storage), state_of(10), {"position": [1]}
    manager.save(10, state, meta)
    assert slow.reached.wait(20)
    state["model"]["weight"].zero_()
    meta["position"].append(2)
    manager.poll()
    assert manager.published is None
    assert steps(storage) == []
    slow.go.set()
    manager.wait()
    assert manager.published == 10
    found = manager.newest()
    assert_intact(found, 10)
    assert found is not None
    assert found.meta == {"position": [1]}


def test_at_most_one_save_is_in_flight_and_the_wait_is_logged(
    storage: Storage, manager_at: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dist_train")
    slow, manager = Slow(storage, monkeypatch), manager_at(storage)
    manager.save(1, state_of(1), {})
    threading.Timer(0.3, slow.go.set).start()
    manager.save(2, state_of(2), {})
    assert manager.published is not None  # the first, at least
    assert [line for line in caplog.messages if "step 2: waited " in line]
    manager.close()
    assert steps(storage) == [1, 2]


def test_a_synchronous_manager_has_published_when_save_returns(storage: Storage, manager_at: Make) -> None:
    manager = manager_at(storage, asynchronous=False)
    manager.save(3, state_of(3), {})
    assert threading.active_count() == 1 or "checkpoint" not in {thread.name for thread in threading.enumerate()}
    assert_intact(manager_at(storage).newest(), 3)


def save_and_poll(manager: CheckpointManager) -> None:
    """What a training loop does: save, then poll at each step."""
    manager.save(2, state_of(2), {})
    for _ in range(200):
        manager.poll()
        time.sleep(0.01)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("file", ["model.pt", "optimizer.pt", "manifest.json"])
def test_a_failed_write_of_any_file_fails_the_save_and_names_the_file(
    tmp_path: Path, manager_at: Make, monkeypatch: pytest.MonkeyPatch, file: str, asynchronous: bool
) -> None:
    storage = open_storage(tmp_path)
    manager = manager_at(storage, asynchronous=asynchronous)
    save(manager, 1)
    real = storage._sink

    def broken(name: str) -> Any:
        if name.endswith(file):
            raise OSError(28, "No space left on device", name)
        return real(name)

    monkeypatch.setattr(storage, "_sink", broken)
    with pytest.raises(CheckpointError, match=rf"saving step 2 .*{file}.*No space left .*step 1 is untouched"):
        save_and_poll(manager)
    monkeypatch.undo()
    assert storage.list() == ["step-00000001"]
    save(manager, 3)  # it can still be used
    assert steps(storage) == [1, 3]


def test_an_error_in_the_middle_of_a_file_is_reported_with_its_cause(
    tmp_path: Path, manager_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    manager = manager_at(storage)

    @contextlib.contextmanager
    def small(name: str) -> Iterator[BinaryIO]:
        yield Small(100_000)  # type: ignore[misc]

    monkeypatch.setattr(storage, "_sink", small)
    with pytest.raises(CheckpointError, match=r"model\.pt: .*Disk quota exceeded"):
        save_and_wait(manager, {"model": {"w": torch.randn(100_000)}})
    assert storage.list() == []


class Small:
    """A file with little room."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: memoryview) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(122, "Disk quota exceeded")
        return len(data)


def test_a_hook_that_fails_before_publishing_fails_the_save(storage: Storage, manager_at: Make) -> None:
    def upload() -> None:
        raise OSError("no logs today")

    with pytest.raises(CheckpointError, match=r"saving step 1 .*no logs today; nothing was published before"):
        manager_at(storage).save(1, state_of(1), {}, before_publish=upload, wait=True)
    assert storage.walk() == {}


def test_what_cannot_be_saved_is_refused_at_once_with_its_place(storage: Storage, manager_at: Make) -> None:
    manager = manager_at(storage)
    with pytest.raises(TypeError, match=r"cannot save model\.net"):
        manager.save(1, {"model": {"net": torch.nn.Linear(1, 1)}}, {})
    with pytest.raises(ValueError, match=r"JSON"):
        manager.save(1, state_of(1), {"loss": float("nan")})
    assert storage.walk() == {}


def mounted(path: Path, *arguments: str) -> Iterator[Path]:
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this system doesn't let a test mount: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    yield from mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs")


def test_a_full_disk_fails_the_save_and_leaves_the_last_one(small_disk: Path, manager_at: Make) -> None:
    storage = open_storage(small_disk / "checkpoints")
    manager = manager_at(storage)
    save(manager, 1)
    with pytest.raises(
        CheckpointError, match=r"saving step 2 .*big\.pt: .*No space left on device.*step 1 is untouched"
    ):
        save_and_wait(manager, {**state_of(2), "big": torch.zeros(500_000)})
    assert storage.list() == ["step-00000001"]
    assert_intact(manager_at(storage).newest(), 1)
    save(manager, 3)
    assert steps(storage) == [1, 3]


def test_a_disk_that_turned_read_only_is_named(small_disk: Path, manager_at: Make) -> None:
    storage = open_storage(small_disk / "checkpoints", patience=0.2)
    manager = manager_at(storage)
    save(manager, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"saving step 2 .*Read-only file system"):
        save(manager, 2)
    assert_intact(CheckpointStore(storage).newest(), 1)


def test_an_older_one_that_cannot_be_deleted_does_not_fail_the_save(
    storage: Storage, manager_at: Make, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    manager = manager_at(storage, keep_last=1)
    save(manager, 1)

    def refuse(self: OwnedStore, found: object) -> None:
        raise OSError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(OwnedStore, "remove", refuse)
        save(manager, 2)
    assert [line for line in lines if "could not be deleted: not now" in line]
    save(manager, 3)
    assert steps(storage) == [3]


@pytest.mark.parametrize("steps_saved", [[1], [2]])
def test_a_rename_that_a_network_disk_did_but_denies_is_a_publication(
    tmp_path: Path, manager_at: Make, monkeypatch: pytest.MonkeyPatch, steps_saved: list[int]
) -> None:
    manager = manager_at(open_storage(tmp_path))
    save(manager, *steps_saved)
    real = os.rename

    def rename(source: str, target: str) -> None:
        real(source, target)
        if os.path.basename(target) == "step-00000002":
            raise FileNotFoundError(2, "No such file or directory", source)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        save(manager, 2)
    assert_intact(manager_at(open_storage(tmp_path)).newest(), 2)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_failed_rename_puts_the_replaced_one_back(
    tmp_path: Path, manager_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_at(open_storage(tmp_path, patience=0.2))
    save(manager, 2, f1=0.5)
    real = os.rename

    def rename(source: str, target: str) -> None:
        if ".tmp-" in source:
            raise OSError(5, "Input/output error", source)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(CheckpointError, match=r"saving step 2 .*Input/output error"):
            save(manager, 2, f1=0.9)
    found = CheckpointStore(open_storage(tmp_path)).newest()
    assert_intact(found, 2)
    assert found is not None
    assert found.metrics == {"f1": 0.5}
    assert os.listdir(tmp_path) == ["step-00000002"]
