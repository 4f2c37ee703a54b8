"""Two jobs on one run: no mix, and the one that isn't the owner any more is refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
from checkpoint_states import assert_intact, save, state_of

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.manifest import CheckpointError
from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.lease import Lease, LeaseLostError
from dist_train.runtime.storage import Storage

Make = Callable[..., CheckpointManager]


def successor_of(lease: Lease, storage: Storage) -> Lease:
    """A second owner, as if the first had been silent for too long on another machine."""
    record = storage.sub(".lease").read_bytes(f"{lease.number:08d}.json")
    storage.sub(".lease").write_atomic(
        f"{lease.number:08d}.json", record.replace(b'"released": false', b'"released": true')
    )
    return Lease.acquire(storage)


@pytest.mark.parametrize("other_step", [2, 3])
def test_a_zombie_that_wakes_up_publishes_nothing(storage: Storage, manager_at: Make, other_step: int) -> None:
    first = Lease.acquire(storage)
    awake, asleep = threading.Event(), threading.Event()

    def sleep() -> None:
        asleep.set()
        assert awake.wait(30)

    zombie = manager_at(storage, lease=first)
    zombie.save(2, state_of(2), {"writer": "zombie"}, before_publish=sleep)
    assert asleep.wait(30)

    second = successor_of(first, storage)
    owner = manager_at(storage, lease=second)
    assert owner.newest() is None
    owner.save(other_step, state_of(other_step), {"writer": "owner"}, wait=True)
    awake.set()
    with pytest.raises(CheckpointError, match=r"saving step 2 .*the run has had another owner since") as failure:
        zombie.wait()
    assert isinstance(failure.value.__cause__, LeaseLostError)
    with pytest.raises(LeaseLostError, match=r"another owner"):
        zombie.save(9, state_of(9), {}, wait=True)
    found = CheckpointStore(storage).newest()
    assert_intact(found, other_step)
    assert found is not None
    assert found.meta == {"writer": "owner"}
    assert found.manifest.lease == second.number
    assert {name.split("/")[0] for name in storage.walk()} <= {".lease", found.name}
    first.release()
    second.release()


def test_a_zombie_that_sleeps_past_the_last_check_is_whole_or_withdrawn(
    storage: Storage, manager_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease.acquire(storage)
    zombie = manager_at(storage, lease=first)
    save(zombie, 1)
    checks, real, seconds = [0], first.check, []

    def check() -> int:
        number = real()
        checks[0] += 1
        if checks[0] == 2:  # right before it becomes visible
            second = successor_of(first, storage)
            seconds.append(second)
            assert_intact(manager_at(storage, lease=second).newest(), 1)  # this sweeps
        return number

    monkeypatch.setattr(first, "check", check)
    with pytest.raises(CheckpointError, match=r"saving step 2"):
        save(zombie, 2)
    assert_intact(CheckpointStore(storage).newest(), 1)
    assert [row.state for row in CheckpointStore(storage).verify_all()] == ["good"]
    for lease in (first, *seconds):
        lease.release()


def test_two_that_write_the_same_step_at_once_never_make_a_mix(storage: Storage, manager_at: Make) -> None:
    barrier = threading.Barrier(2)

    managers = [manager_at(storage) for _ in range(2)]
    for manager in managers:
        manager.newest()
    for number, manager in enumerate(managers):
        parts = {"model": {"writer": number}, "again": {"writer": number}}
        manager.save(7, parts, {"writer": number}, before_publish=lambda: barrier.wait(30))
    published = []
    for number, manager in enumerate(managers):
        with contextlib.suppress(CheckpointError):
            manager.wait()
            published.append(number)
    found = CheckpointStore(storage).newest()
    assert found is not None
    assert found.meta["writer"] in published
    assert found.load("model") == found.load("again") == found.meta


def test_the_owner_replaces_what_a_dead_one_published_after_its_last_sweep(storage: Storage, manager_at: Make) -> None:
    owner = manager_at(storage, lease=Lease.acquire(storage))
    assert owner.newest() is None
    save(manager_at(storage), 5)
    owner.save(5, state_of(5), {"writer": "owner"}, wait=True)
    found = CheckpointStore(storage).newest()
    assert_intact(found, 5)
    assert found is not None
    assert found.meta == {"writer": "owner"}
