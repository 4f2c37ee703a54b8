"""A fresh start warns of what training leaves in a model that no checkpoint holds, and changes nothing by looking for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import result, rows, run_several, same_state_dicts
from torch import nn

from dist_train.building import unsaved
from dist_train.run.api import train
from dist_train.training import first_batch

KEPT = Path(__file__).parent.parent / "training" / "programs" / "kept.py"
WARNED = "training changes state that no checkpoint holds"
BASE = {
    "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
    "trainer": {"duration": "10step", "log_every": "1step"},
    "checkpoint": {"every": "5step"},
    "tracking": {"tensorboard": False, "report": False},
}


@pytest.fixture
def kept(beside: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The models, in a project of their own; a slow machine is no reason not to look."""
    beside(KEPT)
    monkeypatch.setattr(unsaved, "SECONDS", 100.0)
    import kept

    return kept


class Draws(torch.utils.data.Dataset):
    """Samples from a generator of its own: to read one more would change those that follow."""

    def __init__(self, kept: Any):
        self.points, self.generator = kept.Data(), torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        x, y = self.points[index]
        return x + torch.randn(6, generator=self.generator), y


def start(kept: Any, model: nn.Module, name: str, **trainer: Any) -> None:
    """A start of a run on live objects."""
    data = {"train": Draws(kept), "global_batch_size": 8, "num_workers": 0}
    whole = {**BASE, "data": data, "model": model, "run": {"name": name}}
    whole["trainer"] = {**BASE["trainer"], **trainer}
    train(whole)


def same_run(one: Path, other: Path) -> bool:
    """Records, result and weights are equal to the bit."""
    return (
        result(one) == result(other)
        and rows(one) == rows(other)
        and same_state_dicts(one / "model.pt", other / "model.pt")
    )


@pytest.mark.parametrize(("model", "named"), [("Hidden", "seen"), ("Late", "steps"), ("Usual", ""), ("Drift", "")])
def test_a_fresh_start_warns_and_trains_as_without_the_check(
    kept: Any, model: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    first = getattr(kept, model)()
    second = copy.deepcopy(first)
    looked: list[str] = []

    def look(*args: Any) -> str:
        before = [torch.get_rng_state(), *(value.clone() for value in first.state_dict().values())]
        looked.append(unsaved.unsaved_at_start(*args))
        after = [torch.get_rng_state(), *first.state_dict().values()]
        assert all(map(torch.equal, before, after))
        assert all(parameter.grad is None for parameter in first.parameters())
        return looked[-1]

    monkeypatch.setattr(first_batch, "unsaved_at_start", look)
    start(kept, first, "looked")
    printed = " ".join(capsys.readouterr().err.split())
    assert (WARNED in printed) == bool(named)
    assert len(looked) == 1
    assert (f"one that never stopped: {named}. Make it a buffer" in looked[0]) == bool(named)
    monkeypatch.setattr(first_batch, "unsaved_at_start", lambda *_: "")
    start(kept, second, "unseen")
    assert same_run(Path("runs/looked"), Path("runs/unseen"))


def test_a_resume_is_silent(kept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for stop, warned in (("5step", True), (None, False)):
        start(kept, kept.Hidden(), "resumed", stop_at=stop)
        assert (WARNED in " ".join(capsys.readouterr().err.split())) == warned


def test_what_cannot_be_copied_apart_or_cheaply_is_left_alone(
    kept: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[Any] = []
    monkeypatch.setattr(unsaved, "_compare", lambda *args: compared.append(args) or "")
    hooked = kept.Hooked()
    start(kept, hooked, "hooked")
    assert len(hooked.calls) == 10, "a forward for each step, and no other"
    large = kept.Hidden()
    large.table = [torch.zeros(3 << 20) for _ in range(2)]
    start(kept, large, "large")
    assert not compared
    start(kept, kept.Usual(), "usual")
    assert len(compared) == 1


def test_an_error_in_the_check_is_none_of_the_run(kept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Once(kept.Hidden):  # type: ignore[misc, name-defined]
        """A copy of it can't run."""

        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("one of me is enough")

    start(kept, Once(), "once")
    assert result(Path("runs/once"))["state"] == "completed"
    assert WARNED not in capsys.readouterr().err


def test_two_processes_warn_once_and_collectives_of_a_task_stay_in_step(kept: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("""
data: {train: {_target_: kept.Data}, global_batch_size: 8, num_workers: 0}
model: {_target_: kept.Late}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
trainer: {duration: 10step}
tracking: {tensorboard: false, report: false}
""")
    gathers = ["c.yaml", "run.name=gathers", "loss=null", "task={_target_: kept.Gathers}"]
    done = run_several(tmp_path, 2, [["c.yaml", "run.name=late"], gathers])
    assert " ".join(done.stderr.split()).count(WARNED) == 1, "of the first run, by rank 0; the second proves nothing"
    assert result(tmp_path / "runs" / "gathers")["step"] == 10
