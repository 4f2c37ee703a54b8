"""ImageFolder beside torchvision's: the same files, crops and pixels; its index, and what is broken."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, default_collate
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, RandomResizedCrop, Resize

from dist_train.data import DataError, ImageFolder
from dist_train.data.errors import SampleError
from dist_train.data.plan import MicroBatch
from dist_train.data.reading import SampleReader
from dist_train.runtime.seeding import seed_sample
from dist_train.vision import file_list, folders, turbojpeg
from dist_train.vision.crops import Picture, RandomCrop
from dist_train.vision.file_list import FileList, open_files
from dist_train.vision.turbojpeg import Box


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Something smooth, as photographs are."""
    noise = np.random.RandomState(seed).randint(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["turbojpeg", "PIL"])
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PIL":
        monkeypatch.setattr(turbojpeg, "_handles", type("None", (), {"decoder": None}))
    elif not turbojpeg.is_available():
        pytest.skip("turbojpeg is not installed")


@pytest.fixture
def root() -> Path:
    """JPEGs of several kinds and sizes, and other formats, some of them in folders below."""
    top = Path("pictures")
    for number, (height, width) in enumerate([(60, 90), (90, 60), (33, 47), (20, 120), (64, 64)]):
        save(top / "b" / f"{number}.jpg", picture(number, height, width), quality=90, subsampling=number % 3)
    save(top / "a" / "deep" / "x.JPEG", picture(5, 50, 70), quality=95, progressive=True)
    save(top / "a" / "gray.jpg", picture(6, 50, 70).convert("L"))
    save(top / "a" / "cmyk.jpg", picture(7, 50, 70).convert("CMYK"))
    save(top / "a" / "palette.png", picture(8, 50, 70).quantize(16))
    save(top / "c d" / "deep" / "er" / "alpha.webp", picture(9, 50, 70).convert("RGBA"), lossless=True)
    (top / "a" / "notes.txt").write_text("no picture")
    (top / "readme.md").write_text("no class")
    os.symlink("../a/deep", top / "b" / "linked")
    os.close(os.open(os.fsencode(top / "b") + b"/\xff.png", os.O_CREAT))  # no text, and never read here
    return top


def test_files_classes_and_order_are_torchvisions(root: Path) -> None:
    ours, theirs = ImageFolder(root), TorchvisionFolder(root)
    for _ in range(2):
        assert (ours.classes, ours.class_to_idx) == (theirs.classes, theirs.class_to_idx)
        assert list(ours.samples) == theirs.samples
        assert ours.targets.tolist() == theirs.targets
        assert (len(ours), ours.samples[-1], ours.samples[2:4]) == (
            len(theirs),
            theirs.samples[-1],
            theirs.samples[2:4],
        )
        ours = ImageFolder(root)  # from the index
    with pytest.raises(IndexError):
        ours[len(ours)]


def test_boxes_are_torchvisions_for_every_shape() -> None:
    settings = [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 0.6)), ((0.5, 1.0), (2.0, 3.0))]
    for number, (height, width) in enumerate([(427, 640), (5, 7), (1, 1), (30, 300), (300, 30)] * 8):
        for scale, ratio in settings:
            torch.manual_seed(number)
            box = RandomCrop((8, 8), scale, ratio).box(height, width)
            torch.manual_seed(number)
            expected = RandomResizedCrop.get_params(torch.empty(1, height, width), list(scale), list(ratio))
            assert tuple(box) == expected


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"random_resized_crop": 32}, RandomResizedCrop(32)),
        (
            {"random_resized_crop": [20, 30], "scale": [0.5, 1.0], "ratio": [1.0, 1.0]},
            RandomResizedCrop((20, 30), (0.5, 1.0), (1, 1)),
        ),
        ({"resize": 32, "center_crop": 31}, Compose([Resize(32), CenterCrop(31)])),
        ({"resize": [24, 40]}, Resize((24, 40))),
        ({"center_crop": [19, 16]}, CenterCrop((19, 16))),
        ({"resize": 70}, Resize(70)),
        ({}, Compose([])),
    ],
    ids=["random", "range", "center", "exact", "crop", "larger", "whole"],
)
def test_pixels_are_torchvisions_but_for_rounding(root: Path, ours: dict[str, Any], theirs: Any) -> None:
    mine, other = ImageFolder(root, **ours), TorchvisionFolder(root, Compose([theirs, PILToTensor()]))
    for index, (path, _) in enumerate(other.samples):
        if "\udcff" in path:
            continue
        torch.manual_seed(index)
        pixels, target = mine[index]
        torch.manual_seed(index)
        expected, label = other[index]
        assert (pixels.dtype, pixels.shape, target) == (torch.uint8, expected.shape, label)
        apart = (pixels.int() - expected.int()).abs()
        assert int(apart.max()) <= 2, path  # both round twice, to the same from weights that are rounded differently
        assert float((apart > 0).double().mean()) < 0.2, path
        assert float((apart > 1).double().mean()) < 0.002, path


def test_a_transform_gets_what_torchvisions_gets(root: Path) -> None:
    mine = ImageFolder(root, PILToTensor(), lambda target: -target)
    other = TorchvisionFolder(root, PILToTensor(), lambda target: -target)
    for index in (0, 3, 5):
        assert torch.equal(mine[index][0], other[index][0])
        assert mine[index][1] == other[index][1]


@pytest.mark.skipif(not turbojpeg.is_available(), reason="turbojpeg is not installed")
def test_a_part_of_a_jpeg_has_the_bits_of_the_whole() -> None:
    random = np.random.RandomState(0)
    for height, width, options in [
        (97, 131, {"subsampling": 0}),
        (97, 131, {"subsampling": 1}),
        (97, 131, {"subsampling": 2, "progressive": True}),
        (64, 64, {"subsampling": 2}),
        (1, 1, {}),
    ]:
        file = io.BytesIO()
        picture(1, height, width).save(file, "JPEG", **options)
        for scale in [1] * 40 + [2, 4, 8] * 10 * (width > 8):
            image = Image.open(file)
            image.draft(None, (width // scale, height // scale))
            whole = np.asarray(image.convert("RGB"))
            h, w = (random.randint(1, side + 1) for side in whole.shape[:2])
            top, left = random.randint(whole.shape[0] - h + 1), random.randint(whole.shape[1] - w + 1)
            jpeg = turbojpeg.Jpeg(file.getvalue())
            assert jpeg.opened
            part = jpeg.decode(Box(top, left, h, w), scale)
            assert np.array_equal(part, whole[top : top + h, left : left + w])


def test_scaled_decoding_shrinks_early_and_alike_with_both_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, options in enumerate([{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}]):
        save(Path("large/x") / f"{number}.jpg", picture(number, 301, 402), quality=90, **options)
    save(Path("large/x/png.png"), picture(5, 301, 402))
    sizes = [
        (Box(0, 0, 301, 402), (64, 64), (76, 101)),
        (Box(5, 3, 128, 257), (64, 64), (65, 129)),  # a half of 5..133 is 2..67, of 3..260 it is 1..130
        (Box(9, 8, 70, 90), (64, 64), (70, 90)),
    ]
    for box, size, expected in sizes:
        assert Picture("large/x/0.jpg", scaled=True).pixels(box, size).shape[:2] == expected
        assert Picture("large/x/png.png", scaled=True).pixels(box, size).shape[:2] == (box.height, box.width)

    def crops(**options: Any) -> Any:
        items = []
        for kind in ({"resize": 60, "center_crop": 50}, {"random_resized_crop": 50}):
            for index in range(4):
                torch.manual_seed(index)
                items.append(ImageFolder("large", **kind, **options)[index][0].int())
        return torch.stack(items)

    plain, scaled = crops(), crops(scaled_decoding=True)
    assert 0 < float((plain - scaled).abs().double().mean()) < 3.0
    monkeypatch.setattr(turbojpeg, "_handles", type("None", (), {"decoder": None}))
    assert torch.equal(crops(scaled_decoding=True), scaled)
    assert torch.equal(crops(), plain)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("damage", ["empty", "text", "cut off", "a broken png"])
def test_a_broken_picture_is_named(damage: str) -> None:
    path = Path("p/x/bad.png" if "png" in damage else "p/x/bad.jpg")
    save(path, picture(0, 60, 60))
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {"empty": b"", "text": b"hello", "cut off": data[:-90]}.get(
            damage, data[:middle] + b"\0" * 9 + data[middle + 9 :]
        )
    )
    for kwargs in ({"random_resized_crop": 8}, {"transform": PILToTensor()}):
        reader = SampleReader(ImageFolder("p", **kwargs), 0)
        with pytest.raises(
            SampleError, match=rf"sample 0 .*{path.absolute()} is no picture.*({len(path.read_bytes())} bytes)"
        ):
            reader.__getitems__(MicroBatch(0, 0, np.array([0]), 0, 1, True))


class Dimmed(ImageFolder):
    def __getitem__(self, index: int) -> Any:
        pixels, target = super().__getitem__(index)
        return pixels // 2, target


@pytest.mark.parametrize("kind", [ImageFolder, Dimmed])
def test_batches_hold_the_items_each_under_its_seed(root: Path, kind: type[ImageFolder]) -> None:
    folder = kind(root, random_resized_crop=16)
    for dataset in (folder, Subset(folder, [4, 0, 7, 2, 6, 5])):
        indices = np.array([3, 0, 5])
        inputs, targets = SampleReader(dataset, 3).__getitems__(MicroBatch(2, 0, indices, 0, 3, True)).batch
        samples = []
        for index in indices.tolist():
            seed_sample(3, 2, index)
            samples.append(dataset[index])
        expected = default_collate(samples)
        assert inputs.is_contiguous()
        assert torch.equal(inputs, expected[0])
        assert torch.equal(targets, expected[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transform": PILToTensor(), "resize": 8}, "either transform"),
        ({"random_resized_crop": 8, "center_crop": 8}, "either transform"),
        ({"random_resized_crop": [8, 8, 8]}, "random_resized_crop to be a number of pixels or"),
        ({"resize": 8, "center_crop": -1}, "center_crop to be a number"),
        ({"random_resized_crop": 8, "scale": [0.5, 2.0]}, "scale to be"),
        ({"cache": "c", "cache_size": 0}, "cache_size to be at least 1"),
        ({"cache": "c", "resize": 288, "center_crop": 256}, "cache_size=288 or more"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(root: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageFolder(root, **arguments)


def test_folders_without_pictures_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="is no directory"):
        ImageFolder("nowhere")
    (root / "empty" / "below").mkdir(parents=True)
    with pytest.raises(DataError, match="no picture in empty in"):
        ImageFolder(root)
    with pytest.raises(DataError, match="no folder for a class"):
        ImageFolder(root / "empty" / "below")
    (root / "empty" / "below").rmdir()
    (root / "empty").rmdir()
    with pytest.raises(DataError, match="a picture of 20x120 is smaller than center_crop 40x40"):
        ImageFolder(root, center_crop=40)[7]


def test_it_knows_what_would_make_it_faster(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "in place of transform" in ImageFolder(root, PILToTensor()).input_advice[0]
    for there, expected in ((True, ["cache"]), (False, ["dist_train[vision]", "cache"])):
        monkeypatch.setattr(folders, "is_available", lambda there=there: there)
        assert [word in tip for word, tip in zip(expected, ImageFolder(root).input_advice, strict=True)] == [
            True
        ] * len(expected)


# --- the index -------------------------------------------------------------------------------------------------------


def settle(root: Path) -> None:
    """Directories that were changed a while ago."""
    for folder, _, _ in os.walk(root, followlinks=True):
        os.utime(folder, (1e9, 1e9))


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Directories that have been listed."""
    seen, listed = [], file_list._listed

    def counted(root: str, place: str) -> Any:
        seen.append(root)
        return listed(root, place)

    monkeypatch.setattr(file_list, "_listed", counted)
    return seen


def test_an_index_is_read_until_a_directory_changes(root: Path, listings: list[str]) -> None:
    settle(root)
    first = open_files(root)
    again = open_files(root)
    assert len(listings) == 1
    assert again.digest() == first.digest()
    save(root / "a" / "deep" / "new.jpg", picture(0, 8, 8))
    assert [path for path, _ in ImageFolder(root).samples] == [path for path, _ in TorchvisionFolder(root).samples]
    open_files(root)
    assert len(listings) == 3  # the directory has changed just now, and may do so again in the same tick of its clock
    settle(root)
    open_files(root)
    (root / "a" / "deep" / "new.jpg").unlink()
    os.utime(root / "a" / "deep", (2e9, 2e9))
    assert len(open_files(root)) == len(first)
    shutil.rmtree(root / "c d")
    assert len(open_files(root)) == len(first) - 1


@pytest.mark.parametrize("state", ["damaged", "cut off", "not writable", "not asked for"])
def test_an_index_that_cannot_be_used_costs_a_listing(root: Path, listings: list[str], state: str) -> None:
    settle(root)
    folder = file_list.cache_directory() / "files"
    if state == "not writable":
        folder.parent.mkdir(parents=True)
        folder.write_text("a file")
    first = open_files(root, cached=state != "not asked for")
    for index in folder.glob("*.index"):
        data = bytearray(index.read_bytes())
        data[-3] ^= 1
        index.write_bytes(data[:-20] if state == "cut off" else data)
    assert open_files(root, cached=state != "not asked for").digest() == first.digest()
    assert len(listings) == 2
    assert list(folder.glob("*.index")) or state.startswith("not")


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def growth_of_a_worker(read: Any, items: range) -> int:
    """Private memory that a forked process gains by reading items twice (the first pass warms up)."""
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        before = private_bytes()
        for index in items:
            read(index)
        os.write(sender, str(private_bytes() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(sender)
    with open(receiver, "rb") as file:
        return int(file.read())


def test_a_million_files_take_less_than_50_mb_and_workers_copy_none_of_it() -> None:
    name, count = b"n00000000_00000000.JPEG", 1_000_000
    names = np.tile(np.frombuffer(name, dtype=np.uint8), count)
    ends = np.arange(1, count + 1, dtype=np.int64) * len(name)
    files = FileList("/r", ["k"], names, ends, np.array([count]))
    assert names.nbytes + ends.nbytes < 50e6
    assert len(pickle.dumps(files)) < 50e6  # to a spawned worker
    items = range(0, count, 100)  # on every page
    assert files.path(count - 1) == f"/r/k/{name.decode()}"
    assert growth_of_a_worker(files.path, items) < 3e6
    strings = [f"{k:040}" for k in range(200_000)]
    assert growth_of_a_worker(strings.__getitem__, range(0, 200_000, 20)) > 10e6  # as lists of paths do
