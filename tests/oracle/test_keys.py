"""Every key of the config is wired through: it changes the numbers as the plain loop says, or it changes none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differences, trained
from described import model_of
from oracle_configs import CONFIGS, CONV, SGD, piece
from plain_loop import plain_loop

from dist_train.config.fields import section_of, walk
from dist_train.config.schema import Config

DEFAULT = object()  # the key isn't there
# Key: (config that sets it, another value). A run of the config must not equal the plain loop with that value.
MATTERS: dict[str, tuple[str, Any]] = {
    "seed": ("weighted", DEFAULT),
    "data.train": ("plain", piece("Points", seed=5)),
    "data.val": ("plain", piece("Points", samples=11, seed=5)),
    "data.test": ("plain", DEFAULT),
    "data.global_batch_size": ("plain", 7),
    "data.shuffle": ("plateau", DEFAULT),
    "data.eval_batch_size": ("plain", DEFAULT),
    "data.steps_per_epoch": ("stream", 2),
    "data.drop_last": ("weighted", DEFAULT),
    "data.weights": ("named", DEFAULT),
    "data.inputs": ("named", ["inner.scale", "inner.points"]),
    "data.target": ("named", "label"),
    "data.normalize.mean": ("images", [0.1, 0.2]),
    "data.normalize.std": ("images", [0.7, 1.2]),
    "data.augment": ("images", DEFAULT),
    "data.augment.1.alpha": ("images", DEFAULT),
    "data.collate": ("summed", DEFAULT),
    "model": ("images", {**CONV, "_args_": CONV["_args_"][:2] + CONV["_args_"][3:]}),
    "model_init": ("transfer", DEFAULT),
    "model_init.0.std": ("transfer", DEFAULT),
    "transfer.head.classes": ("transfer", 4),
    "transfer.head.at": ("transfer", "1.0"),
    "transfer.append.at": ("transfer", "1"),
    "transfer.append.name": ("transfer", "other"),
    "transfer.append.module": ("transfer", {"_target_": "torch.nn.Tanh"}),
    "transfer.freeze": ("transfer", DEFAULT),
    "task": ("task", piece("Pairs")),
    "loss": ("own", piece("weighted_squares")),
    "loss.weight": ("weighted", DEFAULT),
    "loss.label_smoothing": ("weighted", DEFAULT),
    "loss.reduction": ("summed", DEFAULT),
    "metrics": ("plain", DEFAULT),
    "optimizer": ("own", {"_target_": SGD, "lr": 0.01}),
    "optimizer.momentum": ("plain", DEFAULT),
    "optimizer.weight_decay": ("dropout", DEFAULT),
    "optimizer.groups.0.ndim_below": ("dropout", 3),
    "optimizer.layer_decay": ("dropout", DEFAULT),
    "optimizer.groups": ("weighted", DEFAULT),
    "scheduler": ("above", DEFAULT),
    "scheduler.every": ("fp16", DEFAULT),
    "scheduler.horizon": ("dropout", DEFAULT),
    "scheduler.warmup": ("bf16", DEFAULT),
    "scheduler.metric": ("plateau", "val/accuracy"),
    "callbacks": ("own", DEFAULT),
    "trainer.duration": ("plain", "11step"),
    "trainer.precision": ("bf16", DEFAULT),
    "trainer.stop_at": ("summed", DEFAULT),
    "trainer.micro_batch_size": ("dropout", DEFAULT),
    "trainer.clip_grad_norm": ("dropout", DEFAULT),
    "trainer.clip_grad_value": ("weighted", DEFAULT),
    "trainer.ema_decay": ("dropout", DEFAULT),
    "trainer.channels_last": ("images", DEFAULT),
    "trainer.evaluate_every": ("weighted", DEFAULT),
    "trainer.evaluate_at_start": ("weighted", DEFAULT),
    "trainer.log_every": ("plain", DEFAULT),
    "trainer.stop_when.metric": ("plateau", "val/accuracy"),
    "trainer.stop_when.above": ("above", 0.95),
    "trainer.stop_when.below": ("stream", 0.4),
    "trainer.stop_when.patience": ("plateau", "3step"),
    "trainer.stop_when.min_delta": ("plateau", DEFAULT),
    "trainer.stop_when.mode": ("own", DEFAULT),
    "trainer.on_nonfinite": ("skipped", DEFAULT),
    "distributed.reproducibility": ("bitwise", DEFAULT),
    "checkpoint.every": ("weighted", DEFAULT),
    "checkpoint.keep_last": ("weighted", 1),
    "checkpoint.keep_best": ("images", DEFAULT),
}
# Key: a value that must leave every bit as it was; all are set in one run.
CHANGES_NOTHING: dict[str, Any] = {
    "data.num_workers": 1,
    "data.pin_memory": False,
    "data.placement": "host",
    "data.persistent_workers": False,
    "data.prefetch_factor": 3,
    "data.timeout": 60.0,
    "data.worker_start_method": "fork",
    "distributed.device": "cpu",
    "distributed.strategy": "ddp",
    "distributed.find_unused_parameters": True,
    "distributed.bucket_mb": 1.0,
    "distributed.threads": 1,
    "distributed.deterministic": True,
    "distributed.hang_timeout": "5min",
    "checkpoint.what": "trained",
    "checkpoint.asynchronous": False,
    "checkpoint.on_error": "warn",
    "checkpoint.resume": "never",
    "checkpoint.accept_changes": True,
    "trainer.profile.steps": [2, 3],
    "tracking.tensorboard": True,
    "tracking.images.every": "1step",
    "tracking.images.samples": 2,
    "tracking.images.modules": ["ReLU"],
    "tracking.histograms": "2step",
    "tracking.graph": True,
    "tracking.wandb.project": "none",
    "tracking.wandb.mode": "disabled",
    "tracking.wandb.entity": "nobody",
    "tracking.wandb.group": "group",
    "tracking.wandb.tags": ["tag"],
    "tracking.report": True,
    "debug.trace_samples": True,
    "debug.digest": True,
    "debug.layers": True,
    "run.name": "run",
    "run.code_paths": [str(Path(__file__).parent)],
}
# Key: where it is tested instead, and why not here.
ELSEWHERE = {
    "run.dir": "oracle/comparing.py",  # every run here is in a directory of its own
    "transfer.weights": "oracle/test_keys.py::test_weights_are_loaded_from_a_file",
    "transfer.strict": "oracle/test_keys.py::test_weights_are_loaded_from_a_file",
    "data.on_error": "run/test_bitwise.py::test_samples_that_cannot_be_read_are_counted_in_every_row",
    "trainer.train_metrics": "training/test_train_metrics.py::test_train_metrics_are_those_of_the_samples_that_were_trained",
    "val_loss": "oracle/test_task_interface.py::test_val_loss_is_another_loss",
    "trainer.whole_batch": "oracle/test_task_interface.py::test_one_process_in_micro_batches_is_the_textbook",  # "covariance"
    "trainer.compile": "gpu/test_training.py::test_compiled_and_channels_last_train_too",  # half a minute on the CPU
    "distributed.sync_batchnorm": "models/test_transfer.py",  # CUDA alone
}
RunOf = Callable[[str], Path]


def put(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a config with another value at a dotted key, or without it."""
    whole = inner = copy.deepcopy(config)
    *above, last = (int(part) if part.isdigit() else part for part in key.split("."))
    for part in above:
        inner = inner[part] if isinstance(part, int) else inner.setdefault(part, {})
    if value is DEFAULT:
        del inner[last]
    else:
        assert inner.get(last) != value
        inner[last] = value
    return whole


def test_every_key_of_the_schema_is_accounted_for() -> None:
    keys = {key for key, field in walk(Config) if section_of(field) is None}
    told = [*(key for key in MATTERS if key in keys), *CHANGES_NOTHING, *ELSEWHERE]
    assert sorted(told) == sorted(keys), "each key once"
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert name in (Path(__file__).parent.parent / file).read_text()


@pytest.mark.parametrize("key", MATTERS)
def test_a_key_that_matters_is_wired_through(key: str, run_of: RunOf) -> None:
    name, other = MATTERS[key]
    try:
        plain = plain_loop(put(CONFIGS[name], key, other))
    except (RuntimeError, FloatingPointError):
        return  # it can't even be trained so, unlike the run
    assert differences(plain, run_of(name)) != []


def test_what_changes_no_numbers_changes_not_a_bit(tmp_path: Path) -> None:
    config = CONFIGS["dropout"]
    for key, value in CHANGES_NOTHING.items():
        config = put(config, key, value)
    config["run"]["dir"] = str(tmp_path)
    try:
        run = trained(tmp_path, config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(plain_loop(CONFIGS["dropout"]), run) == []


def test_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    other = model_of(CONFIGS["transfer"], seed=1).state_dict()
    other["1.0.weight"] = torch.zeros(7, 3)
    torch.save(other, tmp_path / "other.pt")
    config = copy.deepcopy(CONFIGS["transfer"])
    del config["transfer"]["append"], config["model_init"]
    config["transfer"] |= {"weights": str(tmp_path / "other.pt"), "strict": False}
    run = trained(tmp_path, config)
    assert differences(plain_loop(config), run) == []
    assert differences(plain_loop(put(config, "transfer.weights", DEFAULT)), run) != []
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain_loop(put(config, "transfer.strict", DEFAULT))
