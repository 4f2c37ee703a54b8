"""One run, one owner: refused while it lives, succeeded when it is dead."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from dist_train.runtime.lease import Lease, LeaseHeldError, LeaseLostError
from dist_train.runtime.storage import Storage, open_storage


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run's directory."""
    return open_storage(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def pretend_elsewhere(run: Storage, lease: Lease) -> None:
    """Make the lease look as if another machine held it."""
    name = f".lease/{lease.number:08d}.json"
    lease._record.machine, lease._record.host = "another", "node7"
    run.write_atomic(name, lease._record.encode())


def test_a_second_job_is_refused_with_host_process_and_age(run: Storage) -> None:
    with Lease.acquire(run):
        started = time.monotonic()
        with pytest.raises(
            LeaseHeldError, match=rf"trained by process {os.getpid()} on .*, for [01] s .*stop that job"
        ):
            Lease.acquire(run)
        assert time.monotonic() - started < 1


def test_a_released_lease_is_taken_at_once_with_the_next_number(run: Storage) -> None:
    numbers = []
    for _ in range(3):
        with Lease.acquire(run) as lease:
            numbers.append(lease.check())
    assert numbers == [1, 2, 3]
    assert list(run.list(".lease")) == ["00000003.json"]


def hold(path: str, ready: multiprocessing.synchronize.Event) -> None:
    """Hold the lease until killed."""
    Lease.acquire(open_storage(path))
    ready.set()
    time.sleep(60)


def test_an_owner_that_was_killed_on_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(LeaseHeldError, match=f"process {process.pid} on"):
            Lease.acquire(open_storage(tmp_path))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)  # stopped isn't dead
        with pytest.raises(LeaseHeldError):
            Lease.acquire(open_storage(tmp_path))
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and its parent hasn't reaped it yet
        started = time.monotonic()
        with Lease.acquire(open_storage(tmp_path)) as lease:
            assert lease.number == 2
        assert time.monotonic() - started < 1
    finally:  # else pytest would wait forever for a stopped child
        process.kill()
        process.join(timeout=20)


def test_another_process_with_the_same_pid_is_not_the_owner(run: Storage) -> None:
    lease = Lease.acquire(run)
    lease._over.set()
    run.write_atomic(".lease/00000001.json", lease._record.model_copy(update={"started": "12345"}).encode())
    with Lease.acquire(run) as successor:
        assert successor.number == 2


def test_an_owner_elsewhere_that_renews_its_lease_is_alive(run: Storage) -> None:
    lease = Lease.acquire(run, interval=0.3)
    pretend_elsewhere(run, lease)
    lines: list[str] = []
    started = time.monotonic()
    with pytest.raises(LeaseHeldError, match=r"process \d+ on node7, .*which has just renewed its lease"):
        Lease.acquire(run, log=lines.append)
    assert time.monotonic() - started < 3
    assert "waiting up to 0.9 s for a heartbeat" in lines[0]
    lease.release()


def test_an_owner_elsewhere_that_misses_three_renewals_is_dead(run: Storage) -> None:
    lease = Lease.acquire(run, interval=0.2)
    lease._over.set()
    lease._thread.join()
    pretend_elsewhere(run, lease)
    lines: list[str] = []
    started = time.monotonic()
    successor = Lease.acquire(run, log=lines.append)
    assert 0.6 <= time.monotonic() - started < 3
    assert "took the run over from process" in lines[-1]
    with pytest.raises(LeaseLostError, match=rf"another owner since \(process {os.getpid()} on"):
        lease.check()
    assert lease.lost
    assert successor.check() == 2
    successor.release()


def test_an_owner_that_lost_its_lease_finds_out_and_does_not_take_it_back(run: Storage) -> None:
    lease = Lease.acquire(run, interval=0.05)
    taken = lease._record.model_copy(update={"pid": 1, "renewals": 0}).encode()
    assert run.create_exclusive(".lease/00000002.json", taken)
    for _ in range(100):
        if lease.lost:
            break
        time.sleep(0.05)
    assert lease.lost
    lease.release()
    assert run.read_bytes(".lease/00000002.json") == taken
    assert not json.loads(run.read_bytes(".lease/00000001.json"))["released"]


def test_a_record_that_cannot_be_read_gets_time_and_is_then_succeeded(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.runtime.lease._MISSED", 0.02)
    run.write_atomic(".lease/00000004.json", b'{"host": "no')
    lines: list[str] = []
    with Lease.acquire(run, log=lines.append) as lease:
        assert lease.number == 5
    assert "process 0 on an unknown host" in lines[-1]


def test_of_many_that_start_at_once_one_owns_the_run(run: Storage) -> None:
    barrier, leases, refused = threading.Barrier(6), [], []

    def start() -> None:
        barrier.wait()
        try:
            leases.append(Lease.acquire(run))
        except LeaseHeldError:
            refused.append(1)

    threads = [threading.Thread(target=start, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(leases) == 1
    assert len(refused) == 5
    leases[0].check()
    leases[0].release()
