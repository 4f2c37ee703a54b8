"""Images per second of one core: torchvision's v1 and v2 transforms, other loaders where they are installed, and dist_train.

    python bench/input.py                     # about two minutes: arrays and JPEG files
    python bench/input.py arrays --rounds 9
    python bench/input.py --quick             # 20 seconds

`arrays` are 32x32 pictures in memory, as of CIFAR-10: random crop with padding 4, flip, normalization, in batches of 512.
`jpeg` are files of 640x427: random resized crop to 224, flip, normalization, in batches of 32 (beyond 31 MB of
floats glibc gives memory back after each batch, for all contenders alike). All of it runs in one process and
one thread, without loader workers, and what dist_train does on the device runs on the CPU here and counts as well. Rates are per
second of CPU time, which other load on the machine affects less than wall time; medians of interleaved rounds (least to most).
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rounds import SkippedError, footer, interleaved, markdown, ratio, spread
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

import dist_train.data
from dist_train.config.schema import DataConfig
from dist_train.data.augment import Augmentation
from dist_train.data.loader import TrainLoader
from dist_train.data.normalize import Normalize
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions

FILES_BATCH = 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Batches = Callable[[], Iterable[Any]]


@cache
def _cifar() -> tuple[NDArray[np.uint8], list[int]]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (20_000, 32, 32, 3), np.uint8), generator.integers(0, 10, 20_000).tolist()


class SyntheticCIFAR10(datasets.CIFAR10):
    """torchvision's class over 20,000 random pictures instead of its files."""

    def __init__(
        self, root: Any, train: bool = True, transform: Any = None, target_transform: Any = None, download: bool = False
    ):
        self.transform, self.target_transform = transform, target_transform
        self.data, self.targets = _cifar()
        self.classes = [str(k) for k in range(10)]


class OurCIFAR10(dist_train.data.CIFAR10):
    """dist_train's over the same ones."""

    @classmethod
    def torchvision_class(cls) -> Any:
        return SyntheticCIFAR10


def ours(dataset: Any, batch: int, steps: list[Any]) -> Iterator[Any]:
    """Batches as training gets them, normalized."""
    plan = Plan(0, len(dataset), batch)
    options = LoaderOptions(
        DataConfig(train={"_target_": "dist_train.data.Digits"}, num_workers=0), 0, torch.device("cpu")
    )
    loader = TrainLoader(dataset, plan, options, micro_batch_size=batch)
    augmentation = Augmentation(steps, Normalize(MEAN, STD))
    for work in loader.steps():
        for micro in work.micro_batches:
            yield augmentation(micro.batch, seed=0, epoch=work.epoch, indices=micro.random_keys)


def stock(dataset: Any, batch: int) -> Iterable[Any]:
    """The DataLoader that everybody writes."""
    return DataLoader(dataset, batch, shuffle=True, drop_last=True)


def measure(name: str, open_batches: Batches, count: int) -> dict[str, float]:
    """Images per second of CPU time and of wall time, of `count` images after the first batch."""
    del name
    iterator = iter(open_batches())
    next(iterator)
    seen, cpu, wall = 0, time.process_time(), time.perf_counter()
    while seen < count:
        batch = next(iterator, None)
        if batch is None:  # an epoch is over
            iterator = iter(open_batches())
            continue
        seen += len(batch[0])
    return {"core": seen / (time.process_time() - cpu), "wall": seen / (time.perf_counter() - wall)}


def arrays() -> dict[str, Batches]:
    """Crop with padding, flip, normalize."""
    v1 = transforms.Compose([
        transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    new = v2.Compose([
        v2.ToImage(), v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    steps = [dist_train.data.RandomCrop(32, padding=4), dist_train.data.RandomHorizontalFlip()]
    data = OurCIFAR10("data")
    return {
        "torchvision CIFAR10, v1 transforms": lambda: stock(SyntheticCIFAR10("data", transform=v1), 512),
        "torchvision CIFAR10, v2 transforms": lambda: stock(SyntheticCIFAR10("data", transform=new), 512),
        "**dist_train CIFAR10, data.augment, data.normalize**": lambda: ours(data, 512, steps),
    }


def natural(seed: int, width: int = 640, height: int = 427) -> NDArray[np.uint8]:
    """A picture whose spectrum falls like a photograph's (1/f), with edges: (height, width, 3)."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = generator.standard_normal((2, 3, *frequency.shape))
    waves = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency**1.15, (height, width))
    waves = (waves - waves.mean((1, 2), keepdims=True)) / waves.std((1, 2), keepdims=True)
    picture = (0.85 * waves[:1] + 0.3 * waves).transpose(1, 2, 0) * 50 + 115
    for _ in range(25):
        x, y, w, h = generator.integers([0, 0, 20, 20], [width, height, 150, 150])
        picture[y : y + h, x : x + w] = 0.6 * picture[y : y + h, x : x + w] + 0.4 * generator.integers(0, 255, 3)
    return picture.clip(0, 255).astype(np.uint8)


def write_jpegs(folder: Path, count: int) -> None:
    """Pictures of 640x427, about 120 kB each, in two classes; of 16 that differ."""
    from PIL import Image

    for k in range(count):
        place = folder / f"class-{k % 2}" / f"{k:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        if k < 16:
            Image.fromarray(natural(k)).save(place, quality=90)
        else:
            place.write_bytes((folder / f"class-{k % 2}" / f"{k % 16:05d}.jpg").read_bytes())


def jpegs(folder: Path) -> dict[str, Batches]:
    """Decode, random resized crop, flip, normalize."""
    v1 = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    new = v2.Compose([
        v2.ToImage(), v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    return {
        "torchvision ImageFolder, v1 transforms": lambda: stock(datasets.ImageFolder(folder, v1), FILES_BATCH),
        "torchvision ImageFolder, v2 transforms": lambda: stock(datasets.ImageFolder(folder, new), FILES_BATCH),
        "webdataset, v1 transforms": partial(webdataset, folder, v1),
        "DALI, CPU pipeline": partial(dali, folder),
        "FFCV, JPEG": partial(ffcv, folder),
        "**dist_train ImageFolder**": partial(image_folder, folder),
        "**dist_train ImageFolder, cached at 256**": partial(
            image_folder, folder, cache=str(folder.parent / "cache"), cache_size=256
        ),
    }


def image_folder(folder: Path, **options: Any) -> Iterator[Any]:
    """dist_train's; the first call with a cache writes it."""
    data = dist_train.data.ImageFolder(folder, random_resized_crop=224, **options)
    return ours(data, FILES_BATCH, [dist_train.data.RandomHorizontalFlip()])


def webdataset(folder: Path, transform: Any) -> Iterable[Any]:
    """A shard of the same files, read in order."""
    try:
        import webdataset as wds
    except ImportError as error:
        raise SkippedError(f"{error}") from error
    shard = folder.parent / "shard.tar"
    if not shard.exists():
        with tarfile.open(shard, "w") as tar:
            for path in sorted(folder.rglob("*.jpg")):
                tar.add(path, f"{path.stem}.jpg")
                label = path.parent.name[-1].encode()
                info = tarfile.TarInfo(f"{path.stem}.cls")
                info.size = len(label)
                tar.addfile(info, io.BytesIO(label))
    pipeline = wds.WebDataset(str(shard), shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    return pipeline.map_tuple(transform, int).batched(FILES_BATCH, partial=False)  # type: ignore[no-any-return]


def dali(folder: Path) -> Iterator[Any]:
    """NVIDIA's library without a GPU, one thread."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except Exception as error:
        raise SkippedError(f"{type(error).__name__}: {error}") from error

    @pipeline_def(batch_size=FILES_BATCH, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=str(folder), random_shuffle=True)
        pictures = fn.decoders.image_random_crop(encoded, device="cpu", random_area=[0.08, 1.0])
        pictures = fn.resize(pictures, size=[224, 224])
        flip = fn.random.coin_flip()
        mean, std = [255 * m for m in MEAN], [255 * s for s in STD]
        return fn.crop_mirror_normalize(pictures, mirror=flip, mean=mean, std=std, dtype=types.FLOAT), labels

    made = pipeline()
    made.build()
    while True:
        pictures, labels = made.run()
        yield torch.from_numpy(pictures.as_array()), labels


def ffcv(folder: Path) -> Iterable[Any]:
    """Its own file format, written from the same files, decoded and cropped by its compiled pipeline."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
        from ffcv.writer import DatasetWriter
    except Exception as error:
        raise SkippedError(f"{type(error).__name__}: {error}") from error
    beton = folder.parent / "jpeg.beton"
    if not beton.exists():
        DatasetWriter(
            str(beton), {"image": RGBImageField(write_mode="jpg"), "label": IntField()}, num_workers=1
        ).from_indexed_dataset(datasets.ImageFolder(folder))
    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)
    image = [
        RandomResizedCropRGBImageDecoder((224, 224)),
        RandomHorizontalFlip(),
        NormalizeImage(mean, std, np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    return Loader(  # type: ignore[no-any-return]
        str(beton),
        batch_size=FILES_BATCH,
        num_workers=1,
        order=OrderOption.RANDOM,
        pipelines={"image": image, "label": [IntDecoder()]},
    )


def show(title: str, contenders: dict[str, Batches], count: int, rounds: int) -> dict[str, float]:
    """Measure, print the table, and return the ratios to the first contender."""
    runs = {name: partial(measure, name, batches, count) for name, batches in contenders.items()}
    found = interleaved(runs, rounds)
    first = next(iter(found))
    rates = {name: [figures["core"] for figures in of] for name, of in found.items()}
    ratios = {name: ratio(of, rates[first]) for name, of in rates.items()}
    rows = [[name, spread(of), f"{ratios[name]:.2f}"] for name, of in rates.items()]
    print(markdown([f"{title}, images/s of one core", "median (least to most)", "ratio"], rows), end="\n\n", flush=True)
    return ratios


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the tables; returns the ratios by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="arrays, jpeg; default: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, help="images of one measurement (default 8192 arrays, 256 files)")
    parser.add_argument("--quick", action="store_true", help="three rounds of a quarter of that")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds, less = (3, 4) if options.quick else (options.rounds, 1)
    found = {}
    if "arrays" in (options.parts or ["arrays"]):
        found["arrays"] = show("32x32 arrays", arrays(), options.images or 8192 // less, rounds)
    if "jpeg" in (options.parts or ["jpeg"]):
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder, "files")
            count = options.images or 256 // less
            write_jpegs(files, max(FILES_BATCH, count))
            found["jpeg"] = show("JPEG 640x427 to 224", jpegs(files), count, rounds)
    print(
        footer(
            [
                "torch",
                "torchvision",
                "pillow",
                "turbojpeg",
                "webdataset",
                "nvidia-dali-cuda130",
                "nvidia-dali-cuda120",
                "ffcv",
            ]
        )
    )
    return found


if __name__ == "__main__":
    main()
