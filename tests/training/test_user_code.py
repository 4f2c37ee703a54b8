"""One's own code is found beside the config, in the working directory and among what is installed, on every way in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment, result, rows, run

PROGRAMS = Path(__file__).parent / "programs"
CONFIG = """
data:
  train: {_target_: my_points.Points}
  val: {_target_: my_points.Points, n: 16, seed: 1}
  global_batch_size: 16
  num_workers: 1
model: {_target_: my_net.Net}
loss: {_target_: my_loss.smooth, floor: 0.1}
metrics: [accuracy]
optimizer: {_target_: torch.optim.SGD, lr: 0.5}
trainer: {duration: 2ep, log_every: 1ep}
tracking: {tensorboard: false, report: false}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config and the dataset in `configs`, the model in the working directory, the loss installed."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("work/configs", "installed"):
        (folder / name).mkdir(parents=True)
    (folder / "work/configs/mine.yaml").write_text(CONFIG)
    for name in ("work/configs/my_points.py", "work/my_net.py", "installed/my_loss.py"):
        shutil.copy(PROGRAMS / Path(name).name, folder / name)
    return folder


WAYS = {
    "plain": [sys.executable, "-m", "dist_train.main"],
    "console script": [sys.executable, "-c", "from dist_train.main import console_main; console_main()"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "dist_train.main",
    ],
    "accelerate": [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=1",
        "-m",
        "dist_train.main",
    ],
}


@pytest.mark.parametrize(
    ("way", "method"),
    [("plain", "fork"), ("plain", "spawn"), ("console script", "fork"), ("accelerate", "fork")],
)
def test_own_code_is_found_with_loader_workers_too(folder: Path, way: str, method: str) -> None:
    name = f"{way}-{method}".replace(" ", "-")
    done = subprocess.run(
        [*WAYS[way], "--config", "configs/mine.yaml", f"run.name={name}", f"data.worker_start_method={method}"],
        cwd=folder / "work", env=environment(PYTHONPATH=f"{Path(__file__).parents[2]}:{folder / 'installed'}"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    final = result(folder / "work/runs" / name)
    assert final["state"] == "completed"
    assert final["metrics"]["val"]["eval_samples"] == 16
    assert all(row["loss"] > 0.1 for row in rows(folder / "work/runs" / name, "train")), (
        "the loss's own argument counts"
    )


def test_the_run_remembers_where_the_code_is(folder: Path, tmp_path: Path) -> None:
    place = folder / "work/runs/plain-fork"
    done = run(
        tmp_path, 1, "evaluate", "--run", str(place), "--split", "val",
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}:{folder / 'installed'}"},
    )  # fmt: skip
    evaluated = json.loads(done.stdout.splitlines()[-1])
    assert evaluated["metrics"]["accuracy"] == result(place)["metrics"]["val"]["accuracy"]


def test_an_error_inside_the_users_own_module_is_reported_as_such(folder: Path) -> None:
    (folder / "work/broken.py").write_text("import torch\n\nLIMIT = 1 / 0\n")
    done = run(
        folder / "work", 1, "--config", "configs/mine.yaml", "model={_target_: broken.Net}", "run.name=x", expect=2
    )
    assert "broken.py:3" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert not (folder / "work/runs/x").exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.width=0.5", ["mine.yaml", "model", "could not be built"]),
        ("data.train.n=8", ["data.global_batch_size", "8 samples"]),
        ("data.val.n=0", ["data.val", "found 0"]),
        ("trainer.micro_batch_size=0", ["trainer.micro_batch_size"]),
        ("metrics=[top3]", ["metrics", "top3", "top5"]),
        ("distributed.device=cuda", ["distributed.device", "CUDA_VISIBLE_DEVICES"]),
        ("checkpoint.resume=nowhere", ["checkpoint.resume", "nowhere"]),
    ],
)
def test_a_mistake_that_shows_only_when_everything_is_built_is_a_config_error_and_writes_nothing(
    folder: Path, override: str, parts: list[str]
) -> None:
    done = run(
        folder / "work", 1, "--config", "configs/mine.yaml", override, "run.name=bad", expect=2,
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}:{folder / 'installed'}"},
    )  # fmt: skip
    for part in parts:
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "work/runs/bad").exists()


def test_batchnorm_over_one_sample_is_refused_with_sizes_that_work(tmp_path: Path) -> None:
    done = run(tmp_path, 1, "trainer.micro_batch_size=1", "run.name=bn", expect=2)
    for part in ("BatchNorm", "sizes that work", "data.global_batch_size"):
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


def test_train_from_python_takes_live_objects(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAMS / "live_objects.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/live/model.pt").exists()
    shown = " ".join(done.stdout.split())
    assert "only from Python, with the same objects" in shown
    assert "torchrun --nproc_per_node" in shown
