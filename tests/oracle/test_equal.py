"""`train()` equals a plain PyTorch loop, in everything that it leaves behind: by the bit on one process.

Each way of getting the arithmetic a little wrong is shown to be noticed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparing import QUIET, differences, trained
from oracle_configs import CONFIGS
from plain_loop import PlainLoop
from runs import run_several
from torch import Tensor, nn

RunOf = Callable[[str], Path]


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_the_plain_loop(name: str, run_of: RunOf) -> None:
    assert differences(PlainLoop(CONFIGS[name]).run(), run_of(name)) == []


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("weighted", [2, 6]),  # three groups
        ("fp16", [5]),  # the scale has fallen, and counts towards its growth
        ("plateau", [8]),  # inside the patience of schedule and stop_when
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_end(tmp_path: Path, name: str, stops: list[int]) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config["checkpoint"] = {**config.get("checkpoint", {}), "every": "1step"}  # stops save no other ones
    for stop in (*stops, None):
        config["trainer"]["stop_at"] = stop and f"{stop}step"
        run = trained(tmp_path, config)
    assert differences(PlainLoop(config).run(), run) == []


# A rank of "weighted" has no sample in an epoch's last step; "images" mixes samples over the cuts.
ON_RANKS = {
    2: {"weighted": "auto", "images": "ddp", "fp16": "auto", "own": "ddp", "stream": "auto", "weightless": "ddp"},
    3: {"weighted": "ddp", "dropout": "auto", "images": "auto", "fp16": "ddp", "plateau": "ddp", "skipped": "auto"},
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The runs on so many processes, by the exchange of messages (`auto`) and by DDP; all in one start."""

    @cache
    def runs(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        for name in ON_RANKS[ranks]:
            whole = {"run": {"name": name, "code_paths": [str(Path(__file__).parent)]}, "tracking": QUIET}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({**whole, **CONFIGS[name]}))
        run_several(folder, ranks, [[f"{n}.yaml", f"distributed.strategy={s}"] for n, s in ON_RANKS[ranks].items()])
        return folder / "runs"

    return runs


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in ON_RANKS.items() for name in names])
def test_several_processes_train_the_plain_loop_at_the_same_cut(
    ranks: int, name: str, on_ranks: Callable[[int], Path]
) -> None:
    half = (
        CONFIGS[name]["trainer"].get("precision") == "fp16"
    )  # DDP scales the loss by the ranks: fp16 rounds otherwise
    found = differences(PlainLoop(CONFIGS[name], ranks).run(), on_ranks(ranks) / name, tolerance=3e-3 if half else 2e-5)
    assert found == []


# Negative controls: the plain loop with one mistake each, and the config in which it shows.


class ClipsBeforeDividing(PlainLoop):
    def finish_gradients(self, gradients: list[Tensor], n: int, loss: Tensor, weight: Any) -> bool:
        nn.utils.clip_grad_value_(self.parameters, self.options["clip_grad_value"])
        self.norm = nn.utils.get_total_norm(gradients)
        self.divide(gradients, n, weight)
        return False


class ClipsTheNormFirst(PlainLoop):
    def finish_gradients(self, gradients: list[Tensor], n: int, loss: Tensor, weight: Any) -> bool:
        self.divide(gradients, n, weight)
        self.norm = nn.utils.clip_grad_norm_(self.parameters, self.options["clip_grad_norm"])
        nn.utils.clip_grad_value_(self.parameters, self.options["clip_grad_value"])
        return False


class DividesByTheWeightAlone(PlainLoop):
    def divide(self, gradients: list[Tensor], n: int, weight: Any) -> None:
        for gradient in gradients:
            gradient.mul_(n).div_(float(weight))


class DividesBySamples(PlainLoop):
    def divide(self, gradients: list[Tensor], n: int, weight: Any) -> None:
        pass


class ForgetsTheAverage(PlainLoop):
    def average(self) -> None:
        pass


class AveragesByTheTextbook(PlainLoop):
    @torch.no_grad()
    def average(self) -> None:
        decay = self.options["ema_decay"]
        for name, average in self.ema.items():
            average.copy_(decay * average + (1 - decay) * self.model.get_parameter(name))


class AveragesBeforeTheUpdate(PlainLoop):
    def train_step(self, step: int) -> None:
        super().average()
        super().train_step(step)

    average = ForgetsTheAverage.average


class DrawsTheSameEveryStep(PlainLoop):
    def seeds(self, step: int, position: int) -> None:
        super().seeds(0, position)


class DrawsTheSameInEveryMicroBatch(PlainLoop):
    def seeds(self, step: int, position: int) -> None:
        super().seeds(step, 0)


class AugmentsWithoutTheEpoch(PlainLoop):
    def augmented(self, batch: Any, epoch: int, indices: Any) -> Any:
        return super().augmented(batch, 0, indices)


class ReadsWithoutTheEpoch(PlainLoop):
    def read(self, dataset: Any, indices: Any, epoch: int) -> Any:
        return super().read(dataset, indices, min(epoch, 0))


class SchedulesLate(PlainLoop):
    def after_update(self) -> None:
        self.step -= 1
        super().after_update()
        self.step += 1


class ForgetsTheSchedule(PlainLoop):
    def after_update(self) -> None:
        self.schedule = None
        super().after_update()


class KeepsTheFirstOfEquals(PlainLoop):
    def improves(self, figures: dict[str, float]) -> bool:
        better = super().improves({**figures, "loss": 0.0})
        assert self.best is not None
        return better


class EvaluatesInTrainMode(PlainLoop):
    def measure(self, dataset: Any) -> dict[str, float]:
        self.model.eval = self.model.train
        return super().measure(dataset)


class EvaluatesAsOneCut(PlainLoop):
    def measure(self, dataset: Any) -> dict[str, float]:
        self.data = {**self.data, "eval_batch_size": len(dataset)}
        return super().measure(dataset)


class WaitsOneLonger(PlainLoop):
    def stops(self, figures: dict[str, float]) -> bool:
        over = super().stops(figures)
        late, self.late = getattr(self, "late", False), over
        return late


MISTAKES: list[tuple[type[PlainLoop], str]] = [
    (ClipsBeforeDividing, "weighted"),
    (ClipsTheNormFirst, "images"),
    (DividesByTheWeightAlone, "weighted"),
    (DividesBySamples, "weighted"),
    (DividesBySamples, "own"),
    (ForgetsTheAverage, "dropout"),
    (ForgetsTheAverage, "skipped"),
    (AveragesByTheTextbook, "dropout"),
    (AveragesBeforeTheUpdate, "fp16"),
    (DrawsTheSameEveryStep, "dropout"),
    (DrawsTheSameInEveryMicroBatch, "dropout"),
    (AugmentsWithoutTheEpoch, "images"),
    (ReadsWithoutTheEpoch, "weighted"),
    (SchedulesLate, "weighted"),
    (SchedulesLate, "fp16"),
    (ForgetsTheSchedule, "dropout"),
    (KeepsTheFirstOfEquals, "dropout"),
    (EvaluatesInTrainMode, "dropout"),
    (EvaluatesAsOneCut, "plain"),
    (WaitsOneLonger, "plateau"),
    (WaitsOneLonger, "above"),
]


@pytest.mark.parametrize(("mistaken", "name"), MISTAKES)
def test_a_mistake_in_the_arithmetic_shows(mistaken: type[PlainLoop], name: str, run_of: RunOf) -> None:
    assert differences(mistaken(CONFIGS[name]).run(), run_of(name)) != []
