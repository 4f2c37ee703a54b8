"""Every config of configs/ trains as it stands on one and on two processes, and shows what it is there to show.

Data that needs a network is replaced by small files in the true formats (see small_data), big sizes by small ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from runs import CONFIGS, ROOT, environment, result, rows, run, traced

VGG = [f"data.{split}.dataset.transform.transforms.{k}.size={size}" for split, k, size in
       [("train", 0, 32), ("val", 0, 36), ("val", 1, 32), ("test", 0, 36), ("test", 1, 32)]]  # fmt: skip
RESNET50 = [
    *(f"data.{split}.transform.transforms.{k}.size={size}" for split, k, size in
      [("train", 0, 32), ("val", 0, 36), ("val", 1, 32)]),
    "data.augment.1.augments.0.classes=2", "data.augment.1.augments.1.classes=2", "transfer.head=2",
]  # fmt: skip
# What is changed for the test: a few steps, small batches and images.
OVERRIDES: dict[str, list[str]] = {
    "digits": ["trainer.duration=30step"],
    "digits_mlp": ["trainer.duration=30step"],
    "gaussians_logistic": [],
    "csv_regression": [],
    "mnist_cnn": ["trainer.duration=3step"],
    "fashion_mnist_mlp": ["trainer.duration=4step"],
    "cifar10_cnn": ["trainer.duration=3step"],
    "cifar10_resnet18": ["trainer.duration=2step", "data.global_batch_size=8"],
    "vgg16_finetune": ["trainer.duration=3step", "data.global_batch_size=8", "transfer.weights=null", *VGG],
    "imagefolder_resnet50": ["trainer.duration=2step", "data.global_batch_size=8", *RESNET50],
}
NAMES = sorted(OVERRIDES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the configs' data below `data/`, as `download: true` or a person would have put it."""
    folder = tmp_path_factory.mktemp("configs")
    data = folder / "data"
    small_data.write_mnist(data, "MNIST")
    small_data.write_mnist(data, "FashionMNIST")
    small_data.write_images(data / "images", 40)
    small_data.write_images(data / "imagenet" / "train", 32)
    small_data.write_images(data / "imagenet" / "val", 12)
    shutil.copytree(CONFIGS, folder / "configs")
    small_data.write_cifar(data, folder / "small_cifar.py", each=16)
    for name in ("cifar10_cnn", "cifar10_resnet18"):
        path = folder / "configs" / f"{name}.yaml"
        path.write_text(path.read_text().replace("torchvision.datasets.CIFAR10", "small_cifar.CIFAR10"))
    yield folder
    shutil.rmtree(folder)  # VGG-16's files have half a gigabyte each


@pytest.fixture(scope="module")
def trained(folder: Path) -> Iterator[dict[tuple[str, int], Future[Any]]]:
    """All runs, started two at a time; a test waits for its own."""
    common = ["tracking.tensorboard=false", "debug.trace_samples=true", "data.num_workers=0"]

    def train(name: str, processes: int) -> Path:
        where = f"run.name={name}-{processes}"
        run(folder, processes, "--config", f"configs/{name}.yaml", *OVERRIDES[name], *common, where, timeout=400)
        return folder / "runs" / f"{name}-{processes}"

    with ThreadPoolExecutor(2) as pool:
        jobs = {(name, processes): pool.submit(train, name, processes) for processes in (1, 2) for name in NAMES}
        try:
            yield jobs
        finally:
            pool.shutdown(cancel_futures=True)


def test_every_config_is_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_config_trains(trained: dict[tuple[str, int], Future[Path]], name: str, processes: int) -> None:
    done = trained[name, processes].result()
    facts = result(done)
    assert (facts["state"], facts["world_size"]) == ("completed", processes)
    assert facts["metrics"]["val"]["eval_samples"] > 0
    assert all(value == value for split in facts["metrics"].values() for value in split.values()), "no nan"


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_processes_train_on_the_same_samples(
    trained: dict[tuple[str, int], Future[Path]], name: str
) -> None:
    one, two = (trained[name, processes].result() for processes in (1, 2))
    assert traced(one) == traced(two)
    if name not in ("digits", "cifar10_resnet18", "imagefolder_resnet50", "vgg16_finetune"):  # BatchNorm, dropout
        first, second = rows(one, "val")[-1], rows(two, "val")[-1]
        assert first["step"] == second["step"]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_gaussians_stop_by_themselves(trained: dict[tuple[str, int], Future[Path]], processes: int) -> None:
    facts = result(trained["gaussians_logistic", processes].result())
    assert facts["step"] < 1000
    assert facts["metrics"]["val"]["binary_accuracy"] > 0.99
    assert facts["reason"] == "val/binary_accuracy is 0.995, above 0.99"


def test_the_table_is_learned_as_well_as_by_linear_regression(trained: dict[tuple[str, int], Future[Path]]) -> None:
    from sklearn.linear_model import LinearRegression

    from dist_train.config.components import build
    from dist_train.config.load import load_config

    config = load_config(CONFIGS / "csv_regression.yaml")
    here = {key: str(ROOT / "configs/data/diabetes.csv") for key in ("path", "train_path")}
    train, test = (build({**spec, **here}) for spec in (config.data.train, config.data.test))
    linear = LinearRegression().fit(train.inputs.numpy(), train.targets.numpy())
    expected = linear.score(test.inputs.numpy(), test.targets.numpy())
    assert expected > 0.3
    for processes in (1, 2):
        metrics = result(trained["csv_regression", processes].result())["metrics"]["test"]
        assert metrics["r2"] >= expected - 0.02
        assert metrics["eval_samples"] == len(test) == 66


@pytest.mark.parametrize("processes", [1, 2])
def test_only_the_head_of_vgg_changes(trained: dict[tuple[str, int], Future[Path]], processes: int) -> None:
    """Against the weights that its seed gives; the file is read by plain torch."""
    from torchvision.models import vgg16

    done = trained["vgg16_finetune", processes].result()
    state = torch.load(done / "model.pt", weights_only=True, mmap=True)
    torch.manual_seed(0)
    first = vgg16().state_dict()
    changed = [name for name, value in state.items() if not torch.equal(value, first[name])]
    assert changed == ["classifier.6.weight", "classifier.6.bias"]
    assert state["classifier.6.weight"].shape == (2, 4096)
    with torch.device("meta"):
        plain = vgg16(num_classes=2)
    plain.load_state_dict(state, assign=True)
    losses = [row["loss"] for row in rows(done, "train")]
    assert all(0 < loss < 5 for loss in losses)


def test_whole_and_state_dict_files_of_vgg_load_in_a_fresh_process_without_this_package(
    trained: dict[tuple[str, int], Future[Path]],
) -> None:
    done = trained["vgg16_finetune", 1].result()
    (done / "plain.py").write_text(
        "import sys, torch, torchvision\n"
        "model = torchvision.models.vgg16(num_classes=2).eval()\n"
        "model.load_state_dict(torch.load('model.pt', weights_only=True))\n"
        "assert not [name for name in sys.modules if name.startswith('dist_train')]\n"
        "with torch.no_grad():\n"
        "    print(model(torch.ones(1, 3, 32, 32)).tolist())\n"
    )
    env = environment()
    del env["PYTHONPATH"]
    out = subprocess.run([sys.executable, "plain.py"], cwd=done, env=env, check=True, text=True, capture_output=True)
    assert len(json.loads(out.stdout)[0]) == 2


# --- transfer from a run of one's own --------------------------------------------------------------------------------

BODY = ("features.0.weight", "features.1.running_mean", "features.1.num_batches_tracked", "features.4.bias")


def test_digits_by_transfer_from_another_run(folder: Path, trained: dict[tuple[str, int], Future[Path]]) -> None:
    """A new head on a frozen body learns; the body stays to the bit, with its statistics, also over a resume."""
    source = trained["digits", 1].result()
    copy = folder / "runs" / "source"
    shutil.copytree(source, copy)
    options = [
        "run.name=transfer", f"transfer.weights={copy}", "transfer.head=10", "transfer.freeze=features",
        "tracking.tensorboard=false", "optimizer.lr=0.05", "trainer.duration=60step",
    ]  # fmt: skip
    out = run(folder, 2, *options, "trainer.stop_at=20step").stdout
    for line in ("14 of 14 tensors from", "head classifier.2: 10 -> 10 outputs", "18,912 of them frozen"):
        assert line in out
    shutil.rmtree(copy)  # from now on the run's own checkpoints count
    run(folder, 2, *options)
    before = torch.load(source / "model.pt", weights_only=True)
    after = torch.load(folder / "runs/transfer/model.pt", weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("features."))
    assert all(name in before for name in BODY)
    assert not torch.equal(before["classifier.2.weight"], after["classifier.2.weight"])
    assert result(folder / "runs/transfer")["metrics"]["test"]["accuracy"] > 0.85
    refused = run(folder, 1, *options, "transfer.head=5", expect=2).stderr
    assert "transfer.head.classes: 10 -> 5  (can't change within a run)" in refused


def test_mistakes_in_transfer_are_told_with_their_place_before_anything_is_written(folder: Path) -> None:
    (folder / "bad.yaml").write_text(
        f"extends: {CONFIGS / 'digits.yaml'}\ntransfer:\n  head:\n    at: classifier.3\n    classes: 10\n"
    )
    told = run(folder, 2, "--config", "bad.yaml", "run.name=bad", expect=1).stderr
    assert "bad.yaml:4: transfer.head.at: DigitsCNN has no layer 'classifier.3'; names look like classifier" in told
    for change, part in (
        ("transfer.weights=runs/nowhere", "there is no file or directory runs/nowhere"),
        ("transfer.freeze=featurs.*", "featurs.* matches no parameter of DigitsCNN; names look like features"),
        ("transfer.weights=configs/data/diabetes.csv", "diabetes.csv can't be read as weights"),
    ):
        assert part in run(folder, 1, "--config", "configs/digits.yaml", "run.name=bad", change, expect=2).stderr
    assert not (folder / "runs/bad").exists()


# --- data that isn't there -------------------------------------------------------------------------------------------


def test_missing_data_is_told_with_the_files_that_are_expected(folder: Path, tmp_path: Path) -> None:
    no_network = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    config = str(folder / "configs" / "mnist_cnn.yaml")
    for processes, code in ((1, 2), (2, 1)):
        told = run(tmp_path, processes, "--config", config, env=no_network, expect=code).stderr
        assert "data.train: MNIST has no data in" in told
        assert "expected 4 files that aren't there: data/MNIST/raw/train-images-idx3-ubyte.gz" in told
    told = run(tmp_path, 1, "--config", str(folder / "configs/imagefolder_resnet50.yaml"), expect=2).stderr
    assert f"data.train: ImageFolder has no data in {tmp_path}/data/imagenet/train" in told
    assert not (tmp_path / "runs").exists()
