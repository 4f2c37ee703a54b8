"""A real S3 server behind a cable that is cut: for a moment, for long, for good, in the middle of an upload."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import fsspec
import pytest
import torch
from checkpoint_states import assert_intact, save, save_and_wait, state_of
from runs import uploads_below

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import CheckpointStore, find_at
from dist_train.files import StorageError
from dist_train.runtime.storage import Storage, open_storage

Make = Callable[..., CheckpointManager]


@pytest.fixture
def wired(cable: Any, s3_url: str) -> Storage:
    """The store at the far end of the cable."""
    fsspec.filesystem("s3").clear_instance_cache()
    options = {
        "client_kwargs": {"endpoint_url": cable.url},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2, "read_timeout": 2},
        "default_block_size": 5 << 20,
    }
    return open_storage(s3_url, options=options, patience=1.0)


def big_state(step: int) -> dict[str, Any]:
    """Takes a multipart upload."""
    return {**state_of(step), "big": torch.zeros(3 << 20)}


def test_a_store_that_is_away_for_a_moment_is_waited_for(
    wired: Storage, s3_url: str, cable: Any, manager_at: Make
) -> None:
    wired.patience = 30
    manager = manager_at(wired)
    save(manager, 1)
    cable.cut()
    threading.Timer(2, cable.heal).start()
    save(manager, 2)
    assert_intact(CheckpointStore(open_storage(s3_url)).newest(), 2)


def test_a_store_that_stays_away_fails_the_save_and_keeps_the_last_one(
    wired: Storage, s3_url: str, cable: Any, manager_at: Make
) -> None:
    manager = manager_at(wired)
    save(manager, 1)
    cable.cut()
    with pytest.raises(CheckpointError, match=rf"saving step 2 in {s3_url} failed: .*onnect.*; step 1 is untouched"):
        save(manager, 2)
    with pytest.raises(StorageError, match=rf"cannot list uploads below {s3_url}: .*onnect"):
        manager_at(wired).newest()
    cable.heal()
    reader = CheckpointStore(open_storage(s3_url))
    assert [row.state for row in reader.verify_all()] == ["good"]
    assert_intact(reader.newest(), 1)
    save(manager, 3)
    assert_intact(reader.newest(), 3)


@pytest.mark.parametrize("megabytes", [3, 8])
def test_a_cable_cut_in_the_middle_of_an_upload_leaves_nothing_visible(
    wired: Storage, s3_url: str, cable: Any, manager_at: Make, megabytes: int
) -> None:
    manager = manager_at(wired)
    save(manager, 1)
    cable.budget = megabytes << 20
    with pytest.raises(CheckpointError, match=r"saving step 2 .*big\.pt: cannot write s3://.*step 1 is untouched"):
        save_and_wait(manager, big_state(2))
    cable.heal()
    far = open_storage(s3_url)
    assert [row.state for row in CheckpointStore(far).verify_all()] == ["good"]
    assert not [name for name in far.walk() if name.endswith("big.pt")]
    fresh = manager_at(far)
    assert_intact(fresh.newest(), 1)
    assert {name.split("/")[0] for name in far.walk()} == {"step-00000001"}
    assert uploads_below(far) == []
    fresh.save(2, big_state(2), {}, wait=True)
    assert_intact(CheckpointStore(far).newest(), 2)


def test_a_passing_failure_in_an_upload_is_retried(wired: Storage, s3_url: str, cable: Any, manager_at: Make) -> None:
    wired.patience = 30
    manager = manager_at(wired)
    cable.budget = 8 << 20
    threading.Timer(1.5, cable.heal).start()
    manager.save(2, big_state(2), {})
    manager.wait()
    found = CheckpointStore(open_storage(s3_url)).newest()
    assert_intact(found, 2)
    assert found is not None
    assert torch.equal(found.load("big"), torch.zeros(3 << 20))


def test_what_another_process_published_is_seen_at_once(s3_url: str, manager_at: Make) -> None:
    reader = CheckpointStore(open_storage(s3_url))
    assert reader.newest() is None
    save(manager_at(open_storage(s3_url)), 1)
    assert_intact(reader.newest(), 1)
    assert_intact(find_at(s3_url.removesuffix("/checkpoints")), 1)
    assert_intact(find_at(f"{s3_url}/step-00000001"), 1)


def test_a_bucket_that_is_not_there_is_named_at_once(s3_url: str, manager_at: Make) -> None:
    started = time.monotonic()
    storage = open_storage(f"s3://no-such-bucket-{uuid.uuid4().hex}/checkpoints")
    with pytest.raises(StorageError, match=r"cannot use s3://no-such-bucket.*bucket does not exist"):
        manager_at(storage).newest()
    assert time.monotonic() - started < 10


def test_a_checkpoint_copied_from_a_store_to_a_disk_is_whole_there(
    s3_url: str, manager_at: Make, tmp_path: Any
) -> None:
    far, near = open_storage(s3_url), open_storage(tmp_path)
    save(manager_at(far), 1)
    for name in far.walk():
        near.write_atomic(name, far.read_bytes(name))
    assert_intact(CheckpointStore(near).newest(), 1)


def test_a_publication_whose_response_is_lost_for_good_is_still_whole(
    s3_url: str, manager_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(s3_url, patience=0.3)
    manager = manager_at(storage)
    save(manager, 1)
    real = storage._create

    def create(name: str, data: bytes) -> None:
        with contextlib.suppress(FileExistsError):
            real(name, data)
        raise TimeoutError("no answer")

    monkeypatch.setattr(storage, "_create", create)
    with pytest.raises(CheckpointError, match=r"saving step 2 .*no answer"):
        save(manager, 2)
    reader = CheckpointStore(open_storage(s3_url))
    assert [row.state for row in reader.verify_all()] == ["good", "good"]
    assert_intact(manager_at(open_storage(s3_url)).newest(), 2)


def test_a_publication_that_the_clients_library_sent_twice_keeps_its_data(
    s3_url: str, manager_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore and gcsfs retry by themselves: if the first response was lost, the second says that it exists."""
    storage = open_storage(s3_url)
    real = storage._create

    def create(name: str, data: bytes) -> None:
        real(name, data)
        real(name, data)

    monkeypatch.setattr(storage, "_create", create)
    save(manager_at(storage), 1)
    assert_intact(CheckpointStore(storage).newest(), 1)


def test_a_replaced_one_that_cannot_be_deleted_does_not_undo_its_successor(
    s3_url: str, manager_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(s3_url)
    manager = manager_at(storage)
    save(manager, 1)

    def refuse(name: str) -> None:
        raise StorageError(f"cannot delete {name}")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", refuse)
        save(manager, 1, f1=0.5)
    found = manager_at(open_storage(s3_url)).newest()
    assert_intact(found, 1)
    assert found is not None
    assert found.metrics == {"f1": 0.5}
    assert len(storage.walk()) == 3  # swept by that start
