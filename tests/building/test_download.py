from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_train.building.prepare import _downloads, expected_files, missing_data, once_per_node
from dist_train.data import DataError


def together(world: list[int], fail: int = -1) -> tuple[list[str], list[object]]:
    """All ranks as threads; world holds each one's local rank. What happened in order, and what each got."""
    barrier, built, lock = threading.Barrier(len(world), timeout=10), [], threading.Lock()
    got: list[object] = [None] * len(world)

    def run(rank: int) -> None:
        def make() -> int:
            with lock:
                built.append(f"build {rank}")
            if rank == fail:
                raise OSError("no network")
            return rank

        try:
            place: Any = SimpleNamespace(
                is_main=rank == 0,
                size=len(world),
                placement=SimpleNamespace(local_rank=world[rank]),
                barrier=barrier.wait,
            )
            got[rank] = once_per_node(make, place)
        except OSError as error:
            got[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(world))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return built, got


def test_rank_zero_builds_first_then_one_rank_of_each_node_then_the_others() -> None:
    built, got = together([0, 1, 0, 1, 0, 1])
    assert built[0] == "build 0"
    assert set(built[1:3]) == {"build 2", "build 4"}
    assert set(built[3:]) == {"build 1", "build 3", "build 5"}
    assert got == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("fail", [0, 1, 2])
def test_a_rank_that_fails_lets_nobody_wait_for_it(fail: int) -> None:
    built, got = together([0, 1, 0], fail=fail)
    assert len(built) == 3
    assert [isinstance(value, OSError) for value in got] == [rank == fail for rank in range(3)]


def test_download_is_found_in_nested_components() -> None:
    assert _downloads({"_target_": "torchvision.datasets.MNIST", "download": True})
    assert _downloads({"_target_": "RandomSplit", "dataset": {"_target_": "X", "download": True}})
    assert _downloads({"_target_": "Join", "datasets": [{"_target_": "X", "download": True}]})
    assert not _downloads({"_target_": "X", "download": False, "root": "download"})


def test_the_files_that_torchvision_expects_are_named_with_their_place(tmp_path: Path) -> None:
    from torchvision import datasets

    assert str(tmp_path / "cifar-10-batches-py" / "data_batch_1") in expected_files(datasets.CIFAR10, tmp_path)
    assert str(tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz") in expected_files(
        datasets.FashionMNIST, tmp_path
    )
    assert expected_files(datasets.ImageFolder, tmp_path) == []
    with pytest.raises(RuntimeError) as caught:
        datasets.CIFAR10(str(tmp_path))
    error = missing_data("train", datasets.CIFAR10, tmp_path, caught.value)
    assert isinstance(error, DataError)
    for part in ("data.train: CIFAR10 has no data in", "expected 6 files", "test_batch", "download: true"):
        assert part in str(error)
