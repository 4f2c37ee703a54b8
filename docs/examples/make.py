"""Regenerates the plots of docs/gallery.md: `python docs/examples/make.py [NAME ...]`, a few minutes on two CPU cores.

Each config is trained unchanged if its data is available offline. Downloaded data is replaced by small files in
the same formats (tests/configs/small_data.py), and what is too large for CPUs is shortened; the gallery says where.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "configs"))
SEEN = "tracking.images={{every: 1000ep, samples: 16, modules: [{}]}}"
# Overrides for the plots; none for the configs that run unchanged.
CHANGES: dict[str, list[str]] = {
    "digits": [SEEN.format("Conv2d")],
    "digits_mlp": [],
    "gaussians_logistic": [],
    "csv_regression": [],
    "mnist_cnn": ["trainer.duration=6ep", "trainer.log_every=5step", SEEN.format("conv1, conv2, pool")],
    "fashion_mnist_mlp": ["trainer.duration=10ep", "trainer.log_every=5step"],
    "cifar10_cnn": ["trainer.duration=30ep", "trainer.log_every=11step", "optimizer.momentum=0.9",
                    "scheduler.step_size=10", SEEN.format("Conv2d")],
}  # fmt: skip


def prepare(folder: Path) -> None:
    """A working directory with small datasets at the paths that the configs name."""
    import small_data

    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("MNIST", "FashionMNIST"):
        small_data.write_mnist(folder / "data", name, train=1400, test=397)
    small_data.write_cifar(folder / "data", folder / "small_cifar.py", 299, small_data.tinted_digits(6 * 299))
    path = folder / "configs" / "cifar10_cnn.yaml"
    path.write_text(path.read_text().replace("dist_train.data.CIFAR10", "small_cifar.CIFAR10"))


def collect(run: Path, into: Path) -> None:
    """Copy the plots of a run: its curves, those of its report, and its feature maps from TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    shutil.copy(run / "curves.png", into)
    report = (run / "report.html").read_text()
    for matrix in re.findall(r'<svg [^>]*aria-label="confusion matrix.*?</svg>', report, re.DOTALL):
        (into / "confusion-matrix.svg").write_text(matrix + "\n")
    for name, kind, data in re.findall(r'<img alt="([^"]+)" src="data:image/([\w+]+);base64,([^"]+)"', report):
        if name.startswith(("predicted", "the decision")):
            ending = kind.removesuffix("+xml")
            (into / f"{name.split(',')[0].replace(' ', '-')}.{ending}").write_bytes(base64.b64decode(data))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for tag in events.Tags()["images"]:
        name, _, sample = tag.strip("/").replace("/", "-").rpartition("-") if "features" in tag else (tag, "", "0")
        if sample != "0":
            continue  # one sample's maps are enough for a page
        (into / f"{name}.png").write_bytes(events.Images(tag)[-1].encoded_image_string)


def main(names: list[str]) -> None:
    """Train the named configs, or all, and replace their folders of pictures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for name in names or CHANGES:
            command = [sys.executable, "-m", "dist_train.main", "--config", f"configs/{name}.yaml", *CHANGES[name]]
            print(name, flush=True)
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            collect(folder / "runs" / name, HERE / name)


if __name__ == "__main__":
    main(sys.argv[1:])
