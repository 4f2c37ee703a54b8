"""Configs whose bits are compared over numbers of processes.

Eight micro-batches a step, so that one process accumulates eight and eight processes one each; an epoch's last step has fewer
than there are processes.
"""

from __future__ import annotations

from typing import Any

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1}
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}
CE = {"_target_": "torch.nn.CrossEntropyLoss"}


def points(name: str = "Points", module: str = "oracle_pieces", **options: Any) -> dict[str, Any]:
    return {"_target_": f"{module}.{name}", **options}


def layers(*specs: tuple[Any, ...]) -> dict[str, Any]:
    """A Sequential of torch.nn's layers: (name, arguments ...)."""
    modules = [{"_target_": f"torch.nn.{name}", "_args_": list(arguments)} for name, *arguments in specs]
    return {"_target_": "torch.nn.Sequential", "_args_": modules}


def case(model: Any, train: Any = None, val: Any = None, **sections: Any) -> dict[str, Any]:
    """7 steps of 16 samples in micro-batches of 2; 3 steps are an epoch, whose last one has 4 micro-batches, the last of 1."""
    train = train or points(samples=39, noise=0.2)
    data = {
        "train": train, "val": val or {**train, "samples": 11, "seed": 1}, "global_batch_size": 16, "eval_batch_size": 4,
        "drop_last": False, "num_workers": 0, **sections.pop("data", {}),
    }  # fmt: skip
    trainer = {
        "duration": "7step", "micro_batch_size": 2, "log_every": "2step", "evaluate_every": "3step", "clip_grad_norm": 0.5,
        "ema_decay": 0.8, **sections.pop("trainer", {}),
    }  # fmt: skip
    given = {"metrics": ["accuracy"], "optimizer": SGD, "checkpoint": {"every": "4step", "keep_last": 1}, **sections}
    if "task" not in given:
        given = {"loss": CE, **given}
    distributed = {"reproducibility": "bitwise", **given.pop("distributed", {})}
    return {
        "data": data, "model": model, "trainer": trainer, "distributed": distributed,
        "tracking": {"tensorboard": False, "report": False}, **given,
    }  # fmt: skip


IMAGES = points(samples=40, shape=[2, 6, 6], noise=0.1)
MLP = layers(("Linear", 5, 8), ("Tanh",), ("Dropout", 0.3), ("Linear", 8, 3))
OVERFLOWING = layers(("Linear", 5, 8), ("ReLU",), ("Dropout", 0.3), ("Linear", 8, 3))
CNN = layers(
    ("Conv2d", 2, 4, 3, 1, 1), ("BatchNorm2d", 4), ("ReLU",), ("Conv2d", 4, 4, 3), ("BatchNorm2d", 4), ("Flatten",),
    ("Dropout", 0.25), ("Linear", 64, 3),
)  # fmt: skip
AUGMENTED = [
    {"_target_": "dist_train.data.RandomShift", "pixels": 1},
    {"_target_": "dist_train.data.OneOf", "augments": [
        {"_target_": "dist_train.data.Mixup", "classes": 3}, {"_target_": "dist_train.data.CutMix", "classes": 3},
    ]},
]  # fmt: skip
TRANSFORMER = {"_target_": "bits.Transformer"}
TOKENS = points(samples=40, shape=[6, 8], noise=0.1)
RESNET = {"_target_": "torchvision.models.resnet18", "num_classes": 3}
LARGE = points(samples=16, shape=[3, 32, 32], noise=0.1)

TRIPLES = {"_target_": "task_pieces.Triples", "samples": 39}
GAN = {"D": {**SGD, "match": "D.*"}, "G": {"_target_": "torch.optim.Adam", "lr": 0.01}}
SAM = {"_target_": "task_pieces.SAM", "lr": 0.1}
LBFGS = {"_target_": "torch.optim.LBFGS", "lr": 0.5, "max_iter": 3, "line_search_fn": "strong_wolfe"}
PLAIN: dict[str, Any] = {"clip_grad_norm": None, "ema_decay": None}


def of_task(name: str, outputs: int = 3, net: str = "Net", **sections: Any) -> dict[str, Any]:
    """A task of the oracle's, in double precision."""
    model = {"_target_": f"task_pieces.{net}", **({} if net == "Pair" else {"outputs": outputs})}
    return case(model, TRIPLES, task={"_target_": f"task_pieces.{name}"}, metrics=[], **sections)


CASES: dict[str, dict[str, Any]] = {
    "mlp-adamw": case(MLP, optimizer=ADAMW),
    "cnn-sgd": case(CNN, IMAGES, data={"augment": AUGMENTED}, distributed={"bucket_mb": 0.001}),
    "transformer-adamw": case(TRANSFORMER, TOKENS, optimizer=ADAMW, distributed={"bucket_mb": 0.005}),
    "resnet18-bf16": case(
        RESNET, LARGE, val=points(samples=6, shape=[3, 32, 32], seed=1),
        trainer={"precision": "bf16", "duration": "2step", "log_every": "1step", "evaluate_every": "2step", "ema_decay": None},
        checkpoint={"every": "2step", "keep_last": 1, "keep_best": None},
    ),
    "fp16": case(OVERFLOWING, points(samples=39, bad=30000.0), trainer={"precision": "fp16", "log_every": "1step"}),
    "weighted": case(MLP, data={"weights": [0, 1, 2, 0.5, 30] + [0.1] * 34}, loss={**CE, "weight": [0.5, 1.0, 2.0]}),
    "broken": case(
        CNN, {**IMAGES, "_target_": "oracle_pieces.Broken"}, val={**IMAGES, "samples": 11},
        data={"augment": AUGMENTED, "on_error": "skip"},
    ),
    "losses": of_task("OwnCounts", outputs=6),
    "whole": of_task("Contrast", outputs=4, net="Noisy", data={"drop_last": True}),
    "gan": of_task("Game", net="Pair", optimizer=GAN, trainer=PLAIN),
    "lbfgs": of_task("Shared", optimizer=LBFGS, trainer=PLAIN),
    "sam": of_task("Shared", net="Noisy", data={"drop_last": True}, optimizer=SAM, trainer=PLAIN),
    "plateau": case(
        MLP, optimizer={"_target_": "torch.optim.SGD", "lr": 2.0}, trainer={"evaluate_every": "1step"},
        scheduler={"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "factor": 0.5, "patience": 0, "metric": "val/loss"},
    ),
    "counting": case({"_target_": "bits.Counting"}, optimizer=ADAMW),
    "unused": case({"_target_": "bits.Sparing"}, distributed={"find_unused_parameters": True}),
}  # fmt: skip
