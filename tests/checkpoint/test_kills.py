"""SIGKILL before every single system call of a save: the next start finds the old checkpoint or the new one, whole.

A child is forked, and a profile function kills it when it is about to make its k-th call that changes the disk, for
every k there is. No hook in the product is needed for that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from checkpoint_states import assert_intact, save, state_of
from runs import uploads_below

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import Storage, open_storage

Make = Callable[..., CheckpointManager]
DISK = {"write", "fsync", "rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir"}
THOROUGH = bool(os.environ.get("CHAOS"))  # else at every few calls only


class Death:
    """Kills this process at its k-th call, in whatever thread; counts the calls if k is 0."""

    def __init__(self, k: int) -> None:
        self.k, self.count = k, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument.__name__ in DISK:
            self.hit()

    def hit(self) -> None:
        """One more call."""
        self.count += 1
        if self.count == self.k:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(work: Callable[[Death], None], k: int) -> int:
    """Run ``work`` in a fork that dies at its k-th call; returns how many calls it made, 0 if it was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            death = Death(k)
            work(death)
            sys.setprofile(None)
            os.write(writer, str(death.count).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (0 if told else -signal.SIGKILL)
    return int(told or 0)


def on_disk(work: Callable[[], None]) -> Callable[[Death], None]:
    """``work``, dying at calls that change a local disk."""

    def watched(death: Death) -> None:
        threading.setprofile(death)
        sys.setprofile(death)
        work()

    return watched


def until_it_survives(work: Callable[[Death], None], prepare: Callable[[], None], stride: int = 1) -> Iterator[int]:
    """Yield once for each place of death, after the death; ends when ``work`` comes through."""
    k = 1
    while True:
        prepare()
        survived = in_a_child(work, k)
        yield k
        if survived:
            assert survived < k, survived
            return
        k += stride


def leftovers(storage: Storage) -> list[str]:
    """What isn't a published checkpoint's own file."""
    store, owned = CheckpointStore(storage), set()
    for found in store.published():
        owned |= {f"{found.name}/{entry.key}" for entry in found.manifest.files.values()} | {
            f"{found.name}/manifest.json"
        }
    return sorted(set(storage.walk()) - owned) + [name for name in storage.list() if name.startswith(".")]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_killed_at_any_call_on_a_local_disk_leaves_whole_checkpoints(
    tmp_path: Path, manager_at: Make, asynchronous: bool
) -> None:
    options = {"keep_last": 1, "keep_best": ("f1", "max"), "asynchronous": asynchronous}
    storage, results, place = open_storage(tmp_path), set(), 0

    def prepare() -> None:
        nonlocal storage
        storage = open_storage(tmp_path / uuid.uuid4().hex)
        manager = manager_at(storage, **options)
        save(manager, 10, f1=0.5)
        save(manager, 20, f1=0.9)

    def work() -> None:
        manager = manager_at(storage, **options)
        manager.newest()
        manager.save(30, state_of(30), {}, {"f1": 0.95})
        manager.close()

    for place in until_it_survives(on_disk(work), prepare, 1 if THOROUGH else 3 if asynchronous else 9):
        reader = CheckpointStore(storage)
        assert {row.state for row in reader.verify_all()} == {"good"}, f"killed at call {place}"
        manager = manager_at(storage, **options)
        found = manager.newest()
        assert found is not None
        results.add(found.step)
        assert_intact(found, found.step)
        assert found.step in (20, 30)
        assert leftovers(storage) == []
        save(manager, 40, f1=0.1)
        best = manager.best()
        assert_intact(best, found.step)
        assert leftovers(storage) == []
    assert results == {20, 30}
    assert place > 20  # it did die at many places


def test_the_very_first_save_killed_at_any_call_leaves_a_whole_checkpoint_or_none(
    tmp_path: Path, manager_at: Make
) -> None:
    storage, results = open_storage(tmp_path), set()

    def prepare() -> None:
        nonlocal storage
        storage = open_storage(tmp_path / uuid.uuid4().hex / "run" / "checkpoints")

    def work() -> None:
        save(manager_at(storage), 10)

    for _ in until_it_survives(on_disk(work), prepare, 1 if THOROUGH else 4):
        manager = manager_at(storage)
        found = manager.newest()
        results.add(found is not None)
        if found is not None:
            assert_intact(found, 10)
        assert leftovers(storage) == []
        save(manager, 10)
    assert results == {True, False}


def test_a_replacement_killed_at_any_call_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, manager_at: Make
) -> None:
    storage, results = open_storage(tmp_path), set()

    def prepare() -> None:
        nonlocal storage
        storage = open_storage(tmp_path / uuid.uuid4().hex)

    def work() -> None:
        manager = manager_at(storage)
        save(manager, 10, f1=0.1)
        save(manager, 10, f1=0.2)

    for _ in until_it_survives(on_disk(work), prepare, 1 if THOROUGH else 7):
        found = manager_at(storage).newest()
        results.add(found.metrics["f1"] if found else None)
        if found is not None:
            assert_intact(found, 10)
        assert leftovers(storage) == []
    assert results == {None, 0.1, 0.2}


def test_a_sweep_killed_at_any_call_loses_no_checkpoint(tmp_path: Path, manager_at: Make) -> None:
    storage = open_storage(tmp_path)

    def prepare() -> None:
        nonlocal storage
        storage = open_storage(tmp_path / uuid.uuid4().hex)
        save(manager_at(storage), 10)
        for name in (".tmp-step-00000020-ab", ".trash-step-00000005-cd"):
            storage.makedirs(name)
            storage.write_atomic(f"{name}/model.pt", b"half")
        os.rename(storage.join("step-00000010"), storage.join(".replaced-step-00000010-ef"))

    def work() -> None:
        manager_at(storage).newest()

    for _ in until_it_survives(on_disk(work), prepare):
        assert_intact(manager_at(storage).newest(), 10)
        assert leftovers(storage) == []


def test_a_save_killed_at_any_request_on_s3_leaves_whole_checkpoints(s3_url: str, manager_at: Make) -> None:
    s3fs = pytest.importorskip("s3fs")
    storage, results = open_storage(s3_url), set()
    state = {**state_of(20), "big": torch.zeros(3 << 19)}  # large enough for a multipart upload

    def prepare() -> None:
        nonlocal storage
        storage = open_storage(f"{s3_url}/{uuid.uuid4().hex}")
        save(manager_at(storage, keep_last=1), 10)

    def work(death: Death) -> None:
        real = s3fs.S3FileSystem._call_s3

        async def call(*arguments: Any, **keywords: Any) -> Any:
            death.hit()
            return await real(*arguments, **keywords)

        s3fs.S3FileSystem._call_s3 = call
        manager = manager_at(open_storage(storage.location, options={"default_block_size": 5 << 20}), keep_last=1)
        manager.newest()
        manager.save(20, state, {})
        manager.close()

    for place in until_it_survives(work, prepare, 1 if THOROUGH else 9):
        assert {row.state for row in CheckpointStore(storage).verify_all()} == {"good"}, f"killed at request {place}"
        manager = manager_at(storage, keep_last=1)
        found = manager.newest()
        assert found is not None
        results.add(found.step)
        assert_intact(found, found.step)
        assert leftovers(storage) == []
        assert uploads_below(storage) == []
        save(manager, 30)
        assert_intact(CheckpointStore(storage).newest(), 30)
        assert leftovers(storage) == []
    assert results == {10, 20}
