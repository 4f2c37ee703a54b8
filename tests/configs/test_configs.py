"""Every config of configs/ trains unchanged on one and on two processes, and reaches what it should show.

Data that needs a network is replaced by small files in the true formats (see small_data), big sizes by small ones.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from runs import CONFIGS, ROOT, environment, result, rows, run, run_several, traced

from dist_train.config.errors import ConfigError
from dist_train.data import MarkovChain
from dist_train.run.api import train

VGG = ["data.train.dataset.random_resized_crop=32", *(f"data.{split}.dataset.{size}" for split in ("val", "test")
       for size in ("resize=36", "center_crop=32"))]  # fmt: skip
RESNET50 = [
    "data.train.random_resized_crop=32", "data.val.resize=36", "data.val.center_crop=32",
    "data.augment.3.augments.0.classes=2", "data.augment.3.augments.1.classes=2", "transfer.head=2",
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
    "language_model": [
        "trainer.duration=60step", "scheduler.warmup=5step", "data.train.samples=256", "data.val.samples=64",
        *(f"data.{split}.{size}" for split in ("train", "val") for size in ("order=1", "length=32")),
    ],
    "segmentation": ["trainer.duration=40step", "data.global_batch_size=8", "scheduler.max_lr=0.01", "data.val.samples=32"],
    "detection": ["trainer.duration=8step", "data.global_batch_size=8", "data.val.samples=16", "trainer.log_every=1step"],
    "contrastive": ["trainer.duration=12step", "data.global_batch_size=128"],
    "vae": ["trainer.duration=60step"],
    "gan": ["trainer.duration=20step"],
    "distillation": ["trainer.duration=60step"],
    "digits_muon": ["trainer.duration=40step"],
}  # fmt: skip
# Draws and batch statistics that depend on how a batch is split, and a kernel in bfloat16.
BY_SPLIT = (
    "digits", "cifar10_resnet18", "imagefolder_resnet50", "vgg16_finetune", "contrastive", "detection", "vae", "gan",
    "digits_muon",
)  # fmt: skip
# The first steps of AdamW amplify rounding: 1e-7 of the loss after five steps is 1e-4 after forty.
ROUNDING = {"segmentation": 5e-3, "language_model": 5e-3}
# On two processes only: on one VGG has its real size.
NARROW = ["model._target_=narrow_vgg.vgg16"]
NAMES = sorted(OVERRIDES)
PROGRAMS = Path(__file__).parent / "programs"
QUIET = ("tracking.tensorboard=false", "tracking.report=false")
Trained = Callable[[str, int], Path]


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
    shutil.copy(PROGRAMS / "narrow_vgg.py", folder)
    small_data.write_cifar(data, folder / "small_cifar.py", each=16)
    for name in ("cifar10_cnn", "cifar10_resnet18"):
        path = folder / "configs" / f"{name}.yaml"
        path.write_text(path.read_text().replace("dist_train.data.CIFAR10", "small_cifar.CIFAR10"))
    train_here(folder, "trainer.duration=60step", *QUIET)  # the teacher of `distillation`
    yield folder
    shutil.rmtree(folder)  # VGG-16's files have half a gigabyte each


@pytest.fixture(scope="module")
def trained(folder: Path) -> Iterator[Trained]:
    """`trained(name, processes)` waits for a config's run: each by its command on one process, all by one torchrun on two."""
    common = [*QUIET, "debug.trace_samples=true", "data.num_workers=0"]

    def arguments(name: str, processes: int) -> list[str]:
        narrow = NARROW if (name, processes) == ("vgg16_finetune", 2) else []
        return [f"configs/{name}.yaml", *OVERRIDES[name], *narrow, *common, f"run.name={name}-{processes}"]

    def one(name: str) -> None:
        run(folder, 1, "--config", *arguments(name, 1), timeout=400)

    def two() -> None:
        run_several(folder, 2, [arguments(name, 2) for name in NAMES], timeout=500)

    with ThreadPoolExecutor(2) as pool:
        pair = pool.submit(two)
        single = {name: pool.submit(one, name) for name in NAMES}

        def wait(name: str, processes: int) -> Path:
            (pair if processes == 2 else single[name]).result()
            return folder / "runs" / f"{name}-{processes}"

        yield wait
        pool.shutdown(cancel_futures=True)


def test_every_config_is_here() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_config_trains(trained: Trained, name: str, processes: int) -> None:
    done = trained(name, processes)
    facts = result(done)
    assert (facts["state"], facts["world_size"]) == ("completed", processes)
    assert facts["metrics"]["val"]["eval_samples"] > 0
    assert all(value == value for split in facts["metrics"].values() for value in split.values()), "no nan"


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_processes_train_on_the_same_samples(trained: Trained, name: str) -> None:
    one, two = (trained(name, processes) for processes in (1, 2))
    assert traced(one) == traced(two)
    if name not in BY_SPLIT:
        first, second = rows(one, "val")[-1], rows(two, "val")[-1]
        assert first["step"] == second["step"]
        assert first["loss"] == pytest.approx(second["loss"], rel=ROUNDING.get(name, 1e-4))


@pytest.mark.parametrize("processes", [1, 2])
def test_gaussians_stop_by_themselves(trained: Trained, processes: int) -> None:
    facts = result(trained("gaussians_logistic", processes))
    assert facts["step"] < 1000
    assert facts["metrics"]["val"]["binary_accuracy"] > 0.99
    assert facts["reason"] == "val/binary_accuracy is 0.995, above 0.99"


def test_the_table_is_learned_as_well_as_by_linear_regression(trained: Trained) -> None:
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
        metrics = result(trained("csv_regression", processes))["metrics"]["test"]
        assert metrics["r2"] >= expected - 0.02
        assert metrics["eval_samples"] == len(test) == 66


@pytest.mark.parametrize("processes", [1, 2])
def test_a_language_model_comes_close_to_what_is_known_of_the_language(trained: Trained, processes: int) -> None:
    """Below it would be a model that sees the tokens that it predicts."""
    best = MarkovChain("val", samples=64, order=1, length=32).perplexity
    assert 0.98 * best < result(trained("language_model", processes))["metrics"]["val"]["perplexity"] < 1.15 * best


# Of a few steps: what has been learned by then, on the validation data. The comments of the configs say what they reach.
LEARNED = {
    "segmentation": ("iou_square", 0.3, 1.0),
    "contrastive": ("accuracy", 0.05, 1.0),  # by chance: 1 of 180
    "vae": ("loss", 15.0, 32.0),  # at first: 45
    "digits_muon": ("accuracy", 0.8, 1.0),
    "distillation": ("accuracy", 0.5, 1.0),
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_ready_tasks_learn_in_a_few_steps(trained: Trained, name: str, processes: int) -> None:
    metric, low, high = LEARNED[name]
    assert low < result(trained(name, processes))["metrics"]["val"][metric] < high


@pytest.mark.parametrize("processes", [1, 2])
def test_the_rows_of_ready_tasks_have_their_losses_and_optimizers(trained: Trained, processes: int) -> None:
    last = rows(trained("gan", processes), "train")[-1]
    names = ("discriminator", "discriminator/real", "discriminator/fake", "discriminator/penalty", "generator")
    assert {f"loss/{name}" for name in names} <= last.keys()
    assert (last["lr/discriminator"], last["lr/generator"]) == (5e-4, 5e-4)
    assert {"grad_norm/discriminator", "grad_norm/generator"} <= last.keys()
    boxes = rows(trained("detection", processes), "train")
    assert {"loss/loss_classifier", "loss/loss_box_reg", "loss/loss_objectness", "loss/loss_rpn_box_reg"} <= boxes[
        0
    ].keys()
    assert boxes[-1]["loss"] < boxes[0]["loss"]
    muon = rows(trained("digits_muon", processes), "train")[-1]
    assert muon["lr/muon"] / muon["lr/adamw"] == pytest.approx(0.02 / 3e-3)
    assert "grad_norm" in muon


def test_only_the_head_of_vgg_changes(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the weights that its seed gives; the file is read by plain torch."""
    from torchvision.models import vgg16

    monkeypatch.syspath_prepend(PROGRAMS)
    import narrow_vgg

    for processes, plain in ((1, vgg16), (2, narrow_vgg.vgg16)):
        torch.manual_seed(0)
        first = plain().state_dict()
        done = trained("vgg16_finetune", processes)
        state = torch.load(done / "model.pt", weights_only=True, mmap=True)
        changed = [name for name, value in state.items() if not torch.equal(value, first[name])]
        assert changed == ["classifier.6.weight", "classifier.6.bias"]
        assert state["classifier.6.weight"].shape == (2, first["classifier.6.weight"].shape[1])
        with torch.device("meta"):
            model = plain(num_classes=2)
        model.load_state_dict(state, assign=True)
        losses = [row["loss"] for row in rows(done, "train")]
        assert all(0 < loss < 5 for loss in losses)


def test_whole_and_state_dict_files_of_vgg_load_in_a_fresh_process_without_this_package(trained: Trained) -> None:
    done = trained("vgg16_finetune", 1)
    run(done, 1, "export", "--run", ".", "--format", "module", "--output", "whole.pt")
    env = environment()
    del env["PYTHONPATH"]
    command = [sys.executable, str(PROGRAMS / "load_vgg.py")]
    fresh = subprocess.run(command, cwd=done, env=env, timeout=300, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr


# --- transfer from a run of one's own --------------------------------------------------------------------------------


def test_digits_are_learned_by_transfer_from_another_run(folder: Path, trained: Trained) -> None:
    """A new head on a frozen body learns; the body stays to the bit, with its statistics, also over a resume."""
    source = trained("digits", 1)
    copy = folder / "runs" / "source"
    shutil.copytree(source, copy)
    options = [
        "run.name=transfer", f"transfer.weights={copy}", "transfer.head=10", "transfer.freeze=features",
        "tracking.tensorboard=false", "tracking.report=false", "optimizer.lr=0.05", "scheduler=null", "checkpoint.keep_best=null",
        "trainer.duration=60step",
    ]  # fmt: skip
    out = run(folder, 2, *options, "trainer.stop_at=20step").stdout
    for line in ("14 of 14 tensors from", "head classifier.2: 10 -> 10 outputs", "18,912 of them frozen"):
        assert line in out
    shutil.rmtree(copy)  # from now on the run's own checkpoints count
    done = train_here(folder, *options)
    assert done["metrics"]["test"]["accuracy"] > 0.85
    before = torch.load(source / "model.pt", weights_only=True)
    after = torch.load(folder / "runs/transfer/model.pt", weights_only=True)
    body = [name for name in before if name.startswith("features.")]
    assert "features.1.running_mean" in body
    assert all(torch.equal(before[name], after[name]) for name in body)
    assert not torch.equal(before["classifier.2.weight"], after["classifier.2.weight"])

    with pytest.raises(ConfigError, match=r"transfer\.head\.classes +10 -> 5  \(can't change within a run\)"):
        train_here(folder, *options, "transfer.head=5")
    thawed = [*options, "transfer.freeze=[features.0, features.1]", "trainer.duration=70step"]
    with pytest.raises(ConfigError, match=r"checkpoint\.accept_changes=true"):
        train_here(folder, *thawed)
    assert train_here(folder, *thawed, "checkpoint.accept_changes=true")["step"] == 70
    last = torch.load(folder / "runs/transfer/model.pt", weights_only=True)
    assert {name for name in body if not torch.equal(last[name], after[name])} == {
        f"features.{name}" for name in body_of_second_block
    }


body_of_second_block = ("3.weight", "4.weight", "4.bias", "4.running_mean", "4.running_var", "4.num_batches_tracked")


def train_here(folder: Path, *overrides: str, config: Path = CONFIGS / "digits.yaml") -> dict[str, Any]:
    """Train in this process; much faster than a new one."""
    with contextlib.chdir(folder):
        return train(str(config), *overrides)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("transfer.weights=runs/nowhere", "transfer.weights: there is no file or directory runs/nowhere"),
        ("transfer.weights=configs/data/diabetes.csv", "diabetes.csv can't be read as weights"),
        ("transfer.weights=configs", "configs holds neither a model.pt nor a valid checkpoint"),
        (
            "transfer.weights=ResNet18_Weights.BEST",
            "there are no weights ResNet18_Weights.BEST; did you mean ResNet18_Weights.IMAGENET1K_V1?",
        ),
        ("transfer.freeze=featurs.*", "featurs.* matches no parameter of DigitsCNN; names look like features"),
        ("transfer.freeze=['*']", "* freezes every parameter: nothing is left"),
        (
            "model_init=[{match: '*', _target_: torch.nn.init.eye_}]",
            "model_init.0: it can't initialize features.0.weight",
        ),
        (
            "transfer.append={at: features, name: x, module: {_target_: torch.nn.Linear, in_features: -1, out_features: 2}}",
            "transfer.append.module: could not be built: RuntimeError: Trying to create tensor with negative dimension",
        ),
    ],
)
def test_mistakes_in_transfer_are_reported_before_anything_is_written(folder: Path, change: str, answer: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_here(folder, change, "run.name=bad")
    assert str(caught.value).startswith("command line: ")
    assert answer in str(caught.value)
    assert not (folder / "runs/bad").exists()


def test_a_mistake_in_transfer_is_reported_with_file_and_line(folder: Path) -> None:
    text = f"extends: {CONFIGS / 'digits.yaml'}\ntransfer:\n  head:\n    at: classifier.3\n    classes: 10\nrun: {{name: bad}}\n"
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        train_here(folder, config=Path("bad.yaml"))
    message = "bad.yaml:4: transfer.head.at: DigitsCNN has no layer 'classifier.3'; names look like classifier"
    assert str(caught.value).startswith(message)
    assert not (folder / "runs/bad").exists()


# --- data that isn't there -------------------------------------------------------------------------------------------


def test_missing_data_is_reported_with_the_files_that_are_expected(folder: Path, tmp_path: Path) -> None:
    no_network = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    printed = run(tmp_path, 2, "--config", str(folder / "configs/mnist_cnn.yaml"), env=no_network, expect=1).stderr
    assert "mnist_cnn.yaml:6: data.train: MNIST has no data in" in printed
    assert "expected 4 files that aren't there: data/MNIST/raw/train-images-idx3-ubyte.gz" in printed
    with pytest.raises(ConfigError) as caught:
        train_here(tmp_path, config=CONFIGS / "imagefolder_resnet50.yaml")
    assert f"data.train: ImageFolder: {tmp_path}/data/imagenet/train is no directory" in str(caught.value)
    assert not (tmp_path / "runs").exists()
