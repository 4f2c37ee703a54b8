"""Bitwise mode in full: every model, optimizer and key that changes numbers, on every number of processes (make chaos)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from bitwise_cases import (
    ADAMW,
    AUGMENTED,
    CASES,
    CNN,
    IMAGES,
    MLP,
    RESNET,
    SGD,
    TOKENS,
    TRANSFORMER,
    case,
    layers,
    points,
)
from bitwise_runs import WORLDS, Jobs, assert_same_bits, train_all
from oracle.oracle_configs import CONFIGS

PLAIN_NORMS = layers(
    ("Conv2d", 2, 4, 3), ("InstanceNorm2d", 4, 1e-5, 0.1, True, True), ("ReLU",), ("GroupNorm", 2, 4), ("Flatten",),
    ("Linear", 64, 3),
)  # fmt: skip
F1 = {"_target_": "torchmetrics.classification.MulticlassF1Score", "num_classes": 3}
OTHERS: dict[str, dict[str, Any]] = {
    "recurrent": case({"_target_": "bits.Recurrent"}, TOKENS, optimizer=ADAMW),
    "mixed": case(
        {"_target_": "bits.Mixed"}, optimizer=ADAMW, trainer={"ema_decay": None}, distributed={"bucket_mb": 0.0001}
    ),
    "thaw": case(MLP, callbacks=[{"_target_": "bits.Thaw"}]),
    "metrics": case(MLP, metrics=["accuracy", "f1", "auroc", F1]),
    "norms": case(PLAIN_NORMS, IMAGES),
    "compiled": case(MLP, trainer={"compile": True}),
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # model, data, further keys of `data`
    "mlp": (MLP, None, {}),
    "cnn": (CNN, IMAGES, {"augment": AUGMENTED}),
    "transformer": (TRANSFORMER, TOKENS, {}),
}
OPTIMIZERS = {
    "sgd": SGD,
    "sgd-fused": {**SGD, "fused": True, "weight_decay": 0.01},
    "adamw": {**ADAMW, "foreach": True},
    "adamw-fused": {**ADAMW, "fused": True},
    "adam-amsgrad": {"_target_": "torch.optim.Adam", "lr": 0.01, "amsgrad": True, "foreach": False},
}
SETTINGS: dict[str, dict[str, Any]] = {  # further keys of `data` and `trainer`
    "eight": {},
    "accumulated": {
        "data": {"global_batch_size": 32},
        "trainer": {"clip_grad_value": 0.02},
    },  # two and more on each rank
    "bf16": {"trainer": {"precision": "bf16"}},
    "fp16": {"trainer": {"precision": "fp16", "clip_grad_norm": None}},
    "plain": {
        "trainer": {"clip_grad_norm": None, "ema_decay": None, "evaluate_every": "1step", "log_every": "1step"},
    },
}


def matrix() -> dict[str, dict[str, Any]]:
    made = CASES | OTHERS
    for model, (network, data, keys) in MODELS.items():
        for optimizer, arguments in OPTIMIZERS.items():
            for setting, given in SETTINGS.items():
                if setting == "eight" or optimizer in ("sgd", "adamw"):
                    made[f"{model}-{optimizer}-{setting}"] = case(
                        network, data, data={**keys, **given.get("data", {})}, trainer=given.get("trainer", {}),
                        optimizer=arguments, distributed={"bucket_mb": 0.002},
                    )  # fmt: skip
    large, small = points(samples=32, shape=[3, 32, 32], noise=0.1), points(samples=6, shape=[3, 32, 32], seed=1)
    for optimizer, precision in (("adamw", "bf16"), ("sgd", "fp32")):
        trainer = {"precision": precision, "duration": "2step", "log_every": "1step", "micro_batch_size": 2}
        given = {
            "trainer": trainer,
            "optimizer": OPTIMIZERS[optimizer],
            "checkpoint": {"keep_last": 1, "keep_best": None},
        }
        made[f"resnet18-{optimizer}-{precision}"] = case(RESNET, large, small, data={"global_batch_size": 32}, **given)
    return made | {f"oracle-{name}": of_oracle(name) for name in CONFIGS if name != "stream"}


def of_oracle(name: str) -> dict[str, Any]:
    """A config of the oracle in micro-batches that all numbers of processes can share; streams can't be."""
    config = copy.deepcopy(CONFIGS[name])
    size = 1 if name == "zero_weight" else 2
    if config["data"]["global_batch_size"] != "all":
        config["data"]["global_batch_size"] = 8 * size
    config["data"]["num_workers"] = 0
    config["trainer"] |= {"micro_batch_size": size, "stop_at": None}
    return {
        **config, "distributed": {"reproducibility": "bitwise"}, "tracking": {"tensorboard": False, "report": False},
    }  # fmt: skip


MATRIX = matrix()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jobs: Jobs = {n: [(f"{name}-{n}", config, []) for name, config in MATRIX.items()] for n in WORLDS}
    return train_all(tmp_path_factory.mktemp("matrix"), jobs, timeout=3600)


@pytest.mark.chaos
@pytest.mark.parametrize("name", MATRIX)
def test_everything_has_the_same_bits_on_any_number_of_processes(name: str, runs: Path) -> None:
    assert_same_bits(runs / f"{name}-{n}" for n in WORLDS)
