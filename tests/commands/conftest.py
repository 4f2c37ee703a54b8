"""Runs that the tests of this directory share; none of them changes one."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import CONFIGS, run

QUICK = ["tracking.tensorboard=false", "trainer.log_every=20step"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits by an MLP, with an average of its weights; evaluated in cuts of 50, so that three processes share them."""
    folder = tmp_path_factory.mktemp("digits")
    overrides = ["trainer.duration=3ep", "trainer.ema_decay=0.9", "data.eval_batch_size=50", *QUICK]
    run(folder, 1, "--config", str(CONFIGS / "digits_mlp.yaml"), *overrides)
    return folder / "runs" / "digits_mlp"


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
    run(folder, 1, "--config", "price.yaml", *QUICK)
    return folder / "runs" / "price"
