"""Pictures kept decoded: their pixels, builds that are killed, shared or out of disk, and damage."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_folders import picture, save
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.transforms import PILToTensor, RandomResizedCrop, Resize

from dist_train.data import DataError, ImageFolder
from dist_train.vision import cache as picture_cache
from dist_train.vision.cache import Builder

COUNT, CHUNK = 14, 4


@pytest.fixture(autouse=True)
def _pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(picture_cache, "PER_CHUNK", CHUNK)
    monkeypatch.chdir(tmp_path)
    for number in range(COUNT):  # the last ones are smaller than what is kept
        height, width = [(40, 60), (60, 40), (50, 50), (24, 31)][number // 4]
        save(Path("p") / "ab"[number % 2] / f"{number:02}.jpg", picture(number, height, width), quality=90)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks that this process has made."""
    chunks, make = list[int](), Builder._make

    def counted(self: Builder, chunk: int) -> None:
        chunks.append(chunk)
        make(self, chunk)

    monkeypatch.setattr(Builder, "_make", counted)
    return chunks


def opened(**arguments: Any) -> ImageFolder:
    return ImageFolder("p", cache="kept", cache_size=32, **arguments)


def test_pictures_are_kept_as_torchvisions_resize_leaves_them_and_cropped_from_there(made: list[int]) -> None:
    whole, crops = opened(), opened(random_resized_crop=16)
    assert sorted(made) == [0, 1, 2, 3]
    shrunk = TorchvisionFolder("p", lambda image: image if min(image.size) < 32 else Resize(32)(image))
    again = pickle.loads(pickle.dumps(crops))  # as for a spawned worker
    for index, (image, label) in enumerate(shrunk):
        pixels, target = whole[index]
        assert target == label
        assert int((pixels.int() - PILToTensor()(image).int()).abs().max()) <= 2
        for folder in (crops, again):
            torch.manual_seed(index)
            crop = folder[index][0]
            torch.manual_seed(index)
            expected = RandomResizedCrop(16)(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
            assert int((crop.int() - PILToTensor()(expected).int()).abs().max()) <= 2


def in_a_fork(action: Callable[[], Any]) -> int:
    """The exit status of a forked process that does it."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def test_a_build_that_was_killed_resumes_with_the_missing_chunks(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed_at_third(source: Any, target: Any) -> None:
        if "chunk-" in str(target) and len(made) == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # all but its name is written
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_third)
    assert in_a_fork(opened) == signal.SIGKILL
    monkeypatch.setattr(os, "replace", replace)
    there = {path.name: path.read_bytes() for path in Path("kept").glob("*.raw")}
    assert len(there) == 2
    pixels = [item[0] for item in opened()]
    assert len(made) == 2
    assert {name: (Path("kept") / name).read_bytes() for name in there} == there
    assert not list(Path("kept").glob("*.part"))
    shutil.rmtree("kept")
    assert all(map(torch.equal, pixels, [item[0] for item in opened()]))


def test_processes_that_build_at_once_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Builder._make

    def noted(self: Builder, chunk: int) -> None:
        with open("made.txt", "ab", buffering=0) as file:
            file.write(f"{chunk}\n".encode())
        make(self, chunk)

    monkeypatch.setattr(Builder, "_make", noted)

    def build_and_check() -> None:
        assert len(list(opened())) == COUNT

    if (child := os.fork()) == 0:
        os._exit(in_a_fork(build_and_check) and 1)
    build_and_check()
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(Path("made.txt").read_text().split()) == ["0", "1", "2", "3"]
    lines = [json.loads(line) for line in Path("kept/hashed.jsonl").read_text().splitlines() if line]
    assert sorted(key for line in lines for key in line) == ["0", "1", "2", "3"]  # each was hashed once, too


def test_a_chunk_that_has_changed_is_hashed_and_a_damaged_one_made_again(
    made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    pixels = [item[0] for item in opened()]
    made.clear()
    os.utime("kept/chunk-000000.raw")  # as a copy has
    with open("kept/hashed.jsonl", "a") as journal:
        journal.write('{"1": [')  # a writer that was killed
    path = Path("kept/chunk-000002.raw")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    Path("kept/chunk-000003.raw").write_bytes(b"")
    assert all(map(torch.equal, pixels, [item[0] for item in opened()]))
    assert sorted(made) == [2, 3]
    assert caplog.text.count("is damaged and made again") == 2
    made.clear()
    opened()
    assert made == []


def test_a_full_disk_is_named_and_what_is_complete_stays(made: list[int]) -> None:
    opened()
    Path("kept/chunk-000001.raw").unlink()
    os.symlink("/dev/full", "kept/chunk-000001.part")
    with pytest.raises(DataError, match=r"the disk of cache .*kept is full .*make room, and start again"):
        opened()
    Path("kept/chunk-000001.part").unlink()
    made.clear()
    opened()
    assert made == [1]


def test_a_cache_of_other_pictures_is_refused() -> None:
    opened()
    for other in ({"cache_size": 31}, {"root": "q"}):
        if "root" in other:
            shutil.copytree("p/a", "q/a")
        with pytest.raises(DataError, match=r"cache .*kept was made of other pictures: (size 32 instead of 31|files )"):
            ImageFolder(**{"root": "p", "cache": "kept", "cache_size": 32, **other})
    with pytest.raises(DataError, match="isn't empty, and no cache of pictures"):
        ImageFolder("p", cache="p")


def test_a_broken_picture_is_kept_as_that_and_named_when_read(caplog: pytest.LogCaptureFixture) -> None:
    path = Path("p/a/02.jpg")
    path.write_bytes(path.read_bytes()[:200])
    dataset = opened(random_resized_crop=8)
    assert f"{path.absolute()} is no picture" in caplog.text
    for _ in range(2):
        with pytest.raises(DataError, match=r"p/a/02\.jpg is no picture that could be decoded when .*kept was made"):
            dataset[1]
        assert dataset[2][0].shape == (3, 8, 8)
        dataset = opened(random_resized_crop=8)
