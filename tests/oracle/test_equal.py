"""`train()` equals a plain PyTorch loop, in everything that it leaves behind: by the bit on one process.

Each way of getting the arithmetic a little wrong is shown to be noticed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_loop as plain_loop_module
import pytest
import yaml
from comparing import QUIET, differences, trained
from oracle_configs import CONFIGS
from plain_loop import plain_loop
from runs import environment, result

RunOf = Callable[[str], Path]


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_the_plain_loop(name: str, run_of: RunOf) -> None:
    assert differences(plain_loop(CONFIGS[name]), run_of(name)) == []


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("weighted", [2, 6]),  # three groups
        ("fp16", [5]),  # the scale has fallen, and counts towards its growth
        ("named", [2, 5]),  # in the middle of epochs whose samples are drawn by weight
        ("plateau", [8]),  # inside the patience of schedule and stop_when
    ],
)
def test_a_run_that_was_stopped_resumes_to_the_same_end(tmp_path: Path, name: str, stops: list[int]) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config["checkpoint"] = {**config.get("checkpoint", {}), "every": "1step"}  # stops save no other ones
    for stop in (*stops, None):
        config["trainer"]["stop_at"] = stop and f"{stop}step"
        run = trained(tmp_path, config)
    assert differences(plain_loop(config), run) == []


# A rank of "weighted" has no sample in an epoch's last step; "images" mixes samples over the cuts.
ON_RANKS = {
    2: {
        "weighted": "auto",
        "named": "auto",
        "images": "ddp",
        "fp16": "auto",
        "own": "ddp",
        "stream": "auto",
        "zero_weight": "ddp",
        "bitwise": "auto",
    },
    3: {
        "bitwise": "auto",
        "weighted": "ddp",
        "dropout": "auto",
        "images": "auto",
        "fp16": "ddp",
        "plateau": "ddp",
        "skipped": "auto",
    },
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs on several processes, by pairwise exchange (`auto`) and by DDP; all in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs: dict[int, list[list[str]]] = {}
    for ranks, strategies in ON_RANKS.items():
        for name, strategy in strategies.items():
            run = {"name": f"{name}-{ranks}", "code_paths": [str(Path(__file__).parent)]}
            config = folder / f"{name}-{ranks}.yaml"
            config.write_text(yaml.safe_dump({"run": run, "tracking": QUIET, **CONFIGS[name]}))
            jobs.setdefault(ranks, []).append([config.name, f"distributed.strategy={strategy}"])
    command = [sys.executable, str(Path(__file__).with_name("forked_ranks.py")), json.dumps(jobs)]
    done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder / "runs"


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in ON_RANKS.items() for name in names])
def test_several_processes_train_the_plain_loop_at_the_same_cut(ranks: int, name: str, on_ranks: Path) -> None:
    # DDP scales the loss by the number of ranks, after which fp16 rounds differently.
    tolerance = 3e-3 if CONFIGS[name]["trainer"].get("precision") == "fp16" else 2e-5
    tolerance = 0.0 if name == "bitwise" else tolerance
    assert differences(plain_loop(CONFIGS[name], ranks), on_ranks / f"{name}-{ranks}", tolerance) == []


def test_a_run_that_the_clock_ends_is_the_plain_loop_of_as_many_steps(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["plain"])
    # Nothing is due but by the end itself. (Without clipping its row has no norm: a step doesn't know that it is the last.)
    config["trainer"] = {"duration": "0.2s", "log_every": "1000ep", "evaluate_every": None, "clip_grad_norm": 1.0}
    config["checkpoint"] = {"every": "1000ep"}
    run = trained(tmp_path, config)
    config["trainer"]["duration"] = f"{result(run)['step']}step"
    assert differences(plain_loop(config), run) == []


def with_mistake(changes: dict[str, str]) -> Callable[[dict[str, Any]], SimpleNamespace]:
    """The plain loop with other text in place of some."""
    source = Path(plain_loop_module.__file__).read_text()
    for right, wrong in changes.items():
        assert source.count(right) == 1, f"expected once in plain_loop.py: {right}"
        source = source.replace(right, wrong)
    names: dict[str, Any] = {"__name__": "mistaken_loop"}
    exec(compile(source, "mistaken_loop.py", "exec"), names)
    return names["plain_loop"]


BY_VALUE = "nn.utils.clip_grad_value_(parameters.values(), c.clip_grad_value)"
BY_NORM = "norm = nn.utils.clip_grad_norm_(parameters.values(), c.clip_grad_norm)"
GRADIENTS = "gradients = [p.grad for p in parameters.values() if p.grad is not None]"
FACTOR = "gradient.mul_(n / float(weight_sum) if weight_sum else 0.0)"
AVERAGE = "average.lerp_(parameters[name].detach(), 1 - c.ema_decay)"
SCHEDULED = "run.step % c.schedule_every == 0"
READ = "read(c.train, rows, epoch, row_keys)"
# A mistake: the text of the plain loop that it changes, and the configs in which it shows.
MISTAKES: dict[str, tuple[dict[str, str], list[str]]] = {
    "clips by value before the division": ({BY_VALUE: "pass", GRADIENTS: f"{GRADIENTS}; {BY_VALUE}"}, ["weighted"]),
    "clips the norm before the values": (
        {f"{BY_VALUE}\n        {BY_NORM}": f"{BY_NORM}\n        {BY_VALUE}"},
        ["images"],
    ),
    "divides by the weight alone": ({FACTOR: "gradient.mul_(n).div_(float(weight_sum))"}, ["weighted"]),
    "divides by the samples": ({FACTOR: "pass"}, ["weighted", "own"]),
    "a step takes a weight below 1 for 1": (
        {FACTOR: "gradient.mul_(n / max(float(weight_sum), 1.0))"},
        ["zero_weight"],
    ),
    "a row takes a weight below 1 for 1": (
        {"open_loss / open_weight if": "open_loss / max(open_weight, 1.0) if"},
        ["zero_weight"],
    ),
    "an evaluation takes a weight below 1 for 1": (
        {"sums[:, 0] / sums[:, 1]": "sums[:, 0] / sums[:, 1].clamp(min=1)"},
        ["zero_weight"],
    ),
    "sums micro-batches one after the other": (
        {"summed(leaves, 0, 1 << (len(leaves) - 1).bit_length())": "[sum(t[1:], t[0]) for t in zip(*leaves)]"},
        ["bitwise"],
    ),
    "takes running statistics on from one micro-batch to the next": (
        {"model.load_state_dict(before, strict=False)": "pass"},
        ["bitwise"],
    ),
    "keeps the running statistics of the last micro-batch": (
        {"buffer.copy_(sums.pop(0) / len(leaves))": "sums.pop(0)"},
        ["bitwise"],
    ),
    "no EMA": ({AVERAGE: "pass"}, ["dropout", "skipped"]),
    "an EMA by the textbook": (
        {AVERAGE: "average.copy_(c.ema_decay * average + (1 - c.ema_decay) * parameters[name].detach())"},
        ["dropout"],
    ),
    "an EMA before the update": (
        {AVERAGE: "pass", "lr = optimizer": f"[{AVERAGE} for name, average in ema.items()]; lr = optimizer"},
        ["fp16"],
    ),
    "draws the same in every step": ({"seed_forward(c.seed, run.step,": "seed_forward(c.seed, 0,"}, ["dropout"]),
    "draws the same in every micro-batch": ({"part.start, CPU": "0, CPU"}, ["dropout"]),
    "augments without the epoch": ({"epoch=epoch": "epoch=0"}, ["images"]),
    "reads without the epoch": ({READ: "read(c.train, rows, 0, row_keys)"}, ["weighted"]),
    "gives two copies of a sample the same draws": ({READ: "read(c.train, rows, epoch, rows)"}, ["named"]),
    "draws the same samples in every epoch": ({"[6, c.seed, 0, epoch, 0]": "[6, c.seed, 0, 0, 0]"}, ["named"]),
    "a schedule one step late": ({SCHEDULED: "(run.step - 1) % c.schedule_every == 0"}, ["weighted", "fp16"]),
    "no schedule": ({SCHEDULED: "False"}, ["dropout"]),
    "keeps the first of equal ones": ({'-val["loss"])': "0.0)"}, ["dropout"]),
    "counts the weights of the start among the best": (
        {"\n\n    while state": "\n    best = (c.best_sign * val[c.best_metric], INF)\n    while state"},
        ["own"],
    ),
    "evaluates in train mode": ({"copy.deepcopy(model).eval()": "copy.deepcopy(model)"}, ["dropout"]),
    "evaluates all at once": (
        {"range(0, len(dataset), c.eval_batch_size)": "[0]", "start + c.eval_batch_size": "len(dataset)"},
        ["plain"],
    ),
    "stops one evaluation late": (
        {"over = over or value": "over, run.late = over or getattr(run, 'late', False), value"},
        ["plateau", "above"],
    ),
}


@pytest.mark.parametrize(("mistake", "name"), [(title, name) for title in MISTAKES for name in MISTAKES[title][1]])
def test_a_mistake_in_the_arithmetic_shows(mistake: str, name: str, run_of: RunOf) -> None:
    mistaken = with_mistake(MISTAKES[mistake][0])
    assert differences(mistaken(CONFIGS[name]), run_of(name)) != []
