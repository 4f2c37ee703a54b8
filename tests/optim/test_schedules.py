"""Every schedule gives each step the lr that a plain PyTorch loop gives it, also after a save and a load; or it is refused."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

import dist_train
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.config.slots import check_components
from dist_train.optim.schedule import Schedule, Span
from dist_train.tracking.records import read_rows

STEPS_PER_EPOCH, EPOCHS = 4, 6
STEPS = STEPS_PER_EPOCH * EPOCHS
SPAN = Span(STEPS, STEPS_PER_EPOCH, STEPS)
LOSS = ("val/loss", "min")
L = "torch.optim.lr_scheduler."
PLATEAU = {"_target_": L + "ReduceLROnPlateau", "patience": 0}
Spec = dict[str, Any]


def an_optimizer(name: str = "SGD") -> torch.optim.Optimizer:
    """Two groups, so that both are scheduled."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.02}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.5) if name == "SGD" else torch.optim.Adam(groups, lr=0.1)


def turn(optimizer: torch.optim.Optimizer) -> list[Any]:
    """One step; what it was done with."""
    used = [(group["lr"], group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return used


def plain(make: Callable[[torch.optim.Optimizer], Any], each: int, optimizer: torch.optim.Optimizer) -> list[Any]:
    """The loop that a person writes."""
    scheduler, used = make(optimizer), []
    for step in range(1, STEPS + 1):
        used.append(turn(optimizer))
        if step % each == 0:
            scheduler.step()
    return used


def ours(spec: Any, optimizers: Iterator[torch.optim.Optimizer], stop: int) -> list[Any]:
    """The engine's, stopped after `stop` steps and built again from what was saved."""
    optimizer = next(optimizers)
    schedule, used = Schedule(spec, optimizer, SPAN, LOSS), []
    for step in range(1, STEPS + 1):
        used.append(turn(optimizer))
        schedule.after_step(step)
        if step == stop:
            file = io.BytesIO()
            torch.save([schedule.state_dict(), optimizer.state_dict()], file)
            saved, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            optimizer = next(optimizers)
            schedule = Schedule(spec, optimizer, SPAN, LOSS)
            optimizer.load_state_dict(state)
            schedule.load_state_dict(saved)
    return used


class Bumpy:
    """A function with a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1.0 / self.calls


def wave(x: float) -> float:
    return math.cos(x)


def warm(optimizer: torch.optim.Optimizer, total_steps: int, warm: int = 5) -> lrs.LRScheduler:
    after = lrs.CosineAnnealingLR(optimizer, total_steps - warm)
    return lrs.SequentialLR(optimizer, [lrs.LinearLR(optimizer, 0.1, total_iters=warm), after], [warm])


def named(name: str, optimizer: torch.optim.Optimizer, total: int) -> lrs.LRScheduler:
    """As transformers.get_scheduler: the optimizer isn't the first argument."""
    assert name == "linear"
    return lrs.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))


def linear(factor: float = 0.1, total: int = 5) -> Spec:
    return {"_target_": L + "LinearLR", "start_factor": factor, "total_iters": total}


def after_warmup(make: Callable[[Any], Any], steps: int = 5, start: float | None = None) -> Callable[[Any], Any]:
    """LinearLR, then another scheduler, by torch's SequentialLR."""

    def build(optimizer: torch.optim.Optimizer) -> lrs.LRScheduler:
        warm = lrs.LinearLR(optimizer, start or 1 / (steps + 1), total_iters=steps)
        return lrs.SequentialLR(optimizer, [warm, make(optimizer)], [steps])

    return build


CASES: dict[str, tuple[Spec, Callable[[Any], Any], int]] = {
    "cosine in epochs": (
        {"_target_": L + "CosineAnnealingLR", "T_max": "total_steps"},
        lambda o: lrs.CosineAnnealingLR(o, EPOCHS), 4,
    ),
    "cosine in steps": (
        {"_target_": L + "CosineAnnealingLR", "T_max": "total_steps", "every": "1step"},
        lambda o: lrs.CosineAnnealingLR(o, STEPS), 1,
    ),
    "one cycle in steps": (
        {"_target_": L + "OneCycleLR", "max_lr": [0.3, 0.2], "total_steps": "total_steps"},
        lambda o: lrs.OneCycleLR(o, [0.3, 0.2], total_steps=STEPS), 1,
    ),
    "one cycle by epochs": (
        {"_target_": L + "OneCycleLR", "max_lr": 0.3, "epochs": EPOCHS, "steps_per_epoch": "steps_per_epoch"},
        lambda o: lrs.OneCycleLR(o, 0.3, epochs=EPOCHS, steps_per_epoch=STEPS_PER_EPOCH), 1,
    ),
    "one cycle stepped each epoch": (
        {"_target_": L + "OneCycleLR", "max_lr": 0.3, "total_steps": "total_steps", "every": "1ep"},
        lambda o: lrs.OneCycleLR(o, 0.3, total_steps=EPOCHS), 4,
    ),
    "cyclic": (
        {"_target_": L + "CyclicLR", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "exp_range", "gamma": 0.9},
        lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9), 1,
    ),
    "cyclic with a function": (
        {"_target_": L + "CyclicLR", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "scale_fn": wave},
        lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=wave), 1,
    ),
    "polynomial": (
        {"_target_": L + "PolynomialLR", "total_iters": "total_steps", "power": 2.0, "every": "1step"},
        lambda o: lrs.PolynomialLR(o, STEPS, power=2.0), 1,
    ),
    "warm restarts": (
        {"_target_": L + "CosineAnnealingWarmRestarts", "T_0": 3, "T_mult": 2, "every": "1step"},
        lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2), 1,
    ),
    "sequence": (
        {
            "_target_": L + "SequentialLR", "every": "1step", "milestones": [5, 12],
            "schedulers": [
                linear(),
                {"_target_": L + "CosineAnnealingLR", "_args_": [7]},
                {"_target_": L + "OneCycleLR", "max_lr": 0.2, "total_steps": 13},
            ],
        },
        lambda o: lrs.SequentialLR(
            o,
            [lrs.LinearLR(o, 0.1, total_iters=5), lrs.CosineAnnealingLR(o, 7), lrs.OneCycleLR(o, 0.2, total_steps=13)],
            [5, 12],
        ), 1,
    ),
    "sequence in epochs": (
        {"_target_": L + "SequentialLR", "milestones": [2], "schedulers": [linear(total=2), linear(0.5)]},
        lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.LinearLR(o, 0.5)], [2]), 4,
    ),
    "chain": (
        {
            "_target_": L + "ChainedScheduler", "every": "1step",
            "schedulers": [linear(), {"_target_": L + "ExponentialLR", "gamma": 0.9}],
        },
        lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, total_iters=5), lrs.ExponentialLR(o, 0.9)]), 1,
    ),
    "warm-up before a cosine over the rest": (
        {"_target_": L + "CosineAnnealingLR", "T_max": "total_steps", "eta_min": 0.001, "every": "1step", "warmup": "5step"},
        after_warmup(lambda o: lrs.CosineAnnealingLR(o, STEPS - 5, 0.001)), 1,
    ),
    "warm-up from a share of the lr, for an epoch": (
        {
            "_target_": L + "PolynomialLR", "total_iters": "total_steps", "every": "1step",
            "warmup": {"duration": "1ep", "from": 0.25},
        },
        after_warmup(lambda o: lrs.PolynomialLR(o, STEPS - 4), 4, 0.25), 1,
    ),
    "warm-up before a sequence": (
        {
            "_target_": L + "SequentialLR", "every": "1step", "milestones": ["2ep"], "warmup": "3step",
            "schedulers": [
                {"_target_": L + "ConstantLR", "factor": 1.0},
                {"_target_": L + "LinearLR", "start_factor": 1.0, "end_factor": 0.0, "total_iters": "total_steps - 2ep"},
            ],
        },
        lambda o: lrs.SequentialLR(
            o,
            [
                lrs.LinearLR(o, 1 / 4, total_iters=3),
                lrs.ConstantLR(o, 1.0),
                lrs.LinearLR(o, 1.0, 0.0, total_iters=STEPS - 3 - 8),
            ],
            [3, 11],
        ), 1,
    ),
    "durations instead of numbers": (
        {"_target_": L + "MultiStepLR", "milestones": ["2ep", "total_steps - 1ep"], "every": "2step"},
        lambda o: lrs.MultiStepLR(o, [4, 10]), 2,
    ),
    "a function that builds a sequence": (
        {"_target_": warm, "total_steps": "total_steps", "every": "1step"}, lambda o: warm(o, STEPS), 1,
    ),
    "a function with the optimizer second": (
        {"_target_": named, "_args_": ["linear"], "total": "total_steps", "every": "1step"},
        lambda o: named("linear", o, STEPS), 1,
    ),
    "a function that builds a class": (
        {"_target_": lambda optimizer: lrs.StepLR(optimizer, 2)}, lambda o: lrs.StepLR(o, 2), 4,
    ),
    "a sequence with user functions": (
        {
            "_target_": lambda optimizer: lrs.SequentialLR(
                optimizer, [lrs.LambdaLR(optimizer, Bumpy()), lrs.ExponentialLR(optimizer, 0.9)], [15]
            ),
            "every": "1step",
        },
        lambda o: lrs.SequentialLR(o, [lrs.LambdaLR(o, Bumpy()), lrs.ExponentialLR(o, 0.9)], [15]), 1,
    ),
    "a function with a state": (
        {"_target_": lambda optimizer: lrs.LambdaLR(optimizer, [Bumpy(), lambda step: 0.5**step]), "every": "1ep"},
        lambda o: lrs.LambdaLR(o, [Bumpy(), lambda step: 0.5**step]), 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("name", CASES)
def test_each_step_has_the_lr_and_momentum_of_a_plain_loop(name: str, optimizer: str) -> None:
    spec, make, each = CASES[name]
    expected = plain(make, each, an_optimizer(optimizer))
    assert len({str(used) for used in expected}) > 2, "the schedule does something"
    for stop in (1, 6, 13, STEPS):
        fresh = (an_optimizer(optimizer) for _ in range(2))
        assert ours(spec, fresh, stop) == expected


REFUSED: dict[str, tuple[Any, str]] = {
    "either way": ({"_target_": L + "LambdaLR", "lr_lambda": wave}, "every: 1step or every: 1ep"),
    "a mixture": (
        {
            "_target_": L + "SequentialLR", "milestones": [5],
            "schedulers": [linear(), {"_target_": L + "OneCycleLR", "max_lr": 0.1, "total_steps": "total_steps"}],
        },
        "every: 1step or every: 1ep",
    ),
    "a function with numbers": ({"_target_": warm, "total_steps": "total_steps"}, "every: 1step or every: 1ep"),
    "a live function": (lambda optimizer: lrs.LambdaLR(optimizer, wave), "every: 1step or every: 1ep"),
    "a state that can't be saved": (
        {"_target_": L + "LambdaLR", "lr_lambda": math.cos, "every": "1ep"},
        "can't be saved",
    ),
    "none of torch's": (lambda optimizer: object(), "expected a scheduler of torch.optim.lr_scheduler"),
    "too short": ({"_target_": L + "OneCycleLR", "max_lr": 0.1, "total_steps": 20}, "scheduler.horizon"),
    "no whole number of its steps": (
        {"_target_": L + "CosineAnnealingLR", "T_max": "10step"}, "10 optimizer steps, which isn't a whole number of the",
    ),
    "longer than there are steps": (
        {"_target_": L + "CosineAnnealingLR", "T_max": "total_steps - 6ep"}, "there are only 6 steps",
    ),
    "a chain after a warm-up": (
        {"_target_": L + "ChainedScheduler", "every": "1step", "warmup": "5step", "schedulers": [linear(), linear(0.5)]},
        "can't switch to a ChainedScheduler",
    ),
    "a sequence in a sequence": (
        {
            "_target_": L + "SequentialLR", "milestones": [5], "every": "1step",
            "schedulers": [
                linear(), {"_target_": L + "SequentialLR", "milestones": [5], "schedulers": [linear(), linear(0.5)]}
            ],
        },
        "can't switch to a SequentialLR",
    ),
    "two warm-ups": (
        {"_target_": L + "OneCycleLR", "max_lr": 0.1, "total_steps": "total_steps", "warmup": "5step"},
        r"scheduler.warmup: OneCycleLR rises by itself \(pct_start\)",
    ),
    "too short inside": (
        {
            "_target_": L + "SequentialLR", "milestones": [5], "every": "1step",
            "schedulers": [linear(), {"_target_": L + "OneCycleLR", "max_lr": 0.1, "total_steps": 18}],
        },
        "over after 23 of its steps, but this run takes 24",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_another_lr_than_meant_is_refused(name: str) -> None:
    spec, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        Schedule(spec, an_optimizer(), SPAN, LOSS)


def test_a_schedule_stepped_each_epoch_counts_from_the_end_of_its_warmup() -> None:
    spec = {"_target_": L + "StepLR", "step_size": 2, "gamma": 0.1, "warmup": "6step"}
    optimizer = an_optimizer()
    warm = lrs.LinearLR(optimizer, 1 / 7, total_iters=6)
    scheduler, expected = lrs.SequentialLR(optimizer, [warm, lrs.StepLR(optimizer, 2, 0.1)], [6]), []
    for step in range(1, STEPS + 1):
        expected.append(turn(optimizer))
        if step <= 6 or (step - 6) % STEPS_PER_EPOCH == 0:
            scheduler.step()
    assert [used[0][0] for used in expected][13:15] == pytest.approx([0.1, 0.01]), "two epochs after the warm-up"
    for stop in (3, 6, 7, 15):
        assert ours(spec, (an_optimizer() for _ in range(2)), stop) == expected
    jumped = Schedule(spec, an_optimizer(), SPAN, LOSS)
    jumped.advance(15)
    assert jumped.scheduler.optimizer.param_groups[1]["lr"] == pytest.approx(expected[15][1][0], rel=1e-12)


@pytest.mark.parametrize(("warmup", "noted"), [("23step", False), (f"{STEPS}step", True), ("7ep", True)])
@pytest.mark.parametrize("scheduler", [{"_target_": L + "CosineAnnealingLR", "T_max": "total_steps"}, PLATEAU])
def test_a_warmup_that_the_run_does_not_outlast_is_noted(scheduler: Any, warmup: str, noted: bool) -> None:
    schedule = Schedule({**scheduler, "warmup": warmup}, an_optimizer(), SPAN, LOSS)
    assert (f"is no shorter than the run of {STEPS} steps" in schedule.note) is noted


@pytest.mark.parametrize("stop", [0, 3, 12])
def test_a_plateau_is_watched_once_its_warmup_is_over(stop: int) -> None:
    """Evaluations during the warm-up have no say."""
    losses = {4: 0.1, 8: 0.5, 12: 0.5, 16: 0.6, 20: 0.6}
    optimizer = an_optimizer()
    warm, plateau = lrs.LinearLR(optimizer, 0.1, total_iters=5), None
    expected, used = [], []
    for step in range(1, STEPS + 1):
        expected.append(turn(optimizer))
        if step <= 5:
            warm.step()
        if step == 5:
            plateau = lrs.ReduceLROnPlateau(optimizer, patience=0)
        elif plateau is not None and step in losses:
            plateau.step(losses[step])
    assert len({str(one) for one in expected[5:]}) == 4, "it is reduced three times, and not for the 0.1 of the warm-up"

    spec = {**PLATEAU, "warmup": {"duration": "5step", "from": 0.1}}
    schedule = Schedule(spec, optimizer := an_optimizer(), SPAN, LOSS)
    for step in range(1, STEPS + 1):
        used.append(turn(optimizer))
        schedule.after_step(step)
        if step in losses:
            schedule.evaluated({"val/loss": losses[step]})
        if step == stop:
            saved, state = schedule.state_dict(), optimizer.state_dict()
            schedule = Schedule(spec, optimizer := an_optimizer(), SPAN, LOSS)
            optimizer.load_state_dict(state)
            schedule.load_state_dict(saved)
    assert used == expected


ACCURACY = ("val/accuracy", "max")


def test_reduce_on_plateau_takes_its_mode_from_the_metric() -> None:
    for watched, rising in ((ACCURACY, 0.1), (LOSS, 0.01)):
        schedule = Schedule(PLATEAU, optimizer := an_optimizer(), SPAN, watched)
        for value in (0.5, 0.6):
            schedule.evaluated({watched[0]: value})
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rising)
    for spec, watched in (
        ({**PLATEAU, "mode": "min"}, ACCURACY),
        ({**PLATEAU, "mode": "max", "metric": "val/loss"}, LOSS),
        (functools.partial(lrs.ReduceLROnPlateau, patience=0), ACCURACY),
    ):
        with pytest.raises(ConfigError, match=f"follows {watched[0]}"):
            Schedule(spec, an_optimizer(), SPAN, watched)
    of_ones_own = {**PLATEAU, "mode": "min", "metric": "val/gap"}
    assert Schedule(of_ones_own, an_optimizer(), SPAN, ("val/gap", "max")).scheduler.mode == "min"


def test_schedulers_inside_others_are_checked_like_those_outside() -> None:
    inner = [linear(), {"_target_": L + "ExponentialLR", "gama": 0.9}, {"_target_": L + "StepLR", "optimizer": 1}]
    config = load_config(
        {
            "data": {"train": {"_target_": "dist_train.data.Digits"}},
            "model": nn.Linear(2, 2),
            "loss": nn.MSELoss(),
            "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
            "scheduler": {"_target_": L + "ChainedScheduler", "schedulers": inner},
        }
    )
    problems = " ".join(str(problem) for problem in check_components(config))
    assert "gama; did you mean gamma" in problems
    assert "StepLR gets optimizer twice" in problems
    assert "StepLR requires step_size" in problems
    assert "LinearLR" not in problems


def test_a_longer_run_is_refused_where_its_schedule_is_over_and_nothing_is_written(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.randn(8, 1))
    config: dict[str, Any] = {
        "run": {"name": "cycle", "dir": str(tmp_path)},
        "data": {"train": data, "global_batch_size": 4},
        "model": nn.Linear(2, 1),
        "loss": nn.MSELoss(),
        "optimizer": {"_target_": torch.optim.SGD, "lr": 0.1, "momentum": 0.9},
        "scheduler": {"_target_": L + "OneCycleLR", "max_lr": 0.2, "total_steps": "total_steps"},
        "trainer": {"duration": "2ep", "log_every": "1step"},
        "tracking": {"tensorboard": False, "report": False},
    }

    def written() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    dist_train.train(config)
    before = written()
    with pytest.raises(ConfigError, match=r"scheduler.horizon: .*over after 4 of its steps, but this run takes 8"):
        dist_train.train({**config, "trainer": {"duration": "4ep", "log_every": "1step"}})
    assert written() == before
    longer = {**config["scheduler"], "horizon": "4ep"}
    changed = {"scheduler": longer, "trainer": {"duration": "4ep", "log_every": "1step"}}
    dist_train.train({**config, **changed, "checkpoint": {"accept_changes": True}})
    rows = read_rows(tmp_path / "cycle" / "metrics.jsonl")
    for total, part in ((4, rows[:4]), (8, rows[4:])):
        optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1, momentum=0.9)
        one, expected = lrs.OneCycleLR(optimizer, 0.2, total_steps=total), []
        for _ in range(total):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            one.step()
        assert [row["lr"] for row in part] == expected[-4:]
