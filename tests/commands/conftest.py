"""Runs that the tests of this directory share; none of them changes one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import CONFIGS, F1, environment, made_once

from dist_train import train

PROGRAMS = Path(__file__).parent / "programs"
QUICK = ["tracking.tensorboard=false", "trainer.log_every=20step"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits by an MLP with EMA weights; in eval batches of 50, so that each of three processes gets some."""
    overrides = ["trainer.duration=3ep", "trainer.ema_decay=0.9", "data.eval_batch_size=50", *QUICK]

    def make(folder: Path) -> None:
        train(str(CONFIGS / "digits_mlp.yaml"), f"run.dir={folder}", *overrides)

    return made_once(tmp_path_factory, "digits", make) / "digits_mlp"


@pytest.fixture(scope="session")
def together(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and three processes make of the digits run: a folder for each, `2` and `3`, with what they printed."""

    def make(folder: Path) -> None:
        shutil.copytree(digits, folder / "2" / "copy")
        (folder / "2" / "copy" / "report.html").unlink()
        (folder / "3").mkdir()
        shutil.copy(PROGRAMS / "mute.py", folder / "2")
        for place in ("2", "3"):
            shutil.copy(PROGRAMS / "answers.py", folder / place)
        boxes = ["predict", str(digits), "--output", "boxes.jsonl", "task._target_=answers.Boxes"]
        pairs = ["predict", str(digits), "--raw", "--output", "pairs.csv", "task._target_=answers.Pairs"]
        mute = ["--config", str(CONFIGS / "digits_mlp.yaml"), "trainer.duration=5step", "task._target_=mute.Mute"]
        mute += ["data.eval_batch_size=50", "tracking.tensorboard=false", "run.name=mute"]
        evaluate, predict = ["evaluate", str(digits), "--output"], ["predict", str(digits), "--output", "out.csv"]
        run_commands(folder, 2, [predict, ["report", "copy"], mute, boxes, pairs])
        run_commands(folder, 3, [predict, boxes, pairs, [*evaluate, "out.json"], [*evaluate, "f1.json", F1]])

    return made_once(tmp_path_factory, "together", make)


def run_commands(folder: Path, processes: int, commands: list[list[str]]) -> None:
    """Carry out several commands in one start, which costs seconds; each must succeed."""
    place = folder / str(processes)
    place.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*torchrun, str(PROGRAMS / "several_commands.py"), json.dumps(commands)], cwd=place, env=environment(), timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "stdout").write_text(done.stdout)
    (place / "stderr").write_text(done.stderr)


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Regression on a table whose targets were standardised."""
    import numpy as np

    folder = tmp_path_factory.mktemp("table")
    random = np.random.RandomState(0)
    x = random.standard_normal((200, 3))
    y = 1000 + 50 * (x @ [1.0, -2.0, 0.5])
    lines = ["a,b,c,price"] + [",".join(f"{value:.6f}" for value in (*row, target)) for row, target in zip(x, y)]
    (folder / "all.csv").write_text("\n".join(lines) + "\n")
    data = "{_target_: dist_train.data.CSV, path: all.csv, train_path: all.csv, target: price, standardize: true, "
    data += "standardize_target: true, split: %s}"
    (folder / "price.yaml").write_text(
        f"""
data:
  train: {data % "train"}
  val: {data % "val"}
  test: {data % "test"}
  global_batch_size: 32
model: {{_target_: dist_train.models.MLP, in_features: 3, hidden: [], out_features: 1}}
loss: {{_target_: torch.nn.MSELoss}}
metrics: [r2]
optimizer: {{_target_: torch.optim.SGD, lr: 0.1}}
trainer: {{duration: 20ep, evaluate_every: 20ep}}
checkpoint: {{every: 20ep}}
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("price.yaml", *QUICK)
    return folder / "runs" / "price"
