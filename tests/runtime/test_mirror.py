"""Runs under a URL: what grows is kept on this host and uploaded; what the store holds is the truth."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.runtime import mirror
from dist_train.runtime.mirror import Mirror, Watch, mirror_root
from dist_train.runtime.sharing import Sharing
from dist_train.runtime.storage import Storage, open_storage


@pytest.fixture
def storage() -> Storage:
    """A run's prefix in a store."""
    return open_storage(f"memory://{uuid.uuid4().hex}/runs/digits")


@pytest.fixture
def hosts(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """The mirrors of one run on one host after another."""

    def each() -> Iterator[Mirror]:
        for number in range(5):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host{number}"))
            yield Mirror(storage.location)

    return each()  # type: ignore[return-value]


def write(host: Mirror, name: str, text: str) -> None:
    """As a rank of that host does."""
    (host.root / name).parent.mkdir(parents=True, exist_ok=True)
    with open(host.root / name, "a") as file:
        file.write(text)


def test_each_start_of_a_run_finds_the_same_directory_and_another_run_another(storage: Storage) -> None:
    assert mirror_root(storage.location) == mirror_root(storage.location)
    assert mirror_root(storage.location).name == "digits"
    assert mirror_root(storage.location) != mirror_root(f"{storage.location}2")


def test_another_host_resumes_with_what_was_uploaded(storage: Storage, hosts: Iterator[Mirror]) -> None:
    first, second = next(hosts), next(hosts)
    write(first, "metrics.jsonl", "row 1\n")
    write(first, "logs/rank-0.log", "begun\n")
    first.upload()
    write(first, "metrics.jsonl", "row 2, never uploaded\n")
    second.resume_files("metrics.jsonl", "logs/rank-0.log")
    write(second, "metrics.jsonl", "row 2\n")
    second.upload()
    assert storage.read_bytes("metrics.jsonl") == b"row 1\nrow 2\n"
    assert storage.read_bytes("logs/rank-0.log") == b"begun\n"
    first.resume_files("metrics.jsonl")  # back on the first host: what it alone knew is dropped
    first.upload()
    assert storage.read_bytes("metrics.jsonl") == b"row 1\nrow 2\n"


def test_a_killed_start_leaves_its_log_and_no_records_to_a_run_that_was_deleted(
    storage: Storage, hosts: Iterator[Mirror]
) -> None:
    host = next(hosts)
    write(host, "logs/rank-0.log", "begun\n")
    host.upload()
    write(host, "logs/rank-0.log", "the last words\n")
    write(host, "metrics.jsonl", "row 1\n")
    host.resume_files("metrics.jsonl", "logs/rank-0.log")
    host.upload()
    assert storage.read_bytes("logs/rank-0.log") == b"begun\nthe last words\n"
    assert not storage.exists("metrics.jsonl"), "of a run of that name that isn't there any more"


def test_only_what_has_changed_is_sent_and_other_hosts_send_only_their_own(
    storage: Storage, hosts: Iterator[Mirror]
) -> None:
    host, other = next(hosts), next(hosts)
    write(host, "metrics.jsonl", "row 1\n")
    write(host, "trace/attempt-0-rank-0.jsonl", "{}\n")
    host.upload()
    storage.delete("trace/attempt-0-rank-0.jsonl")
    write(host, "metrics.jsonl", "row 2\n")
    host.upload()
    assert set(storage.walk()) == {"metrics.jsonl"}, "a file was sent twice"
    assert storage.read_bytes("metrics.jsonl") == b"row 1\nrow 2\n"
    write(other, "metrics.jsonl", "of long ago\n")
    write(other, "trace/attempt-0-rank-1.jsonl", "{}\n")
    other.upload(("logs", "trace"))
    assert set(storage.walk()) == {"metrics.jsonl", "trace/attempt-0-rank-1.jsonl"}
    assert storage.read_bytes("metrics.jsonl") == b"row 1\nrow 2\n"


def test_a_rank_uploads_no_copy_of_a_file_that_a_rank_with_another_directory_writes(
    storage: Storage, hosts: Iterator[Mirror]
) -> None:
    """Ranks 0 and 2 on one host, rank 1 on another, where rank 0 has run before, and a rank 3 was killed."""
    first, second = next(hosts), next(hosts)
    first.sharing = Sharing(rank=0, size=3, directory=(0, 2), node=(0, 2))
    second.sharing = Sharing(rank=1, size=3, directory=(1,), node=(1,))
    for rank in (0, 2):
        write(first, f"logs/rank-{rank}.log", "of this start\n")
        write(first, f"digest/rank-{rank:04d}.jsonl", "of this start\n")
    for name in ("logs/rank-0.log", "digest/rank-0002.jsonl", "metrics.jsonl", "logs/wandb.log"):
        write(second, name, "of long ago\n")
    for name in (
        "logs/rank-1.log",
        "trace/attempt-1-rank-1.jsonl",
        "logs/nccl-rank-1.json",
        "trace/attempt-0-rank-3.jsonl",
    ):
        write(second, name, "its own\n")
    first.upload()
    second.upload()
    found = {name: storage.read_bytes(name) for name in storage.walk()}
    mine = {"logs/rank-0.log", "logs/rank-2.log", "digest/rank-0000.jsonl", "digest/rank-0002.jsonl"}
    theirs = {
        "logs/rank-1.log",
        "trace/attempt-1-rank-1.jsonl",
        "logs/nccl-rank-1.json",
        "trace/attempt-0-rank-3.jsonl",
    }
    assert found == dict.fromkeys(mine, b"of this start\n") | dict.fromkeys(theirs, b"its own\n")


def test_hosts_that_share_a_directory_each_upload_the_files_of_their_own_ranks() -> None:
    """A home directory on a server, which may not have what another host has just written."""
    first = Sharing(rank=0, size=4, directory=(0, 1, 2, 3), node=(0, 1))
    second = Sharing(rank=2, size=4, directory=(0, 1, 2, 3), node=(2, 3))
    for rank, leader in enumerate((first, first, second, second, first)):
        name = f"trace/attempt-0-rank-{rank}.jsonl"
        assert [sharing for sharing in (first, second) if sharing.uploads(name)] == [leader]


def test_a_file_put_into_the_store_is_noticed_once_and_deleted(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.02)
    watch = Watch(storage, ("STOP", "SAVE"))
    assert not watch.take("STOP")
    storage.write_atomic("STOP", b"")
    end = time.monotonic() + 10
    while not watch.take("STOP"):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not watch.take("STOP")
    assert not watch.take("SAVE")
    assert not storage.exists("STOP")
    watch.close()
