"""Files are published whole or are absent, and failures are reported with place and cause."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from dist_train.files import StorageError
from dist_train.runtime.storage import LocalStorage, NotAFileError, Storage, is_url, open_storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty directory, of each kind (S3 is used by the tests of checkpoints)."""
    storage = open_storage(tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")
    storage.makedirs()
    return storage


def test_paths_and_urls_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [is_url(text) for text in ("runs/x", "/abs", "file:///abs", "s3://b/x", "memory://x")] == [0, 0, 0, 1, 1]
    assert open_storage("runs/x").location == str(tmp_path / "runs/x")
    assert open_storage("file:///abs/x").location == "/abs/x"
    assert open_storage("memory://x/y/").sub("a").join("b") == "memory://x/y/a/b"


def test_files_are_written_read_listed_and_deleted(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.walk() == {}
    storage.makedirs("sub")
    storage.write_atomic("status.json", b"one")
    storage.write_atomic("status.json", b"second")
    storage.write_atomic("sub/deep/x.bin", bytes(1000))
    assert storage.read_bytes("status.json") == b"second"
    assert storage.digest("sub/deep/x.bin") == (
        1000,
        "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53",
    )
    assert list(storage.list()) == ["status.json", "sub"]
    assert list(storage.list("sub")) == ["deep"]
    assert storage.walk() == {"status.json": 6, "sub/deep/x.bin": 1000}
    assert storage.exists("status.json")
    assert storage.exists("sub")
    assert not storage.exists("status.json/x")
    storage.delete("sub")
    storage.delete("status.json")
    storage.delete("never was")
    assert storage.walk() == {}
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("status.json")


def test_no_write_brings_back_a_deleted_directory(tmp_path: Path) -> None:
    run = open_storage(tmp_path / "run")
    run.makedirs()
    run.write_atomic("sub/x", b"1")
    (tmp_path / "run").rename(tmp_path / "moved")
    writes: list[Callable[[], object]] = [
        lambda: run.write_atomic("x", b"1"),
        lambda: run.write_atomic("sub/x", b"1"),
        lambda: run.create_exclusive("sub/y", b"1"),
        lambda: run.append_line("attempts.jsonl", "{}"),
        lambda: run.write_stream("x", lambda file: file.write(b"1")),
        lambda: run.makedirs("checkpoints"),
    ]
    for write in writes:
        with pytest.raises(FileNotFoundError):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a directory", "a link to itself"])
def test_what_is_no_regular_file_is_named_and_never_blocks(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else path)
    for read in (open_storage(tmp_path).read_bytes, open_storage(tmp_path).digest):
        with pytest.raises(NotAFileError, match=f"expected a file, found {kind}"):
            read("x")
    open_storage(tmp_path).delete("x")
    assert not os.path.lexists(path)


def test_one_of_many_creates_a_file_exclusively(storage: Storage) -> None:
    storage.makedirs()
    barrier, won = threading.Barrier(8), []

    def create(number: int) -> None:
        barrier.wait()
        if storage.create_exclusive("lease", f"{number}".encode() * 100):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(won) == 1
    assert storage.read_bytes("lease") == f"{won[0]}".encode() * 100
    assert list(storage.list()) == ["lease"]


def test_a_creation_whose_response_was_lost_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    real, tries = storage._create, []

    def create(name: str, data: bytes) -> None:
        tries.append(name)
        real(name, data)
        if len(tries) == 1:
            raise TimeoutError("the answer was lost")

    monkeypatch.setattr(storage, "_create", create)
    assert storage.create_exclusive("a", b"mine")
    assert len(tries) == 2
    assert not storage.create_exclusive("a", b"another's")


def test_a_creation_that_the_client_library_sent_twice_is_the_callers_own(storage: Storage) -> None:
    """botocore and gcsfs retry by themselves when a response is lost, and then find that it exists."""
    storage.makedirs()
    storage._create("lease", b"mine")
    assert storage.create_exclusive("lease", b"mine")
    assert not storage.create_exclusive("lease", b"another's")


def test_lines_are_appended_after_a_torn_one(storage: Storage) -> None:
    storage.append_line("attempts.jsonl", "one")
    storage.append_line("attempts.jsonl", "two\n")
    storage.write_atomic("attempts.jsonl", storage.read_bytes("attempts.jsonl") + b'{"to')
    storage.append_line("attempts.jsonl", "three")
    assert storage.read_bytes("attempts.jsonl").split(b"\n") == [b"one", b"two", b'{"to', b"three", b""]


def test_a_stream_is_hashed_as_it_is_written(storage: Storage) -> None:
    storage.makedirs()

    def produce(file: BinaryIO) -> None:
        file.write(b"a" * 10)
        file.write(memoryview(b"b" * 20))

    written = storage.write_stream("x", produce)
    assert written == (30, hashlib.sha256(b"a" * 10 + b"b" * 20).hexdigest())
    assert storage.digest("x") == written


def test_an_error_in_the_producer_is_not_retried(storage: Storage) -> None:
    storage.makedirs()
    calls = []

    def produce(file: BinaryIO) -> None:
        calls.append(1)
        file.write(b"half")
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        storage.write_stream("x", produce)
    assert len(calls) == 1


def failing(storage: Storage, method: str, error: Exception, times: int) -> Callable[..., object]:
    """The method, failing so many times first."""
    real = getattr(storage, method)
    left = [times]

    def call(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            raise error
        return real(*arguments)

    return call


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), TimeoutError("slow"), PermissionError(13, "denied")]
)
def test_a_passing_error_is_retried(storage: Storage, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    storage.write_atomic("x", b"data")
    monkeypatch.setattr(storage, "_open", failing(storage, "_open", error, 2))
    monkeypatch.setattr(storage, "_read", failing(storage, "_read", error, 2))
    assert storage.digest("x")[0] == 4
    assert storage.read_bytes("x") == b"data"


def test_a_lasting_error_is_reported_with_place_and_cause(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.patience = 0.3
    monkeypatch.setattr(storage, "_put", failing(storage, "_put", OSError(5, "Input/output error"), 99))
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot write .*run/x: OSError: .*Input/output error"):
        storage.write_atomic("x", b"")
    assert time.monotonic() - started < 1


def test_a_full_disk_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path, patience=60)
    monkeypatch.setattr(storage, "_put", failing(storage, "_put", OSError(28, "No space left on device"), 99))
    with pytest.raises(StorageError, match="No space left on device"):
        storage.write_atomic("x", b"")


def rewrite_for_ever(path: str) -> None:
    """Write two contents in turn until killed."""
    storage = open_storage(path)
    for number in range(10**9):
        storage.write_atomic("status.json", (b"a" if number % 2 else b"b") * 100_000)


def test_a_killed_writer_leaves_the_old_bytes_or_the_new_ones(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for pause in (0.0, 0.003, 0.006, 0.011, 0.017):
        process = multiprocessing.get_context("fork").Process(target=rewrite_for_ever, args=(str(tmp_path),))
        process.start()
        while not storage.exists("status.json"):
            time.sleep(0.001)
        time.sleep(pause)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert storage.read_bytes("status.json") in (b"a" * 100_000, b"b" * 100_000)
    storage.sweep_temporaries(older_than=600)  # too young
    storage.sweep_temporaries(older_than=0)
    assert list(storage.list()) == ["status.json"]


def test_a_directory_is_renamed_but_never_onto_another(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert isinstance(storage, LocalStorage)
    for name in ("a", "b"):
        storage.write_atomic(f"{name}/x", name.encode())
    with pytest.raises(StorageError, match="Directory not empty"):
        storage.rename("a", "b")
    storage.rename("a", "c")
    assert storage.walk() == {"b/x": 1, "c/x": 1}
