"""The configs that the oracle trains. Together they change every key that changes numbers (test_keys.py walks the schema)."""

from __future__ import annotations

from typing import Any

SGD, ADAMW = "torch.optim.SGD", "torch.optim.AdamW"
CE = "torch.nn.CrossEntropyLoss"


def piece(name: str, **arguments: Any) -> dict[str, Any]:
    """One of oracle_pieces.py."""
    return {"_target_": f"oracle_pieces.{name}", **arguments}


def layers(*specs: tuple[Any, ...], kind: str = "torch.nn.Sequential") -> dict[str, Any]:
    """A Sequential of torch.nn's layers: (name, arguments ...)."""
    return {"_target_": kind, "_args_": [{"_target_": f"torch.nn.{n}", "_args_": list(a)} for n, *a in specs]}


MLP = layers(("Linear", 5, 8), ("Tanh",), ("Linear", 8, 3))
# No bias where BatchNorm takes it out again: its gradient is rounding alone, of which Adam makes whole steps.
NORMED = layers(("Linear", 5, 8, False), ("BatchNorm1d", 8), ("ReLU",), ("Dropout", 0.25), ("Linear", 8, 3))
CONV = layers(("Conv2d", 2, 4, 3), ("BatchNorm2d", 4), ("ReLU",), ("Conv2d", 4, 4, 3), ("Flatten",), ("Linear", 16, 3))
VAL = {"val": piece("Points", samples=11, seed=1), "test": piece("Points", samples=9, seed=2)}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {
        "data": {"train": piece("Points"), **VAL, "global_batch_size": 6, "eval_batch_size": 4},
        "model": MLP, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.5, "momentum": 0.9},
        "trainer": {"duration": "4ep", "log_every": "2step"},
        "checkpoint": {"every": "5step"},  # the best is at an evaluation between two saves
    },
    "weighted": {
        "seed": 7,
        "data": {
            "train": piece("Points", ignored=5, noise=0.1), "val": piece("Points", samples=11, seed=1, ignored=3),
            "global_batch_size": 7, "drop_last": False,
            "eval_batch_size": 5,
        },
        "model": MLP,
        "loss": {"_target_": CE, "weight": [0.5, 1.0, 2.0], "ignore_index": -100, "label_smoothing": 0.1},
        "metrics": ["accuracy"],
        "optimizer": {
            "_target_": SGD, "lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01,
            "groups": [{"match": "2.*", "lr": 0.1}, {"match": "*.bias", "lr": 0.3, "weight_decay": 0.0}],
        },
        "scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.7},
        "trainer": {
            "duration": "9step", "micro_batch_size": 2, "clip_grad_value": 0.05, "log_every": "3step",
            "evaluate_every": "5step", "evaluate_at_start": True,
        },
        "checkpoint": {"every": "3step", "keep_last": 2, "keep_best": "min val/loss"},
    },
    "dropout": {
        "data": {"train": piece("Points", noise=0.2), **VAL, "global_batch_size": 8},
        "model": NORMED, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {
            "_target_": ADAMW, "lr": 0.05, "weight_decay": 0.1, "layer_decay": 0.5,
            "groups": [{"ndim_below": 2, "weight_decay": 0.0}],
        },
        "scheduler": {
            "_target_": "dist_train.schedules.WarmupCosine", "total_steps": "total_steps", "warmup_steps": 2,
            "horizon": "7ep",
        },
        "trainer": {
            "duration": "5ep", "micro_batch_size": 3, "clip_grad_norm": 0.5, "ema_decay": 0.8, "log_every": "1step",
        },
        "checkpoint": {"every": ["2ep", "3step"], "keep_last": 1},
    },
    "bitwise": {  # five leaves; three in an epoch's last step
        "seed": 4,
        "data": {
            "train": piece("Points", shape=[2, 6, 6], samples=26), "val": piece("Points", shape=[2, 6, 6], seed=1),
            "global_batch_size": 10, "drop_last": False, "eval_batch_size": 8,
            "augment": [
                {"_target_": "dist_train.data.RandomHorizontalFlip"},
                {"_target_": "dist_train.data.Mixup", "classes": 3, "alpha": 0.8},
            ],
        },
        "model": CONV, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": ADAMW, "lr": 0.05, "weight_decay": 0.1},
        "trainer": {
            "duration": "4ep", "micro_batch_size": 2, "clip_grad_norm": 0.5, "ema_decay": 0.8, "log_every": "1step",
        },
        "checkpoint": {"every": "3step"},
        "distributed": {"reproducibility": "bitwise"},
    },
    "images": {
        "seed": 3,
        "data": {
            "train": piece("Points", shape=[2, 6, 6], samples=20), "val": piece("Points", shape=[2, 6, 6], seed=1),
            "global_batch_size": 10, "eval_batch_size": 8, "normalize": {"mean": [0.1, -0.2], "std": [0.7, 1.3]},
            "augment": [
                {"_target_": "dist_train.data.RandomHorizontalFlip"},
                {"_target_": "dist_train.data.Mixup", "classes": 3, "alpha": 0.8},
            ],
        },
        "model": CONV, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.1, "momentum": 0.9, "foreach": False},
        "trainer": {"duration": "4ep", "micro_batch_size": 4, "channels_last": True, "clip_grad_value": 0.1,
                    "clip_grad_norm": 0.2, "log_every": "1step"},
        "checkpoint": {"keep_best": None},
    },
    "fp16": {
        "data": {"train": piece("Points", bad=30000.0), **VAL, "global_batch_size": 6},
        "model": NORMED, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.1, "momentum": 0.9},
        "scheduler": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9, "every": "2step"},
        "trainer": {
            "duration": "4ep", "precision": "fp16", "micro_batch_size": 4, "clip_grad_norm": 1.0, "ema_decay": 0.7,
            "log_every": "1step",
        },
    },
    "bf16": {
        "data": {"train": piece("Points"), "val": piece("Points", samples=11, seed=1, noise=0.3), "global_batch_size": 6},
        "model": MLP, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": ADAMW, "lr": 0.05}, "trainer": {"duration": "3ep", "precision": "bf16", "log_every": "1step"},
        "scheduler": {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total_steps", "every": "1step",
            "warmup": "4step",
        },
    },
    "plateau": {
        "data": {"train": piece("Points"), **VAL, "global_batch_size": 11, "shuffle": False},
        "model": MLP, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 2.0},
        "scheduler": {
            "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "factor": 0.5, "patience": 0,
            "metric": "val/loss",
        },
        "trainer": {
            "duration": "40ep", "evaluate_every": "1step",
            "stop_when": {"metric": "val/loss", "patience": "4step", "min_delta": 0.01},
        },
    },
    "above": {
        "data": {"train": piece("Points"), **VAL, "global_batch_size": 6},
        "model": MLP, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.1},
        "scheduler": {
            "_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.5, "epochs": 30,
            "steps_per_epoch": "steps_per_epoch",
        },
        "trainer": {"duration": "30ep", "stop_when": {"metric": "val/accuracy", "above": 0.7}},
    },
    "summed": {
        "data": {
            "train": piece("Points", target="number"), "val": piece("Points", target="number", seed=1),
            "global_batch_size": "all", "collate": {"_target_": "oracle_pieces.doubled"},
        },
        "model": layers(("Linear", 5, 1)), "loss": {"_target_": "torch.nn.MSELoss", "reduction": "sum"},
        "metrics": ["mae"], "optimizer": {"_target_": SGD, "lr": 0.001},
        "trainer": {"duration": "6ep", "micro_batch_size": 9, "evaluate_every": None, "stop_at": "5step"},
    },
    "own": {
        "data": {"train": piece("Points", target="number"), "val": piece("Points", target="number", seed=1),
                 "global_batch_size": 7},
        "model": layers(("Linear", 5, 4), ("Tanh",), ("Linear", 4, 1)), "loss": piece("weighted_squares", power=1.5),
        "metrics": ["mae"], "optimizer": {"_target_": "torch.optim.RMSprop", "lr": 0.01},
        "callbacks": [piece("Cooling")],
        "checkpoint": {"keep_best": "max val/mae", "every": "2step"},  # the best would be that before the first step
        "trainer": {"duration": "3ep", "micro_batch_size": 3, "log_every": "1step", "evaluate_at_start": True,
                    "stop_when": {"metric": "val/mae", "below": 0.1, "patience": "1ep", "mode": "max"}},
    },
    "task": {
        "data": {"train": piece("Points"), **VAL, "global_batch_size": 6},
        "model": MLP, "task": piece("Pairs", penalty=0.1), "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.2}, "trainer": {"duration": "2ep", "micro_batch_size": 4},
    },
    "named": {
        "data": {
            "train": piece("Named", noise=0.2), "val": piece("Named", samples=11, seed=1),
            "global_batch_size": 6, "inputs": ["scale", "inner.points"], "target": "inner.label", "drop_last": False,
            "weights": [0, 1, 2, 0.5, 30] + [0.1] * 17,  # sample 4 is in every step, several times
        },
        "model": piece("Scaled", _args_=MLP["_args_"]), "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.3, "momentum": 0.9},
        "trainer": {"duration": "3ep", "log_every": "1step", "micro_batch_size": 4},
    },
    "stream": {
        "data": {
            "train": piece("Stream", noise=0.3, target="binary"), "val": piece("Points", target="binary", seed=1),
            "global_batch_size": 4, "steps_per_epoch": 3,
        },
        "model": layers(("Linear", 5, 1)), "loss": {"_target_": "torch.nn.BCEWithLogitsLoss"},
        "metrics": ["binary_accuracy"], "optimizer": {"_target_": SGD, "lr": 0.1},
        "trainer": {"duration": "8ep", "stop_when": {"metric": "val/loss", "below": 0.5}},
    },
    "skipped": {  # the very first step too
        "seed": 4,
        "data": {"train": piece("Points", bad="inf"), **VAL, "global_batch_size": 6},
        "model": NORMED, "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        "trainer": {"duration": "3ep", "on_nonfinite": "skip", "ema_decay": 0.9, "log_every": "1step"},
    },
    "zero_weight": {  # of two of three batches, where momentum and weight decay still act; all other weights are below 1
        "data": {"train": piece("Points", samples=12, ignored=8), **VAL, "global_batch_size": 4, "shuffle": False},
        "model": MLP, "loss": {"_target_": CE, "weight": [0.02, 0.04, 0.08]}, "metrics": ["accuracy"],
        "optimizer": {"_target_": SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        "trainer": {"duration": "3ep", "log_every": "1step", "ema_decay": 0.9, "micro_batch_size": 2},
    },
    "transfer": {
        "data": {"train": piece("Points"), **VAL, "global_batch_size": 6},
        "model": {"_target_": "torch.nn.Sequential", "_args_": [
            layers(("Linear", 5, 3), ("BatchNorm1d", 3), ("ReLU",)), layers(("Linear", 3, 3),)
        ]},
        "loss": {"_target_": CE}, "metrics": ["accuracy"],
        "model_init": [{"match": ["Linear"], "_target_": "torch.nn.init.normal_", "std": 0.5}],
        "transfer": {
            "freeze": ["BatchNorm1d", "1.0.bias"], "head": {"classes": 3, "at": "0.0"},
            "append": {"at": "0", "name": "last", "module": {"_target_": "torch.nn.Linear", "_args_": [3, 3]}},
        },
        "optimizer": {"_target_": SGD, "lr": 0.2}, "trainer": {"duration": "2ep", "log_every": "1step"},
    },
}  # fmt: skip
